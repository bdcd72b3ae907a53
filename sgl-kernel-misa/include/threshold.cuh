// Two order statistics of a row's sampled scores.
#pragma once

#include "block.cuh"

namespace misa {

// The ranks of the samples between which the k-th largest of `length` scores lies, 5 standard deviations either way.
__device__ __forceinline__ void sample_ranks(int samples, int length, int k, int& high, int& low) {
  const float expected = (float)k * samples / length;
  const float margin = 5.f * sqrtf(expected) + 4.f;
  high = (int)(expected - margin);
  low = (int)(expected + margin) + 1;
}

// out[0]: a score that fewer than k of the row's scores should exceed; out[1]: one that at least k should reach.
// A misjudgement costs time in `select`, nothing else. Entries equal to both are known to tie.
template <int THREADS>
__device__ __forceinline__ void thresholds(const float* scores, int length, int k, int* bins, int* scratch, float* out) {
  // Samples are in the order of their positions.
  int samples = length / kSampleStride;
  if (sample_position(samples) < length) ++samples;
  int ranks[2];
  sample_ranks(samples, length, k, ranks[0], ranks[1]);
  for (int side = 0; side < 2; ++side) {
    const int rank = ranks[side];
    if (rank < 1 || rank > samples) {
      if (threadIdx.x == 0) out[side] = __int_as_float(rank < 1 ? 0x7f800000 : 0xff800000);
      continue;
    }
    unsigned prefix = 0;
    int need = rank;
#pragma unroll
    for (int digit = 0; digit < 3; ++digit) {
      const int width = digit < 2 ? 11 : 10, shift = digit < 2 ? 21 - 11 * digit : 0;
      __syncthreads();
      clear_bins<THREADS>(bins);
      __syncthreads();
#pragma unroll 4
      for (int i = threadIdx.x; i < samples; i += THREADS) {
        const unsigned key = ordered(scores[i]);
        if (digit == 0 || key >> (shift + width) == prefix) atomicAdd(&bins[key >> shift & ((1u << width) - 1)], 1);
      }
      __syncthreads();
      find_bin<THREADS>(bins, need, scratch, scratch + 32);
      prefix = prefix << width | (unsigned)scratch[32];
      need -= scratch[33];
    }
    if (threadIdx.x == 0) out[side] = from_ordered(prefix);
  }
}

}  // namespace misa
