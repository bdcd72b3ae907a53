// Exact selection of a row's top k from its scores, by the thread blocks of a cluster.
#pragma once

#include <cstdint>

#include "block.cuh"
#include "cluster.cuh"

namespace misa {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kAlone = 8192;                  // tokens of a row that one block selects from by itself
constexpr int kLoads = 8;                     // of four scores each, that a thread holds
constexpr int kWarpTokens = kLoads * 4 * 32;  // tokens that a warp holds
constexpr int kRowSamples = 2 * kThreads;     // scores that bound the k-th one from below
constexpr int kFineBins = kThreads;           // of the histogram of the scores over that bound
constexpr int kContenders = kThreads;         // scores of a bin that are compared one with another
constexpr int kCandidates = 6144;             // tokens over that bound that a block lists
constexpr int kTooMany = 1 << 24;             // stands for more than that in a histogram
constexpr unsigned kLastPosition = 0x3fffffu;
constexpr unsigned kInfinity = 0xff800000u;   // as an ordered key

// Places in a block's 64 ints of scratch, after two for every warp.
constexpr int kFound = 2 * kWarps, kListed = kFound + 6, kResult = kFound + 8, kMailbox = kFound + 10;

__device__ __forceinline__ uint64_t* mailbox(int* scratch) { return reinterpret_cast<uint64_t*>(scratch + kMailbox); }

// The entries of a row that are selected: those of a score over `score`, and of that score up to position `last`.
struct Cut {
  unsigned score;  // as an ordered key
  int last;
};

// What a warp has of a row: tokens `first` .. `end`, `first` a multiple of 128.
struct Part {
  const float* scores;  // of the row
  int first, end;
};

// A bin of a histogram. earlier: of the blocks of lower rank only.
struct Bin {
  int index;
  int above, count;  // entries in the bins above, and in it
  int earlier_above, earlier;
};

// Bits of a key below a digit: 11, 11 and 10 bits of the score, 11 and 11 of the position. Constants, so that the compiler
// sees which half of a key a digit lies in. -1: the whole key's bits.
template <int DIGIT>
constexpr int kDigitShift = DIGIT < 2 ? 43 - 11 * DIGIT : DIGIT == 2 ? 22 : DIGIT == 3 ? 11 : 0;

// The first token of this lane in a batch that begins with token `first`: its others are 1, 2, 3, 128, 129, ... further on.
__device__ __forceinline__ int token_of_lane(int first) { return first + threadIdx.x % 32 * 4; }

// Begins to load the scores of a batch, four adjacent ones a lane and load; NaN past the end, but for the rest of a load. They
// may have been written while this kernel ran already, so they are read through L2.
__device__ __forceinline__ void load_scores(const Part& part, int first, uint4 (&scores)[kLoads]) {
  const float* const from = part.scores + token_of_lane(first);
  const int left = part.end - token_of_lane(first);
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    scores[u] = make_uint4(~0u, ~0u, ~0u, ~0u);
    if (u * 128 < left) scores[u] = __ldcg(reinterpret_cast<const uint4*>(from + u * 128));
  }
}

// Which of this lane's scores of a batch reach `low`, by the number of their token.
__device__ __forceinline__ unsigned reaching(const Part& part, int first, const uint4 (&scores)[kLoads], float low) {
  unsigned mask = 0;
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    mask |= (unsigned)(__uint_as_float(scores[u].x) >= low) << u * 4;
    mask |= (unsigned)(__uint_as_float(scores[u].y) >= low) << (u * 4 + 1);
    mask |= (unsigned)(__uint_as_float(scores[u].z) >= low) << (u * 4 + 2);
    mask |= (unsigned)(__uint_as_float(scores[u].w) >= low) << (u * 4 + 3);
  }
  // The end of the row may lie in the middle of a load.
  const int left = part.end - token_of_lane(first), rest = left % 128;
  if (left > 0 && left < kWarpTokens && rest < 4) mask &= ~(0xfu << left / 128 * 4) | ((1u << rest) - 1) << left / 128 * 4;
  return mask;
}

