// Selection among a row's candidates by the scores of all heads.
#pragma once

#include "block.cuh"

namespace misa {

// Number of entries of a list before its first -1.
template <int THREADS>
__device__ __forceinline__ int list_length(const int* list, int capacity, int* scratch) {
  int mine = 0, total;
  for (int i = threadIdx.x; i < capacity; i += THREADS) mine += list[i] >= 0;
  block_exclusive_scan<THREADS>(mine, scratch, total);
  return total;
}

// Selects `need` of `count` listed positions, given their scores as ordered keys, and writes them in the order of the list.
template <int THREADS>
__device__ __forceinline__ void select_listed(const int* list, const unsigned* scores, int count, int need, int* bins,
                                              int* state_, int* scratch, int form, const int* pages, int offset, int* out) {
  radix_begin(state_, need);
  const RadixState* state = radix_state(state_);
  __syncthreads();
  for (int digit = 0; digit < 5 && !state->done; ++digit) {
    clear_bins<THREADS>(bins);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS) radix_count(state, digit, entry_key(scores[i], list[i]), bins);
    radix_advance<THREADS>(state_, digit, bins, scratch);
  }
  int base = 0;
  for (int first = 0; first < count; first += THREADS) {
    const int i = first + threadIdx.x;
    const bool selected = i < count && radix_selected(state, entry_key(scores[i], list[i]));
    int total;
    const int slot = base + block_exclusive_scan<THREADS>(selected, scratch, total);
    if (selected) out[slot] = output_index(list[i], form, pages, offset);
    base += total;
  }
}

}  // namespace misa
