// Selection among a row's candidates by the scores of all heads.
#pragma once

#include "block.cuh"
#include "gather.cuh"

namespace misa {

// Number of entries of a list before its first -1.
template <int THREADS>
__device__ __forceinline__ int list_length(const int* list, int capacity, int* scratch) {
  int mine = 0, total;
  for (int i = threadIdx.x; i < capacity; i += THREADS) mine += list[i] >= 0;
  block_exclusive_scan<THREADS>(mine, scratch, total);
  return total;
}

// The slots of the cache of the listed positions.
template <int THREADS>
__device__ __forceinline__ void list_slots(const int* list, int count, const int* pages, unsigned* slots) {
#pragma unroll 8
  for (int i = threadIdx.x; i < count; i += THREADS) slots[i] = slot_of(list[i], pages);
}

// Selects `need` of `count` listed positions, given their scores as ordered keys, and writes them in the order of the list.
template <int THREADS>
__device__ __forceinline__ void select_listed(const int* list, const unsigned* scores, int count, int need, int* bins,
                                              int* state_, int* scratch, int form, const int* pages, int offset, int* out) {
  radix_begin(state_, need);
  const RadixState* state = radix_state(state_);
  __syncthreads();
  for (int digit = 0; digit < kDigits && !state->done; ++digit) {
    clear_bins<THREADS>(bins);
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += THREADS) radix_count(state, scores[i], list[i], bins);
    radix_advance<THREADS>(state_, bins, scratch);
  }
  // Each warp takes a contiguous part of the list: it counts its own, then writes behind those of the warps before.
  constexpr int kWarps = THREADS / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int share = (count + kWarps * 32 - 1) / (kWarps * 32) * 32;
  const int first = warp * share, last = min(first + share, count);
  int mine = 0;
#pragma unroll 4
  for (int i = first + lane; i < last; i += 32) mine += radix_selected(state, scores[i], list[i]);
  mine = __reduce_add_sync(0xffffffffu, mine);
  if (lane == 0) scratch[warp] = mine;
  __syncthreads();
  int slot = 0;
  for (int i = 0; i < warp; ++i) slot += scratch[i];
#pragma unroll 4
  for (int base = first; base < last; base += 32) {
    const int i = base + lane, position = i < last ? list[i] : 0;
    const bool selected = i < last && radix_selected(state, scores[i], position);
    const unsigned vote = __ballot_sync(0xffffffffu, selected);
    if (selected) out[slot + __popc(vote & ((1u << lane) - 1))] = output_index(position, form, pages, offset);
    slot += __popc(vote);
  }
}

}  // namespace misa