// Calls visit(token, keys, count) for the tokens of a part, 128 at a time: those of this lane are `count` from `token` on.
template <typename Visit>
__device__ __forceinline__ void for_each_load(const Part& part, Visit visit) {
  for (int first = part.first; first < part.end; first += 128) {
    const int token = token_of_lane(first), count = min(max(part.end - token, 0), 4);
    float4 loaded = make_float4(0.f, 0.f, 0.f, 0.f);
    if (count > 0) loaded = __ldcg(reinterpret_cast<const float4*>(part.scores + token));
    const unsigned keys[4] = {ordered(loaded.x), ordered(loaded.y), ordered(loaded.z), ordered(loaded.w)};
    visit(token, keys, count);
  }
}

// From what every warp has put into values[warp], before a barrier: the sum over the warps before this one, and over all.
__device__ __forceinline__ int sum_of_warps_before(const int* values, int& total) {
  const int lane = threadIdx.x % 32, value = lane < kWarps ? values[lane] : 0;
  total = __reduce_add_sync(0xffffffffu, value);
  return __reduce_add_sync(0xffffffffu, lane < threadIdx.x / 32 ? value : 0);
}

// Finds the bin that holds the `need`-th largest entry of the sum of all blocks' histograms. A barrier of the blocks comes
// before. Returns the number of entries; if it is less than `need` there is no such bin.
template <int RANKS, int BINS>
__device__ __forceinline__ int find_bin_of_all(const int* bins, int need, int rank, int* scratch, Bin& found) {
  constexpr int kPer = BINS / kThreads;  // bins in descending order
  const int warp = threadIdx.x / 32, first = BINS - kPer * (threadIdx.x + 1);
  int count[kPer] = {}, earlier[kPer] = {};
#pragma unroll
  for (int r = 0; r < RANKS; ++r) {
    int peer[kPer];
    if constexpr (kPer == 4) {
      *reinterpret_cast<int4*>(peer) = RANKS == 1 ? *reinterpret_cast<const int4*>(bins + first) : load_peer4(bins + first, r);
    } else {
      static_assert(kPer == 1, "a thread owns four bins or one");
      peer[0] = RANKS == 1 ? bins[first] : load_peer(bins + first, r);
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      count[i] += peer[i];
      if (r < rank) earlier[i] += peer[i];
    }
  }
  int sum = 0, earlier_sum = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    sum += count[i];
    earlier_sum += earlier[i];
  }
  const int inclusive = warp_inclusive_scan(sum), earlier_inclusive = RANKS == 1 ? 0 : warp_inclusive_scan(earlier_sum);
  if (threadIdx.x % 32 == 31) {
    scratch[warp] = inclusive;
    scratch[kWarps + warp] = earlier_inclusive;
  }
  __syncthreads();
  int total, earlier_total;
  int above = inclusive - sum + sum_of_warps_before(scratch, total), earlier_above = 0;
  if (RANKS > 1) earlier_above = earlier_inclusive - earlier_sum + sum_of_warps_before(scratch + kWarps, earlier_total);
  Bin* const result = reinterpret_cast<Bin*>(scratch + kFound);
#pragma unroll
  for (int i = kPer - 1; i >= 0; --i) {
    // Of all bins, one.
    if (above < need && above + count[i] >= need) *result = {first + i, above, count[i], earlier_above, earlier[i]};
    above += count[i];
    earlier_above += earlier[i];
  }
  __syncthreads();
  found = *result;
  return total;
}

// Bits that must go so that numbers up to `most` have at most 2^BITS values.
template <int BITS>
__device__ __forceinline__ int shift_to_fit(unsigned most) {
  return max(0, 32 - __clz(most) - BITS);
}

