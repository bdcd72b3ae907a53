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

// Each warp takes a contiguous share of a row's spans, in all that follows, so that it knows where its selected tokens go once it knows
// how many those before it have.
struct Share {
  int first, last;  // words
};
template <int THREADS>
__device__ __forceinline__ Share share_of_warp(int words) {
  constexpr int kWarps = THREADS / 32;
  const int size = (words / 32 + kWarps - 1) / kWarps * 32, first = min((int)threadIdx.x / 32 * size, words);
  return {first, min(first + size, words)};
}

// A plane as `classify` leaves it. Of two planes one is "above": the tokens to be selected whatever the candidates' scores
// are have their bits there, and candidates get theirs. The candidates are the bits of the other plane, "within", without
// those above. narrow: what is above counts only if it is within as well.
__device__ __forceinline__ unsigned selected_bits(unsigned above, unsigned within, bool narrow) {
  return narrow ? above & within : above;
}

// Where the k-th score lies: outside of the thresholds, between the low and the middle one, or between the middle and the high one.
enum Bracket { kNone, kLower, kUpper };

// What is known about a row once its bits are counted, in shared memory.
struct Candidates {
  int count;    // tokens that may be selected or not
  int need;     // of which so many are
  int tied;     // whether their scores are known to be equal
  int bracket;  // see above
};

constexpr int kCandidatesInts = sizeof(Candidates) / sizeof(int);

__device__ __forceinline__ const Candidates& as_candidates(const int* ints) {
  return *reinterpret_cast<const Candidates*>(ints);
}

__device__ __forceinline__ int num_candidates(const int* candidates) { return as_candidates(candidates).count; }

// Also the number of the plane that is "above".
__device__ __forceinline__ int upper_bracket(const int* candidates) {
  return as_candidates(candidates).bracket == kUpper;
}

