// Two order statistics of a row's sampled scores.
#pragma once

#include "block.cuh"

namespace misa {

// The ranks of the samples between which the k-th largest of `length` scores lies: so many standard deviations up, five
// down. The k-th score under the low threshold costs `select` a pass over all tokens, above the high one next to nothing
// as long as its candidates fit on the chip.
__device__ __forceinline__ void sample_ranks(int samples, int length, int k, float deviations, int& high, int& low) {
  const float expected = (float)k * samples / length;
  high = (int)(expected - deviations * sqrtf(expected) - 4.f);
  low = (int)(expected + 5.f * sqrtf(expected) + 5.f);
}

// out[0]: a score that fewer than k of the row's scores should exceed; out[1]: one that at least k should reach.
// A misjudgement costs time in `select`, nothing else. Both the same: all scores that reach it are equal to it or above.
//
// Two passes find the first 22 bits of the two scores, whose lower and upper edge do as well; only where these are the same,
// as with many equal scores, a third one finds the rest.
template <int THREADS>
__device__ __forceinline__ void thresholds(const float* scores, int length, int k, int deviations, int* bins, int* scratch,
                                           float* out) {
  constexpr int kBatch = 8;
  int* const low_bins = bins + kBins;
  // Samples are in the order of their positions.
  int samples = length / kSampleStride;
  if (sample_position(samples) < length) ++samples;
  int high_need, low_need;
  sample_ranks(samples, length, k, deviations, high_need, low_need);
  const bool no_high = high_need < 1, no_low = low_need > samples;
  high_need = max(high_need, 1);
  low_need = min(low_need, samples);
  unsigned high = 0, low = 0;
#pragma unroll 1
  for (int digit = 0; digit < 3; ++digit) {
    if (digit == 2 && high != low) break;
    const int width = digit < 2 ? 11 : 10, shift = digit < 2 ? 21 - 11 * digit : 0;
    clear_bins<THREADS>(bins, 2 * kBins);
    __syncthreads();
    for (int first = threadIdx.x; first < samples; first += THREADS * kBatch) {
      float value[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int i = first + u * THREADS;
        value[u] = i < samples ? scores[i] : 0.f;
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const unsigned key = ordered(value[u]);
        const unsigned prefix = digit ? key >> (shift + width) : 0, bin = key >> shift & ((1u << width) - 1);
        if (first + u * THREADS >= samples) continue;
        if (prefix == high) atomicAdd(&bins[bin], 1);
        if (digit && prefix == low && low != high) atomicAdd(&low_bins[bin], 1);
      }
    }
    __syncthreads();
    find_bin<THREADS>(low == high ? bins : low_bins, low_need, scratch, scratch + 32);
    const unsigned low_bin = scratch[32];
    low_need -= scratch[33];
    __syncthreads();
    find_bin<THREADS>(bins, high_need, scratch, scratch + 32);
    low = low << width | low_bin;
    high = high << width | (unsigned)scratch[32];
    high_need -= scratch[33];
    __syncthreads();
    if (digit == 2) {
      if (threadIdx.x == 0) {
        out[0] = no_high ? __int_as_float(0x7f800000) : from_ordered(high);
        out[1] = no_low ? __int_as_float(0xff800000) : from_ordered(low);
      }
      return;
    }
  }
  if (threadIdx.x == 0) {
    out[0] = no_high ? __int_as_float(0x7f800000) : from_ordered(high << 10 | 0x3ffu);
    out[1] = no_low ? __int_as_float(0xff800000) : from_ordered(low << 10);
  }
}

}  // namespace misa