// A score that the k-th one of the row should not lie under: about the `need`-th one of a sample of the row, two scores a
// thread; every block finds the same. And the shift that spreads the sample's scores from there on over the fine bins. bins:
// kBins that are clear.
__device__ __forceinline__ unsigned bound_from_below(const unsigned (&sample)[2], int need, int* bins, int* scratch, int& shift) {
  // Forced tokens, of infinite score, would take the room of all others.
  const auto finite = [](unsigned key) { return key < kInfinity ? key : 0; };
  unsigned least = __reduce_min_sync(0xffffffffu, min(sample[0], sample[1]));
  unsigned most = __reduce_max_sync(0xffffffffu, max(finite(sample[0]), finite(sample[1])));
  if (threadIdx.x % 32 == 0) {
    scratch[threadIdx.x / 32] = (int)least;
    scratch[kWarps + threadIdx.x / 32] = (int)most;
  }
  __syncthreads();
  least = __reduce_min_sync(0xffffffffu, (unsigned)scratch[threadIdx.x % kWarps]);
  most = max(__reduce_max_sync(0xffffffffu, (unsigned)scratch[kWarps + threadIdx.x % kWarps]), least);
  const int coarse = shift_to_fit<11>(most - least);
#pragma unroll
  for (int i = 0; i < 2; ++i) atomicAdd(&bins[min((sample[i] - least) >> coarse, kBins - 1u)], 1);
  __syncthreads();
  Bin bin;
  find_bin_of_all<1, kBins>(bins, need, 0, scratch, bin);
  const unsigned edge = (unsigned)bin.index << coarse;
  const unsigned low = edge > most - least ? kInfinity : max(least + edge, 1u);
  shift = shift_to_fit<9>(max(most, low) - low);
  static_assert(kFineBins == 1 << 9 && kBins == 1 << 11, "as many bits");
  return low;
}

// The counts of the bits of a lane's mask in its eight groups of four, a byte each: groups 0, 2, 4, 6 and 1, 3, 5, 7; then the
// sums over the lanes before this one, and over all (at most 128).
struct GroupCounts {
  unsigned before[2], total[2];
};

__device__ __forceinline__ GroupCounts count_groups(unsigned mask) {
  unsigned count = mask - (mask >> 1 & 0x55555555u);
  count = (count & 0x33333333u) + (count >> 2 & 0x33333333u);
  const unsigned counts[2] = {count & 0x0f0f0f0fu, count >> 4 & 0x0f0f0f0fu};
  GroupCounts groups;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned inclusive = (unsigned)warp_inclusive_scan((int)counts[i]);
    groups.before[i] = inclusive - counts[i];
    groups.total[i] = __shfl_sync(0xffffffffu, inclusive, 31);
  }
  return groups;
}

// Calls write(slot, u) for the groups of a batch, where `slot` is that of this lane's first token of group u if the tokens with
// a bit in the masks are counted in their order. Returns how many there are.
template <typename Write>
__device__ __forceinline__ int for_each_group(unsigned mask, Write write) {
  const GroupCounts groups = count_groups(mask);
  int written = 0;
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    write(written + (int)(groups.before[u % 2] >> u / 2 * 8 & 0xffu), u);
    written += (int)(groups.total[u % 2] >> u / 2 * 8 & 0xffu);
  }
  return written;
}

