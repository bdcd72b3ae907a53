// The epilogue of scoring: the sum over heads in the registers of a wgmma accumulator.
#pragma once

#include "barrier.cuh"
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

// Adds one page's scores to a lane's words of two bit planes, words[g] and words[GROUPS + g]: bits 11 for scores over high[g],
// 10 for others over middle[g], 01 for others not under low[g]. first_bit is 1 << 2 * (page % 16).
template <int GROUPS>
__device__ __forceinline__ void mark_page(const float* score, const float* high, const float* middle, const float* low,
                                          unsigned first_bit, unsigned* words) {
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
    for (int rr = 0; rr < 2; ++rr) {
      const float value = score[g * 2 + rr];
      if (value > middle[g]) words[g] |= first_bit << rr;
      if ((value > high[g]) ^ (value > middle[g]) ^ (value >= low[g])) words[GROUPS + g] |= first_bit << rr;
    }
  }
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
