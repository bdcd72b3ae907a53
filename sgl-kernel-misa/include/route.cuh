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

// Writes the `count` heads of the largest keys, ascending; of equal keys the lower head. count <= heads <= 64; keys (in shared
// memory, one a head) were written before a barrier; votes: 2 words of shared memory. Every thread of a CTA of at least 64 must
// call this.
//
// Keys and heads together have a strict order, whatever the bits are, so the ranks are a permutation and exactly `count` heads are
// chosen. The writes are bounded all the same.
__device__ __forceinline__ void pick_heads(const unsigned* keys, int heads, int count, unsigned* votes, int* out) {
  const int head = threadIdx.x;
  bool chosen = false;
  if (head < heads) {
    const unsigned mine = keys[head];
    int rank = 0;
#pragma unroll 8
    for (int j = 0; j < heads; ++j) rank += keys[j] > mine || (keys[j] == mine && j < head);
    chosen = rank < count;
  }
  const unsigned vote = __ballot_sync(0xffffffffu, chosen);
  if (head % 32 == 0 && head < 64) votes[head / 32] = vote;
  __syncthreads();
  const int before = (head < 32 ? 0 : __popc(votes[0])) + __popc(vote & ((1u << head % 32) - 1));
  if (chosen && before < count) out[before] = head;
}

}  // namespace misa