// Lists a block's tokens whose scores reach `low`, in their order: (score, position). Returns how many there are; if these are
// more than kCandidates, none is listed. scores: the first batch of the part; if it is HELD the part has no other. Ends with a
// barrier.
template <bool HELD>
__device__ __forceinline__ int list_candidates(const Part& part, uint4 (&scores)[kLoads], float low, uint2* list, int* counts) {
  unsigned mask = reaching(part, part.first, scores, low);
  int mine = __popc(mask), total;
  if constexpr (!HELD) {
    for (int first = part.first + kWarpTokens; first < part.end; first += kWarpTokens) {
      load_scores(part, first, scores);
      mine += __popc(reaching(part, first, scores, low));
    }
  }
  mine = __reduce_add_sync(0xffffffffu, mine);
  if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = mine;
  __syncthreads();
  list += sum_of_warps_before(counts, total);
  if (total <= kCandidates) {
    for (int first = part.first; first < part.end; first += kWarpTokens) {
      if constexpr (!HELD) {
        load_scores(part, first, scores);
        mask = reaching(part, first, scores, low);
      }
      list += for_each_group(mask, [&](int slot, int u) {
        const unsigned score[4] = {scores[u].x, scores[u].y, scores[u].z, scores[u].w};
        const int token = token_of_lane(first) + u * 128;
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          if (mask >> (u * 4 + v) & 1) list[slot++] = make_uint2(score[v], token + v);
        }
      });
    }
  }
  __syncthreads();
  return total;
}

// The position of the `rank`-th entry of a list whose score is `score`, an ordered key, or kLastPosition if there are fewer; every
// thread must call this.
__device__ __forceinline__ int position_of_tie(const uint2* list, int count, unsigned score, int rank, int* scratch) {
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    int before = 0, found = kLastPosition;
#pragma unroll 1
    for (int base = 0; base < count && before < rank; base += 32) {
      const uint2 entry = base + lane < count ? list[base + lane] : make_uint2(~0u, 0);
      const bool tied = ordered(__uint_as_float(entry.x)) == score;
      const unsigned vote = __ballot_sync(0xffffffffu, tied);
      if (tied && before + __popc(vote & ((1u << lane) - 1)) == rank - 1) found = (int)entry.y;
      before += __popc(vote);
    }
    found = __reduce_min_sync(0xffffffffu, found);
    if (lane == 0) scratch[kResult] = found;
  }
  __syncthreads();
  return scratch[kResult];
}

// The cut between a row's topk best and the others, among the listed candidates: `count` of this block, all tokens whose scores,
// as ordered keys, are at least `low`. Histograms, each of the bin of the one before that holds the k-th entry, until that is one
// of a few, or of many of the same score. False if there are fewer than topk candidates, or too many in a block to be listed.
// bins: kBins, and twice kFineBins that are clear. before: how many tokens are selected in the blocks of lower rank. The blocks
// leave with a cluster barrier arrived at and not waited for, if they are several.
template <int RANKS>
__device__ __forceinline__ bool cut_candidates(const uint2* list, int count, unsigned low, int shift, int topk, int rank, int* bins,
                                               int* scratch, Cut& cut, int& before) {
  int *fine = bins + kBins, *other = fine + kFineBins;
  unsigned span = ~low;  // the keys that are looked at: low .. low + span
  if (count > kCandidates) {
    if (threadIdx.x == 0) fine[0] = kTooMany;
    count = 0;
  }
  Bin bin;
  int need = topk;
  before = 0;
#pragma unroll 1
  while (true) {
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const unsigned over = ordered(__uint_as_float(list[i].x)) - low;
      if (over <= span) atomicAdd(&fine[min(over >> shift, kFineBins - 1u)], 1);
    }
    sync_ranks<RANKS>();
    other[threadIdx.x] = 0;  // no block still reads the histogram before this one
    const int total = find_bin_of_all<RANKS, kFineBins>(fine, need, rank, scratch, bin);
    if (total < need || total >= kTooMany) {
      if (RANKS > 1) cluster_arrive();
      return false;
    }
    need -= bin.above;
    before += bin.earlier_above;
    const unsigned first = (unsigned)bin.index << shift;
    span = bin.index == kFineBins - 1 ? span - first : (1u << shift) - 1;
    low += first;
    if (bin.count <= kContenders || span == 0) break;
    shift = shift_to_fit<9>(span);
    int* const next = other;
    other = fine;
    fine = next;
  }
  if (RANKS > 1) cluster_arrive();  // the other blocks' histograms were read

  if (bin.count > kContenders) {
    // All of one score: those of the lower ranks come first.
    before += min(need, bin.earlier);
    need -= bin.earlier;
    cut = {low, need > 0 ? position_of_tie(list, count, low, need, scratch) : -1};
    return true;
  }

  // The k-th entry is one of a few: each block shows its own to all, in a place of their list that is its own.
  unsigned long long* const contenders = reinterpret_cast<unsigned long long*>(bins);  // the sample's bins are done with
  static_assert(kContenders * sizeof(*contenders) <= kBins * sizeof(int), "they lie there");
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const unsigned key = ordered(__uint_as_float(list[i].x));
    if (key - low > span) continue;
    const unsigned long long entry = entry_key(key, list[i].y);
    unsigned long long* const place = contenders + bin.earlier + atomicAdd(&scratch[kListed], 1);
    if constexpr (RANKS == 1) {
      *place = entry;
    } else {
      for (int r = 0; r < RANKS; ++r) send(place, entry, mailbox(scratch), r);
    }
  }
  if constexpr (RANKS == 1) {
    __syncthreads();
  } else {
    receive(mailbox(scratch), bin.count * sizeof(*contenders));
  }
  bool selected = false;
  Cut* const result = reinterpret_cast<Cut*>(scratch + kResult);
  if (threadIdx.x < bin.count) {
    const unsigned long long mine = contenders[threadIdx.x];
    int larger = 0;
#pragma unroll 4
    for (int j = 0; j < bin.count; ++j) larger += contenders[j] > mine;
    selected = larger < need;
    if (larger == need - 1) {
      *result = {(unsigned)(mine >> kPositionBits), (int)(kLastPosition - ((unsigned)mine & kLastPosition))};
    }
  }
  before += __syncthreads_count(selected && threadIdx.x < bin.earlier);
  cut = *result;
  return true;
}

