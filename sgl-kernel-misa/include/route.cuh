// The last steps of routing: estimates to heads.
#pragma once

#include "barrier.cuh"

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

// The `count` heads of largest estimate, ascending; equal estimates: the lower head. Threads 0 .. 63 of a block whose
// estimates (in shared memory, `heads` of them) are written; every thread must call this.
__device__ __forceinline__ void pick_heads(const float* estimates, int heads, int count, unsigned* votes, int* out) {
  const int head = threadIdx.x;
  bool active = false;
  if (head < heads) {
    const float mine = estimates[head];
    int rank = 0;
    for (int j = 0; j < heads; ++j) rank += estimates[j] > mine || (estimates[j] == mine && j < head);
    active = rank < count;
  }
  const unsigned vote = __ballot_sync(0xffffffffu, active);
  if (head % 32 == 0 && head < 64) votes[head / 32] = vote;
  __syncthreads();
  if (active) {
    const int before = head < 32 ? 0 : __popc(votes[0]);
    out[before + __popc(vote & ((1u << head % 32) - 1))] = head;
  }
}

}  // namespace misa
