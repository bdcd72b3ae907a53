// Scores of a row's listed tokens by all heads of the indexer.
//
// Why this is CUDA: keys go from the cache to the registers that a wgmma multiplies. TileLang multiplies what lies in shared memory, to which
// keys that lie anywhere are copied 16 bytes at a time, with an address, a fence and a barrier for each tile.
#pragma once

#include "barrier.cuh"
#include "cta.cuh"
#include "gather.cuh"
#include "score.cuh"

namespace misa {

constexpr int kQueriesAlignment = 1024;  // of a wgmma operand that is swizzled by 128 bytes
constexpr int kListedTile = 64;          // tokens of a warpgroup's wgmma
static_assert(kPageBytes == 66 * kHeadDim, "see score_slots");

// The first such address in `room`, which has kQueriesAlignment bytes more than the queries.
__device__ __forceinline__ void* aligned(void* room) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(room);
  return (char*)room + (kQueriesAlignment - address % kQueriesAlignment) % kQueriesAlignment;
}

// The order of a key's bytes, for which any will do as long as queries have the same: of the 32 bytes that a lane of a quad multiplies,
// it loads two pieces of 16, at quad * 16 and at 64 + quad * 16. A wgmma takes 8 bytes of a lane: step j of four takes words j % 2 * 2
// and j % 2 * 2 + 1 of piece j / 2, for bytes quad * 4 .. + 3 of its first and of its second half.
//
// The queries of a row, HEADS of 128 bytes, in that order to shared memory, whose rows are swizzled by 128 bytes. A barrier must follow.
template <int HEADS, int THREADS>
__device__ __forceinline__ void copy_queries_in_quads(const void* q, void* q_room) {
  char* const q_shared = (char*)aligned(q_room);
#pragma unroll
  for (int i = threadIdx.x; i < HEADS * 8; i += THREADS) {
    const int head = i / 8, step = i % 8 / 2, half = i % 2;
    const unsigned* from = (const unsigned*)q + head * 32 + step / 2 * 16 + step % 2 * 2 + half;
    const uint4 piece = {from[0], from[4], from[8], from[12]};
    *reinterpret_cast<uint4*>(q_shared + head * kHeadDim + (i % 8 ^ head % 8) * 16) = piece;
  }
  fence_async();
}

// The descriptor of `HEADS` such rows, which a wgmma takes 32 bytes of at a time: + 2 for each step.
__device__ __forceinline__ unsigned long long queries_descriptor(const void* q_shared) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(q_shared);
  // Swizzle of 128 bytes; 1024 bytes from eight rows to the next; addresses in sixteens.
  return 1ull << 62 | (unsigned long long)(1024 / 16) << 32 | 1ull << 16 | (address & 0x3ffff) / 16;
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_end() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// acc = a . b of 64 tokens and N heads over 32 bytes, added to acc where `add`. a: rows lane / 4 and + 8 of the warp, bytes
// lane % 4 * 4 .. + 3 of the first half, then both of the second half.
template <int N>
__device__ __forceinline__ void wgmma(float* acc, const unsigned* a, unsigned long long b, bool add);