__device__ __forceinline__ bool is_selected(unsigned key, int position, const Cut& cut) {
  return key > cut.score || (key == cut.score && position <= cut.last);
}

// Writes the selected ones of a block's candidates behind the `before` tokens of the blocks of lower rank.
__device__ __forceinline__ void emit_candidates(const uint2* list, int count, const Cut& cut, int before, int form,
                                                const int* pages, int offset, int* counts, int* out) {
  const int lane = threadIdx.x % 32, share = (count + kThreads - 1) / kThreads * 32;  // of a warp
  const int first = threadIdx.x / 32 * share, last = min(first + share, count);
  const auto selects = [&](int i) { return i < last && is_selected(ordered(__uint_as_float(list[i].x)), list[i].y, cut); };
  int selected = 0, total;
#pragma unroll 1
  for (int i = first + lane; i < last; i += 32) selected += selects(i);
  selected = __reduce_add_sync(0xffffffffu, selected);
  if (lane == 0) counts[threadIdx.x / 32] = selected;
  __syncthreads();
  int slot = before + sum_of_warps_before(counts, total);
#pragma unroll 1
  for (int base = first; base < last; base += 32) {
    const bool mine = selects(base + lane);
    const unsigned vote = __ballot_sync(0xffffffffu, mine);
    if (mine) out[slot + __popc(vote & ((1u << lane) - 1))] = output_index(list[base + lane].y, form, pages, offset);
    slot += __popc(vote);
  }
}