// Scoring left bits 11 over the high threshold, 10 down to the middle one, 01 down to the low one (planes 0 and 1). So
// - with the k-th score between middle and high, plane 1 is above (narrow) and plane 0 within,
// - with the k-th score between low and middle, plane 0 is above and plane 1 within,
// - and if the thresholds do not bracket it, this rewrites the planes as in the second case: with more than k over the high
//   threshold these become the candidates, with fewer than k down to the low one the candidates are all the others.
// selected: of each warp's share, how many tokens are selected whatever the candidates' scores are. Ends with a barrier.
template <int THREADS>
__device__ __forceinline__ void classify(unsigned* plane0, unsigned* plane1, int words, int length, int k,
                                         const float* threshold, int* scratch, int* candidates, int* selected) {
  constexpr int kWarps = THREADS / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Share share = share_of_warp<THREADS>(words);
  int high = 0, middle = 0, low = 0;
  for (int first = share.first; first < share.last; first += 32 * kBatch) {
    unsigned a[kBatch], b[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = first + u * 32 + lane;
      a[u] = i < share.last ? plane0[i] : 0;
      b[u] = i < share.last ? plane1[i] : 0;
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
  const int my_high = high, my_middle = middle, my_low = low;
  if (lane == 0) {
    scratch[warp] = high;
    scratch[kWarps + warp] = middle;
    scratch[2 * kWarps + warp] = low;
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
  if (lane == 0) selected[warp] = over ? 0 : under ? my_low : upper ? my_high : my_middle;
  if (threadIdx.x == 0) {
    Candidates result;
    result.count = over ? high : under ? length - low : upper ? middle - high : low - middle;
    result.need = k - (over ? 0 : under ? low : upper ? high : middle);
    // No score lies between two neighbours, and the low threshold counts as within.
    result.tied = !over && !under &&
                  (upper ? ordered(threshold[1]) == key_below(ordered(threshold[0])) : threshold[1] == threshold[2]);
    result.bracket = over || under ? kNone : upper ? kUpper : kLower;
    *reinterpret_cast<Candidates*>(candidates) = result;
  }
  __syncthreads();
}

// The words of a plane are taken in parts: the one from `first` on, and as many spans as have at most `capacity` candidates
// together; a span alone must fit. Returns the end of the part.
template <int THREADS>
__device__ __forceinline__ int end_of_part(const unsigned* above, const unsigned* within, int first, int words,
                                           int capacity, int* scratch) {
  const int begin = first + (int)threadIdx.x * 32;
  int count = 0;
  if (begin < words) {
#pragma unroll 1  // seldom run, and its registers would be those of the kernel
    for (int i = 0; i < 32; i += 4) {
      const uint4 a = *reinterpret_cast<const uint4*>(above + begin + i);
      const uint4 w = *reinterpret_cast<const uint4*>(within + begin + i);
      count += __popc(w.x & ~a.x) + __popc(w.y & ~a.y) + __popc(w.z & ~a.z) + __popc(w.w & ~a.w);
    }
  }
  int total;
  const int before = cta_exclusive_scan<THREADS>(count, scratch, total);
  return first + 32 * __syncthreads_count(begin < words && before + count <= capacity);
}

// Where a candidate's bit is: in whose share, in which word, which one.
__device__ __forceinline__ unsigned make_place(int warp, int word, int bit) {
  return (unsigned)warp << kPositionBits | word * 32 + bit;
}
__device__ __forceinline__ int warp_of(unsigned place) { return place >> kPositionBits; }
__device__ __forceinline__ int word_of(unsigned place) { return (place & kLastPosition) / 32; }
__device__ __forceinline__ unsigned mask_of(unsigned place) { return 1u << place % 32; }
__device__ __forceinline__ int position_of(unsigned place) { return plane_position(word_of(place), place % 32); }

// Appends the candidates in words [first, last) to `places`; their number goes to *count, which the caller has cleared. The order is
// arbitrary.
template <int THREADS>
__device__ __forceinline__ void collect(const unsigned* above, const unsigned* within, int words, int first, int last,
                                        unsigned* places, int* count) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Share share = share_of_warp<THREADS>(words);
  last = min(last, share.last);
  for (int base = max(first, share.first); base < last; base += 32 * kBatch) {
    unsigned word[kBatch];
    int mine = 0;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = base + u * 32 + lane;
      word[u] = i < last ? within[i] & ~above[i] : 0;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) mine += __popc(word[u]);
    const int inclusive = warp_inclusive_scan(mine);
    int at = 0;
    if (lane == 31) at = atomicAdd(count, inclusive);
    at = __shfl_sync(0xffffffffu, at, 31) + inclusive - mine;
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      for (; word[u]; word[u] &= word[u] - 1) {
        places[at++] = make_place(warp, base + u * 32 + lane, __ffs(word[u]) - 1);
      }
    }
  }
}

// The slots of the cache of listed tokens. They are worked out here, where every thread has a token, and not where a few lanes list some.
template <int THREADS>
__device__ __forceinline__ void find_slots(const unsigned* places, int count, const int* pages, unsigned* slots) {
  for (int i = threadIdx.x; i < count; i += THREADS) slots[i] = slot_of(position_of(places[i]), pages);
}

// Listed tokens that are always selected, those before `init` and from `local` on, get the score +inf. Each thread looks at
// the entries that radix selection gives it, so no barrier need follow.
template <int THREADS>
__device__ __forceinline__ void force_places(const unsigned* places, unsigned* scores, int count, int init, int local) {
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const int position = position_of(places[i]);
    if (position < init || position >= local) scores[i] = kInfinity;
  }
}

// Radix selection of candidates by their scores, as ordered keys, which are known to be at least `base`: the bits of
// `key - base` are found from the top, 11 at a time.
struct Radix {
  unsigned base;
  unsigned prefix;  // of the last selected key, its bits found so far
  int shift;        // bits not yet looked at
  int need;         // keys to be selected among those that share the prefix
  int settled;      // whether these are all that share it
};

constexpr int kDigits = 3;  // that settle any selection, but for equal scores
constexpr int kRadixInts = sizeof(Radix) / sizeof(int);

