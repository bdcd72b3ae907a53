// Exact selection of a row's top k from its two bit planes.
//
// Why this is CUDA: planes are counted, listed and written by ballots, bit counts and scans of single words, for which TileLang has no
// operations; and these functions compile with g++ too, for the emulator.
#pragma once

#include "cta.cuh"
#include "gather.cuh"

namespace misa {

// Words of a plane that a thread reads at a time: as many loads are under way together.
constexpr int kBatch = 8;

// A plane as `classify` leaves it. Of two planes one is "above": the tokens to be selected whatever the candidates' scores
// are have their bits there, and candidates get theirs. The candidates are the bits of the other plane, "within", without
// those above. narrow: what is above counts only if it is within as well.
__device__ __forceinline__ unsigned selected_bits(unsigned above, unsigned within, bool narrow) {
  return narrow ? above & within : above;
}

// What is known about a row once its bits are counted. Scoring left bits 11 over the high threshold, 10 down to the middle
// one, 01 down to the low one (planes 0 and 1). So
// - with the k-th score between middle and high, plane 1 is above (narrow) and plane 0 within,
// - with the k-th score between low and middle, plane 0 is above and plane 1 within,
// - and if the thresholds do not bracket it, this rewrites the planes as in the second case: with more than k over the high
//   threshold these become the candidates, with fewer than k down to the low one the candidates are all the others.
// result: how many candidates there are, how many of them are to be selected, whether they are known to tie, and 2, 1 or 0
// for the three cases.
template <int THREADS>
__device__ __forceinline__ void classify(unsigned* plane0, unsigned* plane1, int words, int length, int k,
                                         const float* threshold, int* scratch, int* result) {
  constexpr int kWarps = THREADS / 32;
  int high = 0, middle = 0, low = 0;
  for (int first = threadIdx.x; first < words; first += THREADS * kBatch) {
    unsigned a[kBatch], b[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = first + u * THREADS;
      a[u] = i < words ? plane0[i] : 0;
      b[u] = i < words ? plane1[i] : 0;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      high += __popc(a[u] & b[u]);
      middle += __popc(a[u]);
      low += __popc(a[u] | b[u]);
    }
  }
  high = __reduce_add_sync(0xffffffffu, high);
  middle = __reduce_add_sync(0xffffffffu, middle);
  low = __reduce_add_sync(0xffffffffu, low);
  if (threadIdx.x % 32 == 0) {
    scratch[threadIdx.x / 32] = high;
    scratch[kWarps + threadIdx.x / 32] = middle;
    scratch[2 * kWarps + threadIdx.x / 32] = low;
  }
  __syncthreads();
  high = middle = low = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    high += scratch[i];
    middle += scratch[kWarps + i];
    low += scratch[2 * kWarps + i];
  }
  const bool over = high > k, under = low < k, upper = middle >= k;
  if (over || under) {
    for (int i = threadIdx.x; i < words; i += THREADS) {
      const unsigned a = plane0[i], b = plane1[i];
      plane0[i] = over ? 0 : a | b;
      plane1[i] = over ? a & b : plane_visible(i, length);
    }
  }
  if (threadIdx.x == 0) {
    result[0] = over ? high : under ? length - low : upper ? middle - high : low - middle;
    result[1] = k - (over ? 0 : under ? low : upper ? high : middle);
    // No score lies between two neighbours, and the low threshold counts as within.
    result[2] = !over && !under &&
                (upper ? ordered(threshold[1]) == key_below(ordered(threshold[0])) : threshold[1] == threshold[2]);
    result[3] = over || under ? 0 : upper ? 2 : 1;
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

// Candidates between two thresholds differ in fewer bits than any. bracket: result[3] of `classify`.
__device__ __forceinline__ void radix_begin_between(int* state, int need, int bracket, const float* threshold) {
  if (bracket == 0) {
    radix_begin(state, need);
  } else {
    radix_begin(state, need, ordered(threshold[3 - bracket]), ordered(threshold[2 - bracket]));
  }
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

// Writes the selected positions in ascending order: the selected bits, and the first `extra` candidates.
// Each warp takes a contiguous part of the spans. The words were written by this block, through L2.
template <int THREADS>
__device__ __forceinline__ void emit(const unsigned* above, const unsigned* within, int words, bool narrow, int extra,
                                     int form, const int* pages, int offset, int* scratch, int* out) {
  constexpr int kWarps = THREADS / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int spans = words / 32, share = (spans + kWarps - 1) / kWarps;
  const int first = min(warp * share, spans), last = min(first + share, spans);
  int selected = 0, ties = 0;
#pragma unroll 4
  for (int span = first; span < last; ++span) {
    const unsigned word = __ldcg(&above[span * 32 + lane]);
    const unsigned other = narrow || extra ? __ldcg(&within[span * 32 + lane]) : 0;
    selected += __popc(selected_bits(word, other, narrow));
    if (extra) ties += __popc(other & ~word);
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
  unsigned next = 0, next_within = ~0u;
  const auto load = [&](int span) {
    if (span < last) next = __ldcg(&above[span * 32 + lane]);
    if (span < last && narrow) next_within = __ldcg(&within[span * 32 + lane]);
  };
  load(first);
  for (int span = first; span < last; ++span) {
    const unsigned stored = next;
    unsigned word = natural_order(selected_bits(next, next_within, narrow));
    load(span + 1);
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
