// Order statistics of a row's sampled scores.
//
// Why this is CUDA: TileLang has no digit of a key, and its reductions do not find a bin; and this compiles with g++ too, for the
// emulator.
#pragma once

#include "cta.cuh"

namespace misa {

// Bins of a histogram: there are two, and up to some thousand samples clearing and scanning them is most of the work.
constexpr int kThresholdDigit = 10;
constexpr int kThresholdBins = 1 << kThresholdDigit;

// The samples that reach the k-th largest of `length` scores: their expected number, and its standard deviation.
__device__ __forceinline__ float expected_rank(int samples, int length, int k) { return (float)k * samples / length; }
__device__ __forceinline__ float rank_deviation(int samples, int length, int k) {
  return sqrtf(expected_rank(samples, length, k) * (1.f - (float)k / length));
}

// The ranks of the samples between which the k-th largest of `length` scores lies: so many standard deviations up, five
// down. The k-th score under the low threshold costs `select` a pass over all tokens, above the high one next to nothing
// as long as its candidates fit on the chip.
__device__ __forceinline__ void sample_ranks(int samples, int length, int k, float deviations, int& high, int& low) {
  const float expected = expected_rank(samples, length, k), deviation = rank_deviation(samples, length, k);
  high = (int)(expected - deviations * deviation - 4.f);
  low = (int)(expected + 5.f * deviation + 5.f);
}

// A score between the two, about half a standard deviation under the expected k-th one: there the candidates of either side
// are fewest on average. The ranks of scores in a tail grow exponentially, near enough; where it is put is of no
// consequence but for time.
__device__ __forceinline__ float middle_threshold(int samples, int length, int k, int high_rank, int low_rank,
                                                  float high, float low) {
  const float rank = expected_rank(samples, length, k) + 0.5f * rank_deviation(samples, length, k);
  const float share = logf(low_rank / rank) / logf((float)low_rank / high_rank);
  return fminf(fmaxf(low + (high - low) * share, low), high);
}

// Two bins at once: that of the `high_need`-th largest entry of one histogram and that of the `low_need`-th of another, which
// may be the same one; both 16-byte aligned and with as many entries. result: bin, entries above it and entries in it, of each.
template <int THREADS>
__device__ __forceinline__ void find_two_bins(const int* high_bins, const int* low_bins, int high_need, int low_need,
                                              unsigned long long* scratch, int* result) {
  constexpr int kPer = kThresholdBins / THREADS;
  static_assert(kPer % 4 == 0, "a thread reads its bins four at a time");
  const int first = kThresholdBins - kPer * (threadIdx.x + 1);  // threads take the bins in descending order
  int high[kPer], low[kPer];
#pragma unroll
  for (int i = 0; i < kPer; i += 4) {
    *reinterpret_cast<int4*>(high + i) = *reinterpret_cast<const int4*>(high_bins + first + i);
    *reinterpret_cast<int4*>(low + i) = *reinterpret_cast<const int4*>(low_bins + first + i);
  }
  // The two sums share one scan, 32 bits each.
  unsigned long long mine = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) mine += (unsigned long long)low[i] << 32 | (unsigned)high[i];
  unsigned long long inclusive = mine;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const unsigned long long other = __shfl_up_sync(0xffffffffu, inclusive, offset);
    if ((threadIdx.x & 31) >= offset) inclusive += other;
  }
  if ((threadIdx.x & 31) == 31) scratch[threadIdx.x / 32] = inclusive;
  __syncthreads();
  unsigned long long before = inclusive - mine;
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) {
    if (i < threadIdx.x / 32) before += scratch[i];
  }
  int high_above = (int)(unsigned)before, low_above = (int)(before >> 32);
#pragma unroll
  for (int i = kPer - 1; i >= 0; --i) {
    if (high_above < high_need && high_above + high[i] >= high_need) {  // of all bins, one
      result[0] = first + i;
      result[1] = high_above;
      result[2] = high[i];
    }
    if (low_above < low_need && low_above + low[i] >= low_need) {
      result[3] = first + i;
      result[4] = low_above;
      result[5] = low[i];
    }
    high_above += high[i];
    low_above += low[i];
  }
  __syncthreads();
}

// Counts samples by the next `width` bits of their keys, those above bit `left`: where the bits before are those of `high` in one
// histogram, else where they are those of `low` in another. FIRST: there are none before.
template <int THREADS, bool FIRST>
__device__ __forceinline__ void count_samples(const float* scores, int samples, int left, int width, unsigned high,
                                              unsigned low, int* high_bins, int* low_bins) {
  constexpr int kBatch = 2048 / THREADS;
  for (int first = threadIdx.x; first < samples; first += THREADS * kBatch) {
    float value[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = first + u * THREADS;
      value[u] = i < samples ? scores[i] : 0.f;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const unsigned key = ordered(value[u]) >> left;
      const unsigned prefix = FIRST ? high : key >> width, bin = key & ((1u << width) - 1);
      int* const bins = prefix == high ? high_bins : low_bins;
      if (first + u * THREADS < samples && (prefix == high || prefix == low)) atomicAdd(&bins[bin], 1);
    }
  }
}