__device__ __forceinline__ unsigned shifted(unsigned key, int shift) { return shift < 32 ? key >> shift : 0u; }

// Keys between two neighbouring thresholds differ in fewer bits than any. A barrier must follow.
__device__ __forceinline__ void radix_begin(int* radix, const int* candidates_, const float* threshold) {
  const Candidates* candidates = &as_candidates(candidates_);
  unsigned base = 0, top = ~0u;
  if (candidates->bracket != kNone) {
    base = ordered(threshold[candidates->bracket == kUpper ? 1 : 2]);
    top = ordered(threshold[candidates->bracket == kUpper ? 0 : 1]);
  }
  const int need = candidates->need, settled = need == 0 || need == candidates->count;
  // Settled without a look: all candidates share the empty prefix, or none is selected.
  if (threadIdx.x == 0) *reinterpret_cast<Radix*>(radix) = {base, need == 0, 32 - __clz(top - base), need, settled};
}

// Rounds over the candidates that settle them: none if all of them tie or none is selected.
__device__ __forceinline__ int radix_rounds(const int* candidates) {
  return as_candidates(candidates).tied || as_candidates(candidates).need <= 0 ? 0 : kDigits + 1;
}

__device__ __forceinline__ bool radix_searches(const int* radix_) {
  const Radix* radix = reinterpret_cast<const Radix*>(radix_);
  return !radix->settled && radix->shift > 0;
}

__device__ __forceinline__ void radix_count(const int* radix_, unsigned score, int* bins) {
  const Radix* radix = reinterpret_cast<const Radix*>(radix_);
  const unsigned key = score - radix->base;
  const int shift = max(radix->shift - 11, 0);
  if (shifted(key, radix->shift) == radix->prefix) {
    atomicAdd(&bins[key >> shift & ((1u << (radix->shift - shift)) - 1)], 1);
  }
}

// After all candidates were counted. Ends with a barrier.
template <int THREADS>
__device__ __forceinline__ void radix_advance(int* radix_, const int* bins, int* scratch) {
  Radix* radix = reinterpret_cast<Radix*>(radix_);
  __syncthreads();
  find_bin<THREADS>(bins, radix->need, scratch, scratch + 32);
  if (threadIdx.x == 0) {
    const int shift = max(radix->shift - 11, 0);
    radix->prefix = radix->prefix << (radix->shift - shift) | (unsigned)scratch[32];
    radix->shift = shift;
    radix->need -= scratch[33];
    radix->settled = radix->need == scratch[34];
  }
  __syncthreads();
}

// Sets the bit of a candidate that is selected in the plane above, and counts it. Where equal scores are left, of which the first are
// selected, only these stay candidates: the bits of lower ones in the plane within are cleared.
__device__ __forceinline__ void radix_mark(const int* radix_, unsigned score, unsigned place, unsigned* above,
                                           unsigned* within, int* selected) {
  const Radix* radix = reinterpret_cast<const Radix*>(radix_);
  const unsigned prefix = shifted(score - radix->base, radix->shift);
  if (prefix > radix->prefix || (prefix == radix->prefix && radix->settled)) {
    atomicOr(&above[word_of(place)], mask_of(place));
    atomicAdd(&selected[warp_of(place)], 1);
  } else if (prefix < radix->prefix && !radix->settled) {
    atomicAnd(&within[word_of(place)], ~mask_of(place));
  }
}

// How many of the candidates that are left are to be selected: those at the lowest positions.
__device__ __forceinline__ int ties_selected(const int* candidates, const int* radix_) {
  const Radix* radix = reinterpret_cast<const Radix*>(radix_);
  return as_candidates(candidates).tied ? as_candidates(candidates).need : radix->settled ? 0 : radix->need;
}

