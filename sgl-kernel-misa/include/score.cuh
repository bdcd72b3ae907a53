// The epilogue of scoring: the sum over heads in the registers of a wgmma accumulator.
#pragma once

#include "barrier.cuh"
#include "cta.cuh"
#include "layout.cuh"

namespace misa {

// Why this is CUDA: TileLang's reduction over a reshaped fragment goes through shuffles and shared memory. With the columns
// in the order below one thread owns all heads of a query, so its sum needs neither, and stays in the order of the heads.
//
// Column g * 4 * HEADS + i * 8 + t * 2 + b of the tile holds query g * 4 + t, head i * 2 + b (t, b: lane % 4, register).
// acc is the accumulator of an m64 wgmma, rows `warp * 16 + rr * 8 + lane / 4`; out[g * 2 + rr] is the score of that row's
// token for query g * 4 + lane % 4.
//
// x + |x| is 2 relu(x), exactly, and runs at twice the rate of max(x, 0); the scale takes the 2 back. The last slot may be the
// shared head's, which has no relu: `rectified` is 1 where it has one, and 0 where not.
template <int HEADS, int GROUPS>
__device__ __forceinline__ void sum_heads(const float* acc, const float* weights, const float* scale, float rectified,
                                          float* out) {
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
    for (int rr = 0; rr < 2; ++rr) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < HEADS / 2; ++i) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const float dot = acc[(g * (HEADS / 2) + i) * 4 + rr * 2 + b];
          const bool last = i * 2 + b == HEADS - 1;
          sum = fmaf(weights[g * HEADS + i * 2 + b], last ? fmaf(rectified, fabsf(dot), dot) : dot + fabsf(dot), sum);
        }
      }
      out[g * 2 + rr] = sum * (0.5f * scale[rr]);
    }
  }
}

// A threshold that scores are compared with by the sign of a difference: 0 instead of -0, which would be less than it.
__device__ __forceinline__ float as_threshold(float threshold) { return threshold + 0.f; }

// The highest number below a threshold, or -inf: scores that are over it reach the threshold. (A score of -inf is over none, whatever the
// threshold; it counts as below, where it belongs if any does.)
__device__ __forceinline__ float below_threshold(float threshold) {
  return from_ordered(max(key_below(ordered(threshold)), kLeastNumber));
}

// Adds one page's scores to a lane's words of two bit planes, words[g] and words[GROUPS + g]: bits 11 for scores over high[g],
// 10 for others over middle[g], 01 for others over below[g]; they come in at the bottom. A difference with what is not a number, also that of
// equal infinities, has no sign, and passes no comparison.
template <int GROUPS>
__device__ __forceinline__ void mark_page(const float* score, const float* high, const float* middle,
                                          const float* below, unsigned* words) {
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
    for (int rr = 0; rr < 2; ++rr) {
      const float value = score[g * 2 + rr];
      const unsigned over_high = __float_as_uint(high[g] - value), over_middle = __float_as_uint(middle[g] - value),
                     over_low = __float_as_uint(below[g] - value);
      words[g] = __funnelshift_l(over_middle, words[g], 1);
      words[GROUPS + g] = __funnelshift_l(over_high ^ over_middle ^ over_low, words[GROUPS + g], 1);
    }
  }
}

// A word of a plane, of what came in from its first `pages` pages; the bits of others are clear.
__device__ __forceinline__ unsigned word_of_pages(unsigned marks, int pages) {
  return __brev(marks) >> (32 - 2 * pages);
}

// Scores of tokens that a query does not see become NaN, which passes no comparison; of forced tokens (the first `init` and
// the last `local` that it sees) +inf. token is the position of row 0 of the accumulator's lane.
template <int GROUPS>
__device__ __forceinline__ void mask_page(float* score, const int* length, int token, int init, int local) {
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
    for (int rr = 0; rr < 2; ++rr) {
      const int position = token + rr * 8;
      if (position < init || position >= length[g] - local) score[g * 2 + rr] = __int_as_float(0x7f800000);
      if (position >= length[g]) score[g * 2 + rr] = __int_as_float(0x7fffffff);
    }
  }
}

}  // namespace misa
