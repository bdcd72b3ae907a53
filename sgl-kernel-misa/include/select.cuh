// Exact selection of a row's top k from its two bit planes.
#pragma once

#include "block.cuh"

namespace misa {

// Turns the planes that scoring wrote (0: above the high threshold, 1: not under the low one) into "selected" and
// "candidates", disjoint, whatever the thresholds were: with more than k above the high one these become the candidates,
// with fewer than k over the low one the candidates are all the others.
// result: how many candidates there are, how many of them are to be selected, whether they are known to tie.
template <int THREADS>
__device__ __forceinline__ void classify(unsigned* above, unsigned* within, int words, int length, int k,
                                         const float* threshold, int* scratch, int* result) {
  int high = 0, low = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < words; i += THREADS) {
    high += __popc(above[i]);
    low += __popc(within[i]);
  }
  int num_high, num_low;
  block_exclusive_scan<THREADS>(high, scratch, num_high);
  block_exclusive_scan<THREADS>(low, scratch, num_low);
  if (num_high > k) {
    for (int i = threadIdx.x; i < words; i += THREADS) {
      within[i] = above[i];
      above[i] = 0;
    }
  } else if (num_low < k) {
    for (int i = threadIdx.x; i < words; i += THREADS) {
      const unsigned known = within[i];
      within[i] = plane_visible(i, length) & ~known;
      above[i] = known;
    }
  } else {
    for (int i = threadIdx.x; i < words; i += THREADS) {
      if (above[i]) within[i] &= ~above[i];
    }
  }
  if (threadIdx.x == 0) {
    const bool over = num_high > k, under = !over && num_low < k;
    result[0] = over ? num_high : under ? length - num_low : num_low - num_high;
    result[1] = over ? k : under ? k - num_low : k - num_high;
    result[2] = !over && !under && threshold[0] == threshold[1];
  }
  __syncthreads();
}

// Appends the positions of the bits of words [first, last) to `positions`; their number goes to *count, which the caller
// has cleared. The order is arbitrary.
template <int THREADS>
__device__ __forceinline__ void collect(const unsigned* plane, int first, int last, int* positions, int* count) {
  const int lane = threadIdx.x & 31;
  for (int base = first + (threadIdx.x & ~31); base < last; base += THREADS) {
    const int i = base + lane;
    unsigned word = i < last ? plane[i] : 0;
    const int mine = __popc(word);
    const int inclusive = warp_inclusive_scan(mine);
    const int total = __shfl_sync(0xffffffffu, inclusive, 31);
    if (total == 0) continue;
    int slot = 0;
    if (lane == 31) slot = atomicAdd(count, total);
    slot = __shfl_sync(0xffffffffu, slot, 31) + inclusive - mine;
    for (; word; word &= word - 1) positions[slot++] = plane_position(i, __ffs(word) - 1);
  }
}

__device__ __forceinline__ void mark_selected(unsigned* plane, int position) {
  const int word = position / kSpan * 32 + position % kPage / 16 * 8 + position % 8;
  const int bit = position % kSpan / kPage * 2 + position % 16 / 8;
  atomicOr(&plane[word], 1u << bit);
}

// A digit below 5 counts the entry, digit 5 selects it if its key is among the largest.
__device__ __forceinline__ void radix_visit(int* state_, int digit, unsigned score, int position, int* bins,
                                            unsigned* selected) {
  const RadixState* state = radix_state(state_);
  const unsigned long long key = entry_key(score, position);
  if (digit < 5) {
    radix_count(state, digit, key, bins);
  } else if (radix_selected(state, key)) {
    mark_selected(selected, position);
  }
}

// Writes the selected positions in ascending order: the bits of `selected`, and the first `extra` ones of `candidates`.
template <int THREADS>
__device__ __forceinline__ void emit(const unsigned* selected, const unsigned* candidates, int words, int extra, int form,
                                     const int* pages, int offset, int* scratch, int* out) {
  constexpr int kWarps = THREADS / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  int base = 0, taken = 0;
  for (int first = 0; first < words; first += kWarps * 32) {
    const int i = first + threadIdx.x;
    // Written by this block, through L2.
    unsigned word = natural_order(i < words ? __ldcg(&selected[i]) : 0);
    if (extra > taken) {  // uniform
      unsigned ties = natural_order(i < words ? __ldcg(&candidates[i]) : 0);
      int total;
      int before = taken + block_exclusive_scan<THREADS>(__popc(ties), scratch, total);
      int room = extra - before;
      while (__popc(ties) > (room > 0 ? room : 0)) ties &= ~(0x80000000u >> __clz(ties));
      word |= ties;
      taken += total;
    }
    int total;
    int slot = base + block_exclusive_scan<THREADS>(__popc(word), scratch, total);
    const int position = (first / 32 + warp) * kSpan + lane * 32;
    for (; word; word &= word - 1) out[slot++] = output_index(position + __ffs(word) - 1, form, pages, offset);
    base += total;
  }
}

}  // namespace misa
