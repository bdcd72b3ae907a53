// Radix selection by one CTA.
//
// Why this is CUDA: it also compiles for a CPU, where the tests' emulator runs it, and TileLang finds no bin of a histogram.
#pragma once

#include "layout.cuh"

namespace misa {

constexpr int kBins = 2048;   // of a histogram
constexpr int kScratch = 64;  // ints of shared memory that a kernel sets aside for the functions here

// A float's bits in an order in which unsigned integers compare as the floats do; both zeros alike. What is not a number is
// 0, below all numbers, -infinity included: it passes no comparison of floats either, so selections by floats and by keys agree.
__device__ __forceinline__ unsigned ordered(float value) {
  const unsigned bits = __float_as_uint(value + 0.f);
  const unsigned key = bits ^ ((unsigned)((int)bits >> 31) | 0x80000000u);
  return value == value ? key : 0u;
}

constexpr unsigned kLeastNumber = 0x007fffffu, kInfinity = 0xff800000u;  // -infinity and infinity as ordered keys

// The keys of the next lower and the next higher score. That of -0, between those of 0 and of the highest number below it, is no
// score's.
__device__ __forceinline__ unsigned key_below(unsigned key) { return key - (key == 0x80000000u ? 2 : 1); }
__device__ __forceinline__ unsigned key_above(unsigned key) { return key + (key == 0x7ffffffeu ? 2 : 1); }

__device__ __forceinline__ float from_ordered(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ int warp_inclusive_scan(int value) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, value, offset);
    if ((threadIdx.x & 31) >= offset) value += other;
  }
  return value;
}

// The same with what depends on the lane alone worked out once, for a loop.
struct WarpScan {
  int reached[5];  // 1 where a lane has one so far before it

  __device__ __forceinline__ WarpScan() {
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      reached[i] = (threadIdx.x & 31) >= 1 << i;
      asm("" : "+r"(reached[i]));  // a register, and one instruction to multiply and add; else two, and a comparison
    }
  }

  __device__ __forceinline__ int inclusive(int value) const {
#pragma unroll
    for (int i = 0; i < 5; ++i) value += __shfl_up_sync(0xffffffffu, value, 1 << i) * reached[i];
    return value;
  }
};

// Sum over the threads before this one, and the sum over all. scratch holds 32 ints; every thread must call this.
template <int THREADS>
__device__ __forceinline__ int cta_exclusive_scan(int value, int* scratch, int& total) {
  const int warp = threadIdx.x / 32;
  const int inclusive = warp_inclusive_scan(value);
  __syncthreads();
  if ((threadIdx.x & 31) == 31) scratch[warp] = inclusive;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) {
    if (i < warp) before += scratch[i];
    total += scratch[i];
  }
  return before + inclusive - value;
}

template <int THREADS>
__device__ __forceinline__ void clear_bins(int* bins, int count = kBins) {
  for (int i = threadIdx.x; i < count; i += THREADS) bins[i] = 0;
}

// The bin that holds the `need`-th largest entry of a histogram, 16-byte aligned (need >= 1; the lowest entry if there are
// fewer).
// result[0] = bin, result[1] = entries in bins above it, result[2] = entries in it. Ends with a barrier.
template <int THREADS>
__device__ __forceinline__ void find_bin(const int* bins, int need, int* scratch, int* result) {
  constexpr int kPer = kBins / THREADS;
  static_assert(kPer % 4 == 0, "a thread reads its bins four at a time");
  const int first = kBins - kPer * (threadIdx.x + 1);  // threads take the bins in descending order
  int count[kPer], sum = 0;
#pragma unroll
  for (int i = 0; i < kPer; i += 4)
    *reinterpret_cast<int4*>(count + i) = *reinterpret_cast<const int4*>(bins + first + i);
#pragma unroll
  for (int i = 0; i < kPer; ++i) sum += count[i];
  int total;
  int above = cta_exclusive_scan<THREADS>(sum, scratch, total);
  need = min(need, total);
#pragma unroll
  for (int i = kPer - 1; i >= 0; --i) {
    if (above < need && above + count[i] >= need) {  // of all bins, one
      result[0] = first + i;
      result[1] = above;
      result[2] = count[i];
    }
    above += count[i];
  }
  __syncthreads();
}

// Entries are ordered by score, then by lower position: keys of 54 bits.
constexpr int kPositionBits = 22;
constexpr int kMaxContext = 1 << kPositionBits;
constexpr unsigned kLastPosition = kMaxContext - 1;

__device__ __forceinline__ unsigned long long entry_key(unsigned score, int position) {
  return (unsigned long long)score << kPositionBits | (kLastPosition - (unsigned)position);
}

// What a selected position is written as: itself, its slot of the cache, or its place among ragged keys.
enum Form { kPositions, kSlots, kRagged };

__device__ __forceinline__ int output_index(int position, int form, const int* pages, int offset) {
  if (form == kSlots) return pages[position / kPage] * kPage + position % kPage;
  return form == kRagged ? position + offset : position;
}

// Rows that see at most topk tokens select all of them.
template <int THREADS>
__device__ __forceinline__ void select_all(int length, int topk, int form, const int* pages, int offset, int* out) {
  for (int i = threadIdx.x; i < topk; i += THREADS) out[i] = i < length ? output_index(i, form, pages, offset) : -1;
}

}  // namespace misa