// Writes the selected positions in ascending order: the selected bits, and the first `extra` candidates. selected: the number of
// selected bits in each warp's share; stage: kSpan ints a warp. The words were written by this CTA, through L2.
template <int THREADS>
__device__ __forceinline__ void emit(const unsigned* above, const unsigned* within, int words, int length, bool narrow,
                                     int extra, const int* selected, int form, const int* pages, int offset,
                                     int* scratch, void* stage, int* out) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Share share = share_of_warp<THREADS>(words);
  int room = 0;  // of this warp: how many candidates it adds
  for (int i = 0; i < warp; ++i) out += selected[i];
  if (extra) {  // uniform in the CTA
    int ties = 0, before = 0;
#pragma unroll 4
    for (int i = share.first + lane; i < share.last; i += 32) ties += __popc(__ldcg(&within[i]) & ~__ldcg(&above[i]));
    ties = __reduce_add_sync(0xffffffffu, ties);
    __syncthreads();
    if (lane == 0) scratch[warp] = ties;
    __syncthreads();
    for (int i = 0; i < warp; ++i) before += scratch[i];
    out += min(extra, before);
    room = min(max(extra - before, 0), ties);
  }
  const NaturalOrder natural_order;
  const WarpScan scan;
  // Positions of some spans, which then go out side by side: one by one each would be a transaction of its own.
  int* const staged = (int*)stage + warp * kSpan;
  int num_staged = 0;
  const auto flush = [&]() {
    __syncwarp();
#pragma unroll 4
    for (int i = lane; i < num_staged; i += 32) out[i] = staged[i];
    __syncwarp();
    out += num_staged;
    num_staged = 0;
  };
  // Of the next span: this lane's words of the planes, its page, and what the first of its 32 tokens is written as; they lie in one page.
  const unsigned* to_above = above + share.first + lane;
  const unsigned* to_within = within + share.first + lane;
  int position = share.first / 32 * kSpan + lane * 32;
  const int in_page = form == kSlots ? position % kPage : offset, last_page = (length - 1) / kPage;
  unsigned next = 0, next_within = ~0u;
  int next_index = 0;
  const auto load = [&]() {
    next = __ldcg(to_above);
    if (narrow) next_within = __ldcg(to_within);
    next_index = form == kSlots ? pages[min(position / kPage, last_page)] * kPage : position;
    next_index += in_page;
    to_above += 32, to_within += 32, position += kSpan;
  };
  if (share.first < share.last) load();
  for (int first = share.first; first < share.last; first += 32) {
    const unsigned stored = next;
    const int index = next_index;
    unsigned word = natural_order(selected_bits(next, next_within, narrow));
    if (first + 32 < share.last) load();
    if (room > 0) {  // uniform in the warp
      unsigned tied = natural_order(__ldcg(&within[first + lane]) & ~stored);
      const int inclusive = scan.inclusive(__popc(tied));
      const int left = max(room - (inclusive - __popc(tied)), 0);
      while (__popc(tied) > left) tied &= ~(0x80000000u >> __clz(tied));
      word |= tied;
      room -= __shfl_sync(0xffffffffu, inclusive, 31);
    }
    const int inclusive = scan.inclusive(__popc(word)), total = __shfl_sync(0xffffffffu, inclusive, 31);
    if (num_staged + total > kSpan) flush();
    // From both ends at once: half as many steps, each of which waits for the last. They meet in one bit where their number is odd. The
    // lanes take the steps together.
    int *const end = staged + num_staged + inclusive, *const begin = end - __popc(word);
    const int steps = (__reduce_max_sync(0xffffffffu, __popc(word)) + 1) / 2;
    num_staged += total;
#pragma unroll 2
    for (int step = 0; step < steps; ++step) {
      const unsigned lowest = word & (0u - word);
      const int highest = 31 - __clz(word);
      int from_below = index + 31 - __clz(lowest), from_above = index + highest;
      // Worked out in all lanes: what is left to the condition is too little for a branch.
      asm("" : "+r"(from_below), "+r"(from_above));
      if (word) begin[step] = from_below, end[-1 - step] = from_above;
      word &= ~lowest & ~(1u << (highest & 31));
    }
  }
  flush();
}

}  // namespace misa