// One digit of the radix selection by all blocks that share a row. bins: two histograms of this block, of which the digit's
// own is clear. Every thread returns with the same state; returns whether the selection is known.
template <int RANKS, int DIGIT>
__device__ __forceinline__ bool select_digit(const Part& part, int rank, int* bins, int* scratch, RadixState& state) {
  constexpr int kBefore = kDigitShift<DIGIT - 1>, kAfter = kDigitShift<DIGIT>;
  int* const mine = bins + DIGIT % 2 * kBins;
  for_each_load(part, [&](int token, const unsigned(&keys)[4], int count) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const unsigned long long entry = entry_key(keys[v], token + v);
      if (v < count && (DIGIT == 0 || entry >> kBefore == state.prefix)) {
        atomicAdd(&mine[(unsigned)(entry >> kAfter) & ((1u << (kBefore - kAfter)) - 1)], 1);
      }
    }
  });
  sync_ranks<RANKS>();
  // All blocks have counted this digit, so none still reads the histogram of the digit before.
  clear_bins<kThreads>(bins + (DIGIT + 1) % 2 * kBins);
  Bin bin;
  find_bin_of_all<RANKS, kBins>(mine, state.need, rank, scratch, bin);
  state.prefix = state.prefix << (kBefore - kAfter) | (unsigned)bin.index;
  state.shift = kAfter;
  state.need -= bin.above;
  state.done = state.need == bin.count;
  return state.done;
}

// The cut whatever the scores are: up to five digits, each counted over all tokens. bins: two histograms, which other blocks may
// still read: they have arrived at a barrier of the cluster, or will.
template <int RANKS>
__device__ __forceinline__ Cut cut_by_radix(const Part& part, int topk, int rank, int* bins, int* scratch) {
  RadixState state = {0ull, kPositionBits + 32, topk, 0};
  if (RANKS > 1) cluster_wait();
  clear_bins<kThreads>(bins);
  __syncthreads();
  select_digit<RANKS, 0>(part, rank, bins, scratch, state) || select_digit<RANKS, 1>(part, rank, bins, scratch, state) ||
      select_digit<RANKS, 2>(part, rank, bins, scratch, state) || select_digit<RANKS, 3>(part, rank, bins, scratch, state) ||
      select_digit<RANKS, 4>(part, rank, bins, scratch, state);
  // radix_selected(state, key): key is at least the prefix, filled with zeros.
  const unsigned long long least = state.prefix << state.shift;
  return {(unsigned)(least >> kPositionBits), (int)(kLastPosition - ((unsigned)least & kLastPosition))};
}

// Writes the selected tokens of a part. counts: one for every warp, and one more. The blocks leave with a cluster barrier arrived
// at and not waited for, if they are several.
template <int RANKS>
__device__ __forceinline__ void emit_selected(const Part& part, const Cut& cut, int rank, int form, const int* pages, int offset,
                                              int* counts, int* out) {
  const auto selected_of = [&](int token, const unsigned(&keys)[4], int count) {
    unsigned mask = 0;
#pragma unroll
    for (int v = 0; v < 4; ++v) mask |= (unsigned)(v < count && is_selected(keys[v], token + v, cut)) << v;
    return mask;
  };
  int selected = 0, total;
  for_each_load(part, [&](int token, const unsigned(&keys)[4], int count) { selected += __popc(selected_of(token, keys, count)); });
  selected = __reduce_add_sync(0xffffffffu, selected);
  if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = selected;
  __syncthreads();
  // Every warp learns from the counts of those before it where its own tokens go.
  int slot = sum_of_warps_before(counts, total);
  if constexpr (RANKS > 1) {
    if (threadIdx.x == 0) counts[kWarps] = total;
    sync_ranks<RANKS>();
    for (int r = 0; r < rank; ++r) slot += load_peer(&counts[kWarps], r);
    cluster_arrive();
  }
  for_each_load(part, [&](int token, const unsigned(&keys)[4], int count) {
    const unsigned mask = selected_of(token, keys, count);
    const int inclusive = warp_inclusive_scan(__popc(mask));
    int to = slot + inclusive - __popc(mask);
    for (int v = 0; v < 4; ++v) {
      if (mask >> v & 1) out[to++] = output_index(token + v, form, pages, offset);
    }
    slot += __shfl_sync(0xffffffffu, inclusive, 31);
  });
}

