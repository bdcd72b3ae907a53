// The sampled router: which heads score a row, and the shared head that stands for the lines of all others.
//
// Why this is CUDA: every sum here is taken over the registers of a wgmma accumulator and then over the lanes that share one
// of its rows. TileLang's reductions go through shared memory, and the bits must not depend on how it lays them out.
#pragma once

#include <cuda_fp8.h>

#include "gather.cuh"
#include "route.cuh"

namespace misa {

constexpr int kSamples = 256;        // the most that stand for a prefix
constexpr int kRouterThreads = 128;  // one warpgroup
constexpr int kColumns = 64;         // heads of the wgmma

// log2 of the tokens that one sample stands for: the least with which at most kSamples stand for all.
__device__ __forceinline__ int sample_stride_shift(int length) {
  return 32 - __clz((unsigned)max(length - 1, 0) / kSamples);
}

// Position of sample i, one token of every 1 << shift: which one changes from stride to stride, so that no period in the text
// can follow, and is never the first token of a prefix with a stride.
__device__ __forceinline__ int routing_sample_position(int i, int shift) {
  return shift == 0 ? i : (i << shift) + (int)((unsigned)(i + 1) * 2654435761u >> (32 - shift));
}

// Copies the keys and scales of samples 0 .. kSamples - 1 of a sequence and waits for them. Past sample `last` that one again:
// what is behind it may not have been stored yet. Two barriers must enclose this.
__device__ __forceinline__ void copy_samples(const void* keys, const void* scales, const int* pages, int shift,
                                             int last, void* k_shared, float* s_shared) {
  const auto slot_of_sample = [&](int i) { return slot_of(routing_sample_position(min(i, last), shift), pages); };
  const int row = threadIdx.x / 8, piece = threadIdx.x % 8;
  const char* const from = (const char*)keys + piece * 16;
  char* const to = (char*)k_shared + row * kHeadDim + (piece ^ row % 8) * 16;
#pragma unroll
  for (int i = 0; i < kSamples; i += kRouterThreads / 8)
    cp_async_16(to + i * kHeadDim, from + key_offset(slot_of_sample(i + row)));
#pragma unroll
  for (int i = threadIdx.x; i < kSamples; i += kRouterThreads) {
    cp_async_4(s_shared + i, (const char*)scales + scale_offset(slot_of_sample(i)));
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  fence_async();
}

// Begins to copy a row's queries to 64 rows of `q_shared`, where TileLang's wgmma reads them; fewer heads come twice. Closes a
// group of copies.
template <int HEADS>
__device__ __forceinline__ void copy_heads(const void* q_row, void* q_shared) {
  const int row = threadIdx.x / 8, piece = threadIdx.x % 8;
#pragma unroll
  for (int i = 0; i < kColumns; i += kRouterThreads / 8) {
    cp_async_16((char*)q_shared + (i + row) * kHeadDim + (piece ^ row % 8) * 16,
                (const char*)q_row + ((i + row) % HEADS) * kHeadDim + piece * 16);
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Sums over a head's samples x, those above 0 and the others apart: what decides between a line and a relu is then never the
// small difference of two large sums.
struct Moments {
  float above, above_squares, below, below_squares;
};

// c, the slope of the least-squares line through relu(x), and |w| times what the line leaves unsaid, by the sums over n samples.
// relu is a line where all samples are on one side of 0. Moments are float64, which cancels nothing that the sums hold; the
// quotient and the root are not.
__device__ __forceinline__ void fit_line(Moments sums, int n, float weight, float& slope, float& estimate) {
  slope = sums.above > 0.f ? 1.f : 0.f;
  estimate = 0.f;
  if (sums.above == 0.f || sums.below == 0.f) return;
  // relu(x) = r, x = r + m, and r m = 0; all times n squared.
  const double r = sums.above, m = sums.below, cov = -r * m;
  const double var_r = (double)n * sums.above_squares - r * r, var_m = (double)n * sums.below_squares - m * m;
  slope = (float)(var_r + cov) / (float)(var_r + var_m + 2 * cov);
  // relu(x) - c x = (1 - c) r - c m
  const double c = slope, rest = (1 - c) * (1 - c) * var_r + c * c * var_m - 2 * c * (1 - c) * cov;
  estimate = fabsf(weight) * (sqrtf(fmaxf((float)rest, 0.f)) / (float)n);
}

// The power of two that takes the largest scale of a row's samples to 1 .. 2, so that no square overflows: slopes do not depend on
// it, and the order of the estimates does not either. Every lane of a warp must call this.
__device__ __forceinline__ float common_scale(const float* scales, int n) {
  float largest = 0.f;
#pragma unroll
  for (int i = threadIdx.x % 32; i < kSamples; i += 32) largest = fmaxf(largest, i < n ? scales[i] : 0.f);
  const int exponent =
      (int)(__reduce_max_sync(0xffffffffu, __float_as_uint(largest)) >> 23);  // biased; scales are positive
  return __uint_as_float((unsigned)(254 - min(max(exponent, 1), 253)) << 23);
}

// Writes the scales of n samples, times `common_scale`, and zeros behind them, to `scaled`. Two barriers must enclose this.
__device__ __forceinline__ void scale_samples(const float* scales, int n, float* scaled) {
  const float common = common_scale(scales, n);
#pragma unroll
  for (int i = threadIdx.x; i < kSamples; i += kRouterThreads) scaled[i] = i < n ? scales[i] * common : 0.f;
}

// The slopes of HEADS heads, and their estimates as keys (`head_key`), from an m64 accumulator of their dot products with the
// samples, of which the row has n. scaled: what `scale_samples` wrote, 8-byte aligned.
// A NaN or the product of a sample that the row does not have counts as nothing.
template <int HEADS>
__device__ __forceinline__ void fit_lines(const float* acc, const float* scaled, int n, const float* weights,
                                          float* slopes, unsigned* ranked) {
  const int lane = threadIdx.x % 32;
  // Two lanes of the quad fit one head each, in the end. Its weight is on its way from here on.
  const int head = threadIdx.x / 32 * 16 + lane / 4 + lane % 4 * 8;
  const bool fits = lane % 4 < 2 && head < HEADS;
  const float weight = fits ? weights[head] : 0.f;
  Moments sums[2] = {};
#pragma unroll
  for (int i = 0; i < kSamples / 8; ++i) {
    const float2 pair = *reinterpret_cast<const float2*>(scaled + i * 8 + lane % 4 * 2);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
#pragma unroll
      for (int rr = 0; rr < 2; ++rr) {
        const float x = (b ? pair.y : pair.x) * acc[i * 4 + rr * 2 + b], r = fmaxf(x, 0.f), m = fminf(x, 0.f);
        sums[rr].above += r;
        sums[rr].above_squares = fmaf(r, r, sums[rr].above_squares);
        sums[rr].below += m;
        sums[rr].below_squares = fmaf(m, m, sums[rr].below_squares);
      }
    }
  }
#pragma unroll
  for (int rr = 0; rr < 2; ++rr) {
    sums[rr].above = quad_sum(sums[rr].above);
    sums[rr].above_squares = quad_sum(sums[rr].above_squares);
    sums[rr].below = quad_sum(sums[rr].below);
    sums[rr].below_squares = quad_sum(sums[rr].below_squares);
  }
  if (fits) {
    const bool first = lane % 4 == 0;
    const Moments mine = {first ? sums[0].above : sums[1].above, first ? sums[0].above_squares : sums[1].above_squares,
                          first ? sums[0].below : sums[1].below, first ? sums[0].below_squares : sums[1].below_squares};
    float estimate;
    fit_line(mine, n, weight, slopes[head], estimate);
    ranked[head] = head_key(estimate);
  }
}

__device__ __forceinline__ float2 from_e4m3x2(unsigned short pair) {
  const __half2 halves(__nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)pair, __NV_E4M3));
  return __half22float2(halves);
}

// The least power of two, from 2^-126 on, with which no |u| up to `largest` is above 448 = 1.75 * 2^8, the largest e4m3 number;
// 1 for 0.
__device__ __forceinline__ float shared_scale_of(float largest) {
  if (!(largest > 0.f)) return 1.f;
  const unsigned bits = __float_as_uint(largest);
  const int exponent = (int)(bits >> 23) - 8 + ((bits & 0x7fffffu) > 0x600000u);  // of the scale, biased
  return __uint_as_float((unsigned)min(max(exponent, 1), 254) << 23);
}

// u = the sum of slope * weight * query over the heads that are not in `routed`, a bit a head; as FP8 with its scale. The heads
// are taken in four parts of ascending heads, whose sums are added in the order of the parts. sums: 4 * 128 floats; factors: 64;
// largest: 4. Every thread must call this; `slopes` and `routed` are there.
template <int HEADS>
__device__ __forceinline__ void share_lines(const void* q_shared, const float* weights, const float* slopes,
                                            const unsigned* routed, float* factors, float* sums, float* largest,
                                            void* shared_q, float* shared_scale) {
  static_assert(kRouterThreads == kHeadDim, "a thread a dimension, four dimensions a lane");
  constexpr int kPart = HEADS / (kRouterThreads / 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x < HEADS) {
    const bool alone = routed[threadIdx.x / 32] >> threadIdx.x % 32 & 1;
    factors[threadIdx.x] = alone ? 0.f : slopes[threadIdx.x] * weights[threadIdx.x];
  }
  __syncthreads();
  // Four dimensions a lane.
  float u[4] = {};
#pragma unroll 4
  for (int j = warp * kPart; j < (warp + 1) * kPart; ++j) {
    const int at = j * kHeadDim + ((lane / 4) ^ j % 8) * 16 + lane % 4 * 4;
    const unsigned four = *reinterpret_cast<const unsigned*>((const char*)q_shared + at);
    const float2 low = from_e4m3x2((unsigned short)(four & 0xffffu)), high = from_e4m3x2((unsigned short)(four >> 16));
    const float factor = factors[j];
    u[0] = fmaf(factor, low.x, u[0]);
    u[1] = fmaf(factor, low.y, u[1]);
    u[2] = fmaf(factor, high.x, u[2]);
    u[3] = fmaf(factor, high.y, u[3]);
  }
  *reinterpret_cast<float4*>(sums + warp * kHeadDim + lane * 4) = make_float4(u[0], u[1], u[2], u[3]);
  __syncthreads();
  const int d = threadIdx.x;
  const float mine = ((sums[d] + sums[kHeadDim + d]) + sums[2 * kHeadDim + d]) + sums[3 * kHeadDim + d];
  const unsigned most = __reduce_max_sync(0xffffffffu, __float_as_uint(fabsf(mine)));  // bits order as magnitudes do
  if (lane == 0) largest[warp] = __uint_as_float(most);
  __syncthreads();
  const float scale = shared_scale_of(fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3])));
  // Exact: a division by a power of two.
  ((__nv_fp8_storage_t*)shared_q)[d] = __nv_cvt_float_to_fp8(mine / scale, __NV_SATFINITE, __NV_E4M3);
  if (d == 0) *shared_scale = scale;
}

// What a row that sees nothing gets: the first heads, and a shared head that is 0.
__device__ __forceinline__ void route_nothing(int count, int* heads, void* shared_q, float* shared_scale) {
  if ((int)threadIdx.x < count) heads[threadIdx.x] = threadIdx.x;
  ((__nv_fp8_storage_t*)shared_q)[threadIdx.x] = 0;
  if (threadIdx.x == 0) *shared_scale = 1.f;
}

}  // namespace misa
