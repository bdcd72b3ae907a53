// Selection among the few tokens of a row that a bound leaves over: its candidates. Why this is CUDA: see
// decode_row.cuh.
#pragma once

#include "decode_row.cuh"

namespace misa {

constexpr int kLoads = 8;                     // of four scores each, that a thread holds
constexpr int kWarpTokens = kLoads * 4 * 32;  // tokens that a warp holds
constexpr int kRowSamples = 2 * kThreads;     // scores that bound the k-th one from below
constexpr int kFewSamples = 8;                // in the bin that holds the bound
constexpr int kContenders = kThreads;         // scores of a bin that are compared one with another
constexpr int kCandidates = 6144;             // tokens over the bound that a CTA lists
constexpr int kTooMany = 1 << 24;             // stands for more than that in a histogram
static_assert(kTooMany > kMaxContext && kTooMany <= (1 << 30) / 8, "no row has so many, and eight of them are an int");

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
  if (left > 0 && left < kWarpTokens && rest < 4)
    mask &= ~(0xfu << left / 128 * 4) | ((1u << rest) - 1) << left / 128 * 4;
  return mask;
}

// Bits that must go so that numbers up to `most` have at most 2^BITS values.
template <int BITS>
__device__ __forceinline__ int shift_to_fit(unsigned most) {
  return max(0, 32 - __clz(most) - BITS);
}

// A score that the k-th one of the row should not lie under, and how to spread the scores from there on over the fine bins:
// evenly (by `scale`), and if too many meet in a bin by the bits of their keys (by `shift`).
struct Bound {
  unsigned low;  // as an ordered key
  int shift;
  float scale;
};

// The bin of a score that is not less than `low`, if `scale` spreads those up to the largest finite one evenly. Where that
// cannot be (a range that is empty, or overflows) the larger score's bin is still not the lower one.
template <int BINS>
__device__ __forceinline__ int even_bin(float score, float low, float scale) {
  const float at = (score - low) * scale;
  return at < BINS - 1 ? max((int)at, 0) : BINS - 1;
}

// About the `need`-th score of a sample of the row, two scores a thread; every CTA finds the same. bins: kBins that are clear.
__device__ __forceinline__ Bound bound_from_below(const unsigned (&sample)[2], int need, int* bins, int* scratch) {
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

  const float lowest = from_ordered(least), highest = from_ordered(most), scale = kBins / (highest - lowest);
#pragma unroll
  for (int i = 0; i < 2; ++i) atomicAdd(&bins[even_bin<kBins>(from_ordered(sample[i]), lowest, scale)], 1);
  __syncthreads();
  Bin bin;
  find_bin_of_all<1, kBins>(bins, need, 0, scratch, bin);
  unsigned low = ordered(fminf(lowest + bin.index / scale, highest));
  if (bin.count > kFewSamples) {
    // They are not spread at all like that. By their keys, then: as long as too many lie in a bin, it is divided itself.
    unsigned span = kInfinity - least;
    low = least;
#pragma unroll 1
    while (true) {
      clear_bins<kThreads>(bins, kBins);
      __syncthreads();
      const int coarse = shift_to_fit<11>(span);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (sample[i] >= low && sample[i] - low <= span) atomicAdd(&bins[(sample[i] - low) >> coarse], 1);
      }
      __syncthreads();
      find_bin_of_all<1, kBins>(bins, need, 0, scratch, bin);
      low += (unsigned)bin.index << coarse;
      if (bin.count <= kFewSamples || coarse == 0) break;
      need -= bin.above;
      span = (1u << coarse) - 1;
    }
  }
  low = max(low, 1u);
  static_assert(kFineBins == 1 << 9 && kBins == 1 << 11, "as many bits");
  return {low, shift_to_fit<9>(max(most, low) - low), kFineBins / (highest - from_ordered(low))};
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
// a bit in the masks are counted in their order.
template <typename Write>
__device__ __forceinline__ void for_each_group(unsigned mask, Write write) {
  const GroupCounts groups = count_groups(mask);
  int written = 0;
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    write(written + (int)(groups.before[u % 2] >> u / 2 * 8 & 0xffu), u);
    written += (int)(groups.total[u % 2] >> u / 2 * 8 & 0xffu);
  }
}

