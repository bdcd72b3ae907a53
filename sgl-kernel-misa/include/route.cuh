// The last steps of routing: estimates to heads.
//
// Why this is CUDA: the sums stay in the registers of an accumulator, where TileLang reduces through shared memory, and the heads are
// picked by a function that also compiles for a CPU, where the tests' emulator runs it.
#pragma once

#include "barrier.cuh"
#include "cta.cuh"

namespace misa {

// Adds relu of a row's dot products with BLOCKS pooled keys, an m64 accumulator, to sums[rr].
template <int BLOCKS>
__device__ __forceinline__ void add_relu(const float* acc, float* sums) {
#pragma unroll
  for (int rr = 0; rr < 2; ++rr) {
#pragma unroll
    for (int i = 0; i < BLOCKS / 8; ++i) {
#pragma unroll
      for (int b = 0; b < 2; ++b) sums[rr] += fmaxf(acc[i * 4 + rr * 2 + b], 0.f);
    }
  }
}

// Sum over the four lanes that share an accumulator row, the same in all of them.
__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// An estimate's place in the order of the heads, a total order on bits: larger is better, equal is a tie. Both zeros are alike.
// What is not a number is above all numbers and equal among itself, as torch's descending sort has it.
__device__ __forceinline__ unsigned head_key(float estimate) { return estimate == estimate ? ordered(estimate) : ~0u; }

// Writes the `count` heads of the largest keys, ascending; of equal keys the lower head. Every thread of a CTA of at least 128 must call
// this. Both in shared memory: keys, of `head_key` and hence none 0, one a head, 16-byte aligned, written before a barrier; votes, 2
// words, of which the first HEADS bits say behind the barrier in here which heads these are.
//
// Keys and heads together have a strict order, so the ranks are a permutation and exactly `count` heads are
// chosen. The writes are bounded all the same.
template <int HEADS>
__device__ __forceinline__ void pick_heads(const unsigned* keys, int count, unsigned* votes, int* out) {
  static_assert(HEADS == 32 || HEADS == 64, "sixteen heads a warp, of the first two or four");
  // Two lanes a head: each compares it with half of all heads.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = warp * 16 + lane % 16, first = lane / 16 * (HEADS / 2);
  bool chosen = false;
  unsigned vote = 0;
  if (warp * 16 < HEADS) {
    const unsigned mine = keys[head];
    const int heads_before = head - first;
    int rank = 0;
#pragma unroll
    for (int i = 0; i < HEADS / 2; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(keys + first + i);
      const unsigned others[4] = {four.x, four.y, four.z, four.w};
      // Of equal keys those of the heads before it count.
#pragma unroll
      for (int u = 0; u < 4; ++u) rank += others[u] > mine - (i + u < heads_before);
    }
    rank += __shfl_xor_sync(0xffffffffu, rank, 16);
    chosen = rank < count && lane < 16;
    vote = __ballot_sync(0xffffffffu, chosen);
    if (lane == 0) reinterpret_cast<unsigned short*>(votes)[warp] = (unsigned short)vote;
  }
  __syncthreads();
  if (chosen) {
    int before = __popc(vote & ((1u << lane) - 1));
    for (int i = 0; i < warp; ++i) before += __popc(reinterpret_cast<const unsigned short*>(votes)[i]);
    if (before < count) out[before] = head;
  }
}

}  // namespace misa
