// What the CTAs of `decode_select` know of a row and exchange about it.
//
// Why this and what includes it is CUDA: the CTAs exchange single numbers through distributed shared memory, which TileLang 0.1.11
// cannot load, and the selection also compiles for a CPU, where the tests' emulator runs it.
#pragma once

#include <cstdint>

#include "cta.cuh"
#include "cluster.cuh"

namespace misa {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kFineBins = kThreads;  // of the histograms of candidates

// Places in a CTA's ints of scratch, after two for every warp.
constexpr int kFound = 2 * kWarps, kListed = kFound + 6, kResult = kFound + 8, kMailbox = kFound + 10;
static_assert(kMailbox + 2 <= kScratch, "they fit");

__device__ __forceinline__ uint64_t* mailbox(int* scratch) { return reinterpret_cast<uint64_t*>(scratch + kMailbox); }

// The entries of a row that are selected: those of a score over `score`, and of that score up to position `last`.
struct Cut {
  unsigned score;  // as an ordered key
  int last;
};

__device__ __forceinline__ bool is_selected(unsigned key, int position, const Cut& cut) {
  return key > cut.score || (key == cut.score && position <= cut.last);
}

// What a warp has of a row: tokens `first` .. `end`, `first` a multiple of 128.
struct Part {
  const float* scores;  // of the row
  int first, end;
};

// The first token of this lane in a batch that begins with token `first`: its others are 1, 2, 3, 128, 129, ... further on.
__device__ __forceinline__ int token_of_lane(int first) { return first + threadIdx.x % 32 * 4; }

// A bin of a histogram. earlier: of the CTAs of lower rank only.
struct Bin {
  int index;
  int above, count;  // entries in the bins above, and in it
  int earlier_above, earlier;
};

// From what every warp has put into values[warp], before a barrier: the sum over the warps before this one, and over all.
__device__ __forceinline__ int sum_of_warps_before(const int* values, int& total) {
  const int lane = threadIdx.x % 32, value = lane < kWarps ? values[lane] : 0;
  total = __reduce_add_sync(0xffffffffu, value);
  return __reduce_add_sync(0xffffffffu, lane < threadIdx.x / 32 ? value : 0);
}

// Finds the bin that holds the `need`-th largest entry of the sum of all CTAs' histograms. A barrier of the CTAs comes
// before. Returns the number of entries; if it is less than `need` there is no such bin.
template <int RANKS, int BINS>
__device__ __forceinline__ int find_bin_of_all(const int* bins, int need, int rank, int* scratch, Bin& found) {
  constexpr int kPer = BINS / kThreads;  // bins in descending order
  const int warp = threadIdx.x / 32, first = BINS - kPer * (threadIdx.x + 1);
  int count[kPer] = {}, earlier[kPer] = {};
#pragma unroll
  for (int r = 0; r < RANKS; ++r) {
    int peer[kPer];
    if constexpr (kPer == 4) {
      *reinterpret_cast<int4*>(peer) =
          RANKS == 1 ? *reinterpret_cast<const int4*>(bins + first) : load_peer4(bins + first, r);
    } else {
      static_assert(kPer == 1, "a thread owns four bins or one");
      peer[0] = RANKS == 1 ? bins[first] : load_peer(bins + first, r);
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      count[i] += peer[i];
      if (r < rank) earlier[i] += peer[i];
    }
  }
  int sum = 0, earlier_sum = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    sum += count[i];
    earlier_sum += earlier[i];
  }
  const int inclusive = warp_inclusive_scan(sum), earlier_inclusive = RANKS == 1 ? 0 : warp_inclusive_scan(earlier_sum);
  if (threadIdx.x % 32 == 31) {
    scratch[warp] = inclusive;
    scratch[kWarps + warp] = earlier_inclusive;
  }
  __syncthreads();
  int total, earlier_total;
  int above = inclusive - sum + sum_of_warps_before(scratch, total), earlier_above = 0;
  if (RANKS > 1) earlier_above = earlier_inclusive - earlier_sum + sum_of_warps_before(scratch + kWarps, earlier_total);
  Bin* const result = reinterpret_cast<Bin*>(scratch + kFound);
#pragma unroll
  for (int i = kPer - 1; i >= 0; --i) {
    // Of all bins, one.
    if (above < need && above + count[i] >= need) *result = {first + i, above, count[i], earlier_above, earlier[i]};
    above += count[i];
    earlier_above += earlier[i];
  }
  __syncthreads();
  found = *result;
  return total;
}

}  // namespace misa