// out[0]: a score that fewer than k of the row's scores should exceed; out[2]: one that at least k should reach; out[1]: one
// between them. A misjudgement costs time in `select`, nothing else. All the same: the scores that reach it are equal to it
// or above.
//
// Two passes find the first 20 bits of the two outer scores, whose lower and upper edge do as well. More passes find the rest
// where very many samples share those bits: then very many tokens may have one and the same score, a plateau, and `select` could
// not list them all. room: samples whose tokens it can list. What lies between the middle and an outer threshold leaves room for a
// plateau of `many` samples; a larger one at an edge is kept apart from the scores inside of the bracket:
// - if the k-th score is surely not in it, it is left out: the threshold goes to its inner side;
// - else the middle threshold goes to its inner side: what lies between these two is the plateau and nothing else, and `classify`
//   knows that it needs no second look.
// With such a plateau at either edge, the k-th score is sooner to be expected in the one that holds its rank of the samples.
//
// bins: 2 * kThresholdBins, scratch: kScratch ints; both 16-byte aligned.
template <int THREADS>
__device__ __forceinline__ void thresholds(const float* scores, int length, int k, int shift, int deviations, int room,
                                           int* bins, int* scratch, float* out) {
  int* const low_bins = bins + kThresholdBins;
  int* const result = scratch + 32;
  // Samples are in the order of their positions.
  int samples = length >> shift;
  if (sample_position(samples, shift) < length) ++samples;
  int high_rank, low_rank;
  sample_ranks(samples, length, k, deviations, high_rank, low_rank);
  const bool no_high = high_rank<1, no_low = low_rank> samples;
  high_rank = max(high_rank, 1);
  low_rank = min(low_rank, samples);
  int high_need = high_rank, low_need = low_rank, left = 32;
  unsigned high = 0, low = 0;
  const float rank = expected_rank(samples, length, k), deviation = rank_deviation(samples, length, k);
  const int many = max((int)(0.75f * room - 6.5f * deviation - 8.f), 16);
  bool high_tied = false, low_tied = false;
#pragma unroll 1
  for (int digit = 0; digit < 2 || ((high == low || high_tied || low_tied) && left > 0); ++digit) {
    const int width = min(left, kThresholdDigit);
    left -= width;
    const bool apart = high != low;
    clear_bins<THREADS>(bins, 2 * kThresholdBins);
    __syncthreads();
    if (digit == 0) {
      count_samples<THREADS, true>(scores, samples, 32 - kThresholdDigit, kThresholdDigit, high, low, bins, low_bins);
    } else {
      count_samples<THREADS, false>(scores, samples, left, width, high, low, bins, low_bins);
    }
    __syncthreads();
    find_two_bins<THREADS>(bins, apart ? low_bins : bins, high_need, low_need,
                           reinterpret_cast<unsigned long long*>(scratch), result);
    high = high << width | (unsigned)result[0];
    high_need -= result[1];
    low = low << width | (unsigned)result[3];
    low_need -= result[4];
    high_tied = result[2] > many;
    low_tied = result[5] > many;
  }
  if (threadIdx.x == 0) {
    // Samples above the low plateau, and those that reach the high one.
    const int above_low = low_rank - low_need, reach_high = high_rank - high_need + result[2];
    unsigned upper_key = high << left | ((1u << left) - 1), lower_key = low << left;
    high_tied = high_tied && !no_high && high > kLeastNumber && high != low;
    low_tied = low_tied && !no_low;
    if (high_tied && reach_high <= rank - 3.f * deviation) {
      upper_key = key_below(high);
      high_rank = reach_high;
      high_tied = false;
    }
    if (low_tied && above_low >= rank + 4.f * deviation) {
      lower_key = key_above(low);
      low_rank = above_low;
      low_tied = false;
    }
    // Numbers, whatever the samples and the bits not looked at are: between thresholds that are not, planes mean nothing.
    const float upper = from_ordered(no_high ? kInfinity : min(max(upper_key, kLeastNumber), kInfinity));
    const float lower = from_ordered(no_low ? kLeastNumber : min(max(lower_key, kLeastNumber), kInfinity));
    float middle = upper;
    if (low_tied) {
      middle = lower;
    } else if (!no_high && !no_low) {
      middle = middle_threshold(samples, length, k, high_rank, low_rank, upper, lower);
    }
    if (high_tied && (!low_tied || reach_high >= rank)) middle = from_ordered(key_below(high));
    out[0] = upper;
    out[1] = middle;
    out[2] = lower;
  }
}

}  // namespace misa