template <>
__device__ __forceinline__ void wgmma<32>(float* acc, const unsigned* a, unsigned long long b, bool add) {
  asm volatile(
      "{.reg .pred p;\n"
      "setp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, p, 1, 1;}\n"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]), "+f"(acc[4]), "+f"(acc[5]), "+f"(acc[6]), "+f"(acc[7]),
        "+f"(acc[8]), "+f"(acc[9]), "+f"(acc[10]), "+f"(acc[11]), "+f"(acc[12]), "+f"(acc[13]), "+f"(acc[14]),
        "+f"(acc[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
}

template <>
__device__ __forceinline__ void wgmma<64>(float* acc, const unsigned* a, unsigned long long b, bool add) {
  asm volatile(
      "{.reg .pred p;\n"
      "setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1;}\n"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]), "+f"(acc[4]), "+f"(acc[5]), "+f"(acc[6]), "+f"(acc[7]),
        "+f"(acc[8]), "+f"(acc[9]), "+f"(acc[10]), "+f"(acc[11]), "+f"(acc[12]), "+f"(acc[13]), "+f"(acc[14]),
        "+f"(acc[15]), "+f"(acc[16]), "+f"(acc[17]), "+f"(acc[18]), "+f"(acc[19]), "+f"(acc[20]), "+f"(acc[21]),
        "+f"(acc[22]), "+f"(acc[23]), "+f"(acc[24]), "+f"(acc[25]), "+f"(acc[26]), "+f"(acc[27]), "+f"(acc[28]),
        "+f"(acc[29]), "+f"(acc[30]), "+f"(acc[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
}

// The scores of a thread's two tokens: a lane adds its heads in ascending order, then the four lanes of a quad add their sums, 0 + 1 and
// 2 + 3 first. acc: of an m64 wgmma whose columns are the heads; gates: theirs, in shared memory; out[rr]: of row rr * 8 + lane / 4, in
// every lane. x + |x| is 2 relu(x), see sum_heads.
template <int HEADS>
__device__ __forceinline__ void sum_heads_of_quad(const float* acc, const float2* gates, const float* scale,
                                                  float* out) {
  float sum[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < HEADS / 8; ++i) {
    const float2 gate = gates[i * 4 + threadIdx.x % 4];
#pragma unroll
    for (int rr = 0; rr < 2; ++rr) {
      const float first = acc[i * 4 + rr * 2], second = acc[i * 4 + rr * 2 + 1];
      sum[rr] = fmaf(gate.x, first + fabsf(first), sum[rr]);
      sum[rr] = fmaf(gate.y, second + fabsf(second), sum[rr]);
    }
  }
#pragma unroll
  for (int rr = 0; rr < 2; ++rr) {
    sum[rr] += __shfl_xor_sync(0xffffffffu, sum[rr], 1);
    sum[rr] += __shfl_xor_sync(0xffffffffu, sum[rr], 2);
    out[rr] = sum[rr] * (0.5f * scale[rr]);
  }
}

// Scores the first `count` listed tokens: an entry of `scores` is a token's slot of the cache before, and its score as an ordered key after.
// Each warp reads and writes the entries of its own tokens. q_room: what copy_queries_in_quads left; gates: of all heads, 8-byte aligned.
// Begins and ends with a barrier.
template <int HEADS, int THREADS>
__device__ __forceinline__ void score_slots(const void* keys, const void* scales, unsigned* scores, int count,
                                            void* q_room, const void* gates) {
  constexpr int kTogether = THREADS / 128 * kListedTile;  // tokens of all warpgroups
  fill_last_tile<THREADS, kTogether>(scores, count);
  const int quad = threadIdx.x % 4;
  unsigned* const mine = scores + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const unsigned long long queries = queries_descriptor(aligned(q_room));
  const char* pieces = (const char*)keys + quad * 16;
  long long to_scales = (const char*)scales - pieces;
  // Kept as they are: the compiler would make them anew, of their parts, for each address.
  asm("" : "+l"(pieces), "+l"(to_scales));
  uint4 key[2][2];
  float scale[2], acc[HEADS / 2];
#pragma unroll
  for (int i = 0; i < HEADS / 2; ++i) acc[i] = 0.f;
  const auto load = [&](int first) {
#pragma unroll
    for (int rr = 0; rr < 2; ++rr) {
      const unsigned slot = mine[first + rr * 8];
      // A page is 66 rows of 128 bytes, 64 of keys and 2 of scales.
      const char* from = pieces + (unsigned long long)(slot + slot / kPage * 2) * kHeadDim;
      asm("" : "+l"(from));
      key[rr][0] = __ldg((const uint4*)from);
      key[rr][1] = __ldg((const uint4*)(from + 64));
      scale[rr] = __ldg((const float*)(from + to_scales - (int)(slot % kPage) * (kHeadDim - 4)));
    }
  };
  const int last = (count - 1) / kTogether * kTogether;
  if (count > 0) load(0);
#pragma unroll 1
  for (int first = 0; first < count; first += kTogether) {
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint4 low = key[0][step / 2], high = key[1][step / 2];
      const unsigned a[4] = {step % 2 ? low.z : low.x, step % 2 ? high.z : high.x, step % 2 ? low.w : low.y,
                             step % 2 ? high.w : high.y};
      wgmma<HEADS>(acc, a, queries + 2 * step, step > 0);
    }
    wgmma_end();
    const float of_tile[2] = {scale[0], scale[1]};
    // Under way while the heads are summed; the last ones come again, which spares a branch.
    load(min(first + kTogether, last));
    float score[2];
    sum_heads_of_quad<HEADS>(acc, (const float2*)gates, of_tile, score);
    if (quad == 0) {
#pragma unroll
      for (int rr = 0; rr < 2; ++rr) mine[first + rr * 8] = ordered(score[rr]);
    }
  }
  __syncthreads();
}

}  // namespace misa