// Selects from a row whatever its scores are. Not inlined: it must not take registers from what is done for every row.
template <int RANKS>
__device__ __noinline__ void select_by_radix(Part part, int topk, int rank, int form, const int* pages, int offset, int* bins,
                                             int* scratch, int* out) {
  const Cut cut = cut_by_radix<RANKS>(part, topk, rank, bins, scratch);
  emit_selected<RANKS>(part, cut, rank, form, pages, offset, scratch, out);
}

// Selects from a row that RANKS blocks share. need_of_sample: see `bound_from_below`; HELD, list: see `list_candidates`.
template <int RANKS, bool HELD>
__device__ __forceinline__ void select_shared(const Part& part, int length, int topk, int need_of_sample, int rank, int form,
                                              const int* pages, int offset, uint2* list, int* bins, int* scratch, int* out) {
  unsigned sample[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned at = (unsigned)(i * kThreads + threadIdx.x) * (unsigned)length / kRowSamples;
    sample[i] = ordered(__ldcg(&part.scores[at]));
  }
  uint4 scores[kLoads];
  load_scores(part, part.first, scores);
  int shift;
  const unsigned low = bound_from_below(sample, need_of_sample, bins, scratch, shift);
  const int count = list_candidates<HELD>(part, scores, from_ordered(low), list, scratch);
  Cut cut;
  int before;
  if (cut_candidates<RANKS>(list, count, low, shift, topk, rank, bins, scratch, cut, before)) {
    emit_candidates(list, count, cut, before, form, pages, offset, scratch, out);
  } else {
    select_by_radix<RANKS>(part, topk, rank, form, pages, offset, bins, scratch, out);
  }
  if (RANKS > 1) cluster_wait();  // a block's shared memory is there until no other reads it
}

// Selects the topk of a row of length > topk; every thread of the cluster must call this. The blocks take contiguous shares
// of the tokens, the first one all of a short row, and so do their warps; what a warp can hold it keeps in registers.
// row_scores: 16-byte aligned, with room up to a multiple of 4. list: kCandidates; bins: 2 * kBins, 16-byte aligned; scratch: 64.
//
// The scores are those of the kernel before this one, which is waited for here; nothing else is.
template <int RANKS>
__device__ __forceinline__ void select_row(const float* row_scores, int length, int topk, int rank, int form,
                                           const int* pages, int offset, void* list_, int* bins, int* scratch, int* out) {
  uint2* const list = (uint2*)list_;
  const bool alone = RANKS == 1 || length <= kAlone;
  if (alone && rank > 0) return;
  const int warps = (alone ? 1 : RANKS) * kWarps, warp = rank * kWarps + threadIdx.x / 32;
  const int share = (length + warps * 128 - 1) / (warps * 128) * 128;  // of a warp
  const Part part = {row_scores, warp * share, min(warp * share + share, length)};
  // As many samples as the selected tokens should hold, and five standard deviations more.
  const float expected = (float)topk * kRowSamples / length;
  const int need = min((int)(expected + 5.f * sqrtf(expected) + 2.f), kRowSamples);
  clear_bins<kThreads>(bins, kBins + 2 * kFineBins);
  if (threadIdx.x == 0) {
    scratch[kListed] = 0;
    prepare_mailbox(mailbox(scratch));
  }
  if (!alone) sync_ranks<RANKS>();
  cudaGridDependencySynchronize();
  if (RANKS > 1 && alone) {
    select_shared<1, true>(part, length, topk, need, rank, form, pages, offset, list, bins, scratch, out);
  } else if (share <= kWarpTokens) {
    select_shared<RANKS, true>(part, length, topk, need, rank, form, pages, offset, list, bins, scratch, out);
  } else {
    select_shared<RANKS, false>(part, length, topk, need, rank, form, pages, offset, list, bins, scratch, out);
  }
}

}  // namespace misa
