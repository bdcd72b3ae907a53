// Exact selection of a row's top k from its two bit planes.
#pragma once

#include "block.cuh"
#include "gather.cuh"

namespace misa {

// Words of a plane that a thread reads at a time: as many loads are under way together.
constexpr int kBatch = 8;

// What is known about a row once its bits are counted: the tokens of plane 0 ("above") are selected, and some of the
// candidates, the bits of plane 1 ("within") without those of plane 0. So they stand after scoring if the thresholds
// bracket the k-th score. If not, this makes it so: with more than k above the high threshold these become the candidates,
// with fewer than k over the low one the candidates are all the others.
// result: how many candidates there are, how many of them are to be selected, whether they are known to tie, whether they
// lie between the thresholds.
template <int THREADS>
__device__ __forceinline__ void classify(unsigned* above, unsigned* within, int words, int length, int k,
                                         const float* threshold, int* scratch, int* result) {
  int high = 0, low = 0;
  for (int first = threadIdx.x; first < words; first += THREADS * kBatch) {
    unsigned a[kBatch], b[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = first + u * THREADS;
      a[u] = i < words ? above[i] : 0;
      b[u] = i < words ? within[i] : 0;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      high += __popc(a[u]);
      low += __popc(b[u]);
    }
  }
  high = __reduce_add_sync(0xffffffffu, high);
  low = __reduce_add_sync(0xffffffffu, low);
  if (threadIdx.x % 32 == 0) {
    scratch[threadIdx.x / 32] = high;
    scratch[32 + threadIdx.x / 32] = low;
  }
  __syncthreads();
  int num_high = 0, num_low = 0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) {
    num_high += scratch[i];
    num_low += scratch[32 + i];
  }
  const bool over = num_high > k, under = !over && num_low < k;
  if (over || under) {
    for (int i = threadIdx.x; i < words; i += THREADS) {
      const unsigned known = over ? 0 : within[i];
      within[i] = over ? above[i] : plane_visible(i, length) & ~known;
      above[i] = known;
    }
  }
  if (threadIdx.x == 0) {
    result[0] = over ? num_high : under ? length - num_low : num_low - num_high;
    result[1] = over ? k : under ? k - num_low : k - num_high;
    result[2] = !over && !under && threshold[0] == threshold[1];
    result[3] = !over && !under;
  }
  __syncthreads();
}

// Appends the positions of the candidates in words [first, last) to `positions`, and their slots of the cache to `slots`;
// their number goes to *count, which the caller has cleared. The order is arbitrary.
template <int THREADS>
__device__ __forceinline__ void collect(const unsigned* above, const unsigned* within, int first, int last,
                                        const int* pages, int* positions, unsigned* slots, int* count) {
  const int lane = threadIdx.x & 31;
  for (int base = first; base < last; base += THREADS * kBatch) {
    unsigned word[kBatch];
    int mine = 0;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = base + u * THREADS + threadIdx.x;
      word[u] = i < last ? within[i] & ~above[i] : 0;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) mine += __popc(word[u]);
    const int inclusive = warp_inclusive_scan(mine);
    int slot = 0;
    if (lane == 31) slot = atomicAdd(count, inclusive);
    slot = __shfl_sync(0xffffffffu, slot, 31) + inclusive - mine;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      for (; word[u]; word[u] &= word[u] - 1) {
        const int position = plane_position(base + u * THREADS + threadIdx.x, __ffs(word[u]) - 1);
        positions[slot] = position;
        slots[slot++] = slot_of(position, pages);
      }
    }
  }
}

__device__ __forceinline__ void mark_selected(unsigned* plane, int position) {
  const int word = position / kSpan * 32 + position % kPage / 16 * 8 + position % 8;
  const int bit = position % kSpan / kPage * 2 + position % 16 / 8;
  atomicOr(&plane[word], 1u << bit);
}

// Candidates between the thresholds (bracketed) differ in fewer bits than any.
__device__ __forceinline__ void radix_begin_between(int* state, int need, bool bracketed, const float* threshold) {
  radix_begin(state, need, bracketed ? ordered(threshold[1]) : 0, bracketed ? ordered(threshold[0]) : 0xffffffffu);
}

// A digit below kDigits counts the entry, the round after that selects it if its key is among the largest.
__device__ __forceinline__ void radix_visit(int* state_, int digit, unsigned score, int position, int* bins,
                                            unsigned* selected) {
  const RadixState* state = radix_state(state_);
  if (digit < kDigits) {
    radix_count(state, score, position, bins);
  } else if (radix_selected(state, score, position)) {
    mark_selected(selected, position);
  }
}

// Writes the selected positions in ascending order: the bits of `above`, and the first `extra` candidates.
// Each warp takes a contiguous part of the spans. The words were written by this block, through L2.
template <int THREADS>
__device__ __forceinline__ void emit(const unsigned* above, const unsigned* within, int words, int extra, int form,
                                     const int* pages, int offset, int* scratch, int* out) {
  constexpr int kWarps = THREADS / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int spans = words / 32, share = (spans + kWarps - 1) / kWarps;
  const int first = min(warp * share, spans), last = min(first + share, spans);
  int selected = 0, ties = 0;
#pragma unroll 4
  for (int span = first; span < last; ++span) {
    const unsigned word = __ldcg(&above[span * 32 + lane]);
    selected += __popc(word);
    if (extra) ties += __popc(__ldcg(&within[span * 32 + lane]) & ~word);
  }
  selected = __reduce_add_sync(0xffffffffu, selected);
  ties = __reduce_add_sync(0xffffffffu, ties);
  __syncthreads();
  if (lane == 0) {
    scratch[warp] = selected;
    scratch[kWarps + warp] = ties;
  }
  __syncthreads();
  int slot = 0, before = 0;
  for (int i = 0; i < warp; ++i) {
    slot += scratch[i];
    before += scratch[kWarps + i];
  }
  slot += min(extra, before);
  int room = min(max(extra - before, 0), ties);
  unsigned next = first < last ? __ldcg(&above[first * 32 + lane]) : 0;
  for (int span = first; span < last; ++span) {
    const unsigned stored = next;
    if (span + 1 < last) next = __ldcg(&above[(span + 1) * 32 + lane]);
    unsigned word = natural_order(stored);
    if (room > 0) {  // uniform in the warp
      unsigned tied = natural_order(__ldcg(&within[span * 32 + lane]) & ~stored);
      const int inclusive = warp_inclusive_scan(__popc(tied));
      const int left = max(room - (inclusive - __popc(tied)), 0);
      while (__popc(tied) > left) tied &= ~(0x80000000u >> __clz(tied));
      word |= tied;
      room -= __shfl_sync(0xffffffffu, inclusive, 31);
    }
    const int inclusive = warp_inclusive_scan(__popc(word));
    int mine = slot + inclusive - __popc(word);
    slot += __shfl_sync(0xffffffffu, inclusive, 31);
    const int position = span * kSpan + lane * 32;
    for (; word; word &= word - 1) out[mine++] = output_index(position + __ffs(word) - 1, form, pages, offset);
  }
}

}  // namespace misa