// Lists a CTA's tokens whose scores reach `low`, in their order: (score, position). Returns how many there are; if these are
// more than kCandidates, none is listed. scores: the first batch of the part; if it is HELD the part has no other. Ends with a
// barrier.
template <bool HELD>
__device__ __forceinline__ int list_candidates(const Part& part, uint4 (&scores)[kLoads], float low, uint2* list,
                                               int* counts) {
  unsigned mask = reaching(part, part.first, scores, low);
  int mine = __popc(mask), total;
  if constexpr (!HELD) {
    for (int first = part.first + kWarpTokens; first < part.end; first += kWarpTokens) {
      load_scores(part, first, scores);
      mask = reaching(part, first, scores, low);
      mine += __popc(mask);
    }
  }
  mine = __reduce_add_sync(0xffffffffu, mine);
  if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = mine;
  __syncthreads();
  list += sum_of_warps_before(counts, total);
  if (total <= kCandidates) {
    const auto write = [&](int first, uint2* to) {
      for_each_group(mask, [&](int slot, int u) {
        const unsigned score[4] = {scores[u].x, scores[u].y, scores[u].z, scores[u].w};
        const int token = token_of_lane(first) + u * 128;
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          if (mask >> (u * 4 + v) & 1) to[slot++] = make_uint2(score[v], token + v);
        }
      });
    };
    if constexpr (HELD) {
      write(part.first, list);
    } else {
      // The last batch is still held, so they are listed from the end.
      list += mine;
      int first = part.first + max(part.end - 1 - part.first, 0) / kWarpTokens * kWarpTokens;
      while (true) {
        list -= __reduce_add_sync(0xffffffffu, __popc(mask));
        write(first, list);
        first -= kWarpTokens;
        if (first < part.first) break;
        load_scores(part, first, scores);
        mask = reaching(part, first, scores, low);
      }
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

// The cut between a row's topk best and the others, among the listed candidates: `count` of this CTA, all tokens whose scores
// reach the bound. False if there are fewer than topk candidates, or too many in a CTA to be listed.
// bins: kBins, and twice kFineBins that are clear. before: how many tokens are selected in the CTAs of lower rank. The CTAs
// leave with a cluster barrier arrived at and not waited for, if they are several.
//
// 1. Count the candidates whose keys lie in low .. low + span into a histogram, all CTAs together: at first all candidates,
//    evenly by their scores; if too many meet in the bin that holds the k-th one, all once more by the bits of their keys.
// 2. Go into that bin: the candidates above it are selected. Repeat from 1 with its keys until it holds few candidates, or one key.
// 3. One key, many candidates: the lower positions are selected, which are those of the lower ranks.
// 4. Few candidates: every CTA gets all of them, and compares each with each.
//
// The invariant of the loop: all candidates above low + span are selected, `before` of them in the CTAs of lower rank, and of those
// in low .. low + span the `need` best; the row's k-th entry is the last of these. `fine` is clear when the counting begins. `other`,
// which was counted into before, is cleared behind the barrier at which all have counted into `fine`: then none still reads it.
template <int RANKS>
__device__ __forceinline__ bool cut_candidates(const uint2* list, int count, const Bound& bound, int topk, int rank,
                                               int* bins, int* scratch, Cut& cut, int& before) {
  int *fine = bins + kBins, *other = fine + kFineBins;
  unsigned low = bound.low, span = ~low;  // the keys that are looked at: low .. low + span
  int shift = bound.shift;
  bool even = true;
  const auto even_bin_of = [&](unsigned score) {
    return even_bin<kFineBins>(__uint_as_float(score), from_ordered(bound.low), bound.scale);
  };
  if (count > kCandidates) {
    if (threadIdx.x == 0) fine[0] = kTooMany;
    count = 0;
  }
  Bin bin;
  int need = topk;
  before = 0;
#pragma unroll 1
  while (true) {
    // 1. Count.
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const unsigned over = ordered(__uint_as_float(list[i].x)) - low;
      if (over <= span) atomicAdd(&fine[even ? even_bin_of(list[i].x) : min(over >> shift, kFineBins - 1u)], 1);
    }
    sync_ranks<RANKS>();
    other[threadIdx.x] = 0;
    const int total = find_bin_of_all<RANKS, kFineBins>(fine, need, rank, scratch, bin);
    if (total < need || total >= kTooMany) {
      if (RANKS > 1) cluster_arrive();
      return false;
    }
    if (even && bin.count > kContenders) {
      even = false;
      int* const next = other;
      other = fine;
      fine = next;
      continue;
    }
    // 2. Go into the bin.
    need -= bin.above;
    before += bin.earlier_above;
    if (even) break;
    const unsigned first = (unsigned)bin.index << shift;
    span = bin.index == kFineBins - 1 ? span - first : (1u << shift) - 1;
    low += first;
    if (bin.count <= kContenders || span == 0) break;
    shift = shift_to_fit<9>(span);
    int* const next = other;
    other = fine;
    fine = next;
  }
  if (RANKS > 1) cluster_arrive();  // the other CTAs' histograms were read

  // 3. All of one score: those of the lower ranks come first.
  if (bin.count > kContenders) {
    before += min(need, bin.earlier);
    need -= bin.earlier;
    cut = {low, need > 0 ? position_of_tie(list, count, low, need, scratch) : -1};
    return true;
  }

  // 4. The k-th entry is one of a few: each CTA shows its own to all, in a place of their list that is its own. The mailbox says
  // when all have come, so this needs no barrier of the cluster.
  unsigned long long* const contenders =
      reinterpret_cast<unsigned long long*>(bins);  // the sample's bins are done with
  static_assert(kContenders * sizeof(*contenders) <= kBins * sizeof(int), "they lie there");
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const unsigned key = ordered(__uint_as_float(list[i].x));
    if (even ? even_bin_of(list[i].x) != bin.index : key - low > span) continue;
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

// Writes the selected ones of a CTA's candidates behind the `before` tokens of the CTAs of lower rank.
__device__ __forceinline__ void emit_candidates(const uint2* list, int count, const Cut& cut, int before, int form,
                                                const int* pages, int offset, int* counts, int* out) {
  constexpr int kAtOnce = 4;  // groups of 32, so that the loads of the page table wait together
  const int lane = threadIdx.x % 32, share = (count + kThreads - 1) / kThreads * 32;  // of a warp
  const int first = threadIdx.x / 32 * share, last = min(first + share, count);
  const auto selects = [&](int i) {
    return i < last && is_selected(ordered(__uint_as_float(list[i].x)), list[i].y, cut);
  };
  int selected = 0, total;
#pragma unroll 1
  for (int i = first + lane; i < last; i += 32) selected += selects(i);
  selected = __reduce_add_sync(0xffffffffu, selected);
  if (lane == 0) counts[threadIdx.x / 32] = selected;
  __syncthreads();
  int slot = before + sum_of_warps_before(counts, total);
#pragma unroll 1
  for (int base = first; base < last; base += kAtOnce * 32) {
    int index[kAtOnce];
    bool mine[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = base + u * 32 + lane;
      mine[u] = selects(i);
      if (mine[u]) index[u] = output_index(list[i].y, form, pages, offset);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const unsigned vote = __ballot_sync(0xffffffffu, mine[u]);
      if (mine[u]) out[slot + __popc(vote & ((1u << lane) - 1))] = index[u];
      slot += __popc(vote);
    }
  }
}

}  // namespace misa
