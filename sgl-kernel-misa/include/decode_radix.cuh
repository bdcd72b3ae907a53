// Selection from a row whatever its scores are: by the digits of all of them. Why this is CUDA: see
// decode_row.cuh.
#pragma once

#include "decode_row.cuh"

namespace misa {

// What is known of the largest keys, `need` of which are not known yet.
struct RadixState {
  unsigned long long prefix;  // of the last of them, its bits found so far
  int shift;                  // bits not yet looked at
  int need;                   // to be found among the keys that share the prefix
  bool done;                  // all that share it are selected
};

// Bits of a key below a digit: 11, 11 and 10 bits of the score, 11 and 11 of the position. Constants, so that the compiler
// sees which half of a key a digit lies in. -1: the whole key's bits.
template <int DIGIT>
constexpr int kDigitShift = DIGIT < 2    ? 43 - 11 * DIGIT
                            : DIGIT == 2 ? 22
                            : DIGIT == 3 ? 11
                                         : 0;

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

// One digit of the radix selection by all CTAs that share a row. bins: two histograms of this CTA, of which the digit's
// own is clear. Every thread returns with the same state; returns whether the selection is known.
template <int RANKS, int DIGIT>
__device__ __forceinline__ bool select_digit(const Part& part, int rank, int* bins, int* scratch, RadixState& state) {
  constexpr int kBefore = kDigitShift<DIGIT - 1>, kAfter = kDigitShift<DIGIT>;
  int* const mine = bins + DIGIT % 2 * kBins;
  for_each_load(part, [&](int token, const unsigned (&keys)[4], int count) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const unsigned long long entry = entry_key(keys[v], token + v);
      if (v < count && (DIGIT == 0 || entry >> kBefore == state.prefix)) {
        atomicAdd(&mine[(unsigned)(entry >> kAfter) & ((1u << (kBefore - kAfter)) - 1)], 1);
      }
    }
  });
  sync_ranks<RANKS>();
  // All CTAs have counted this digit, so none still reads the histogram of the digit before.
  clear_bins<kThreads>(bins + (DIGIT + 1) % 2 * kBins);
  Bin bin;
  find_bin_of_all<RANKS, kBins>(mine, state.need, rank, scratch, bin);
  state.prefix = state.prefix << (kBefore - kAfter) | (unsigned)bin.index;
  state.shift = kAfter;
  state.need -= bin.above;
  state.done = state.need == bin.count;
  return state.done;
}

// The cut whatever the scores are: up to five digits, each counted over all tokens. bins: two histograms, which other CTAs may
// still read: they have arrived at a barrier of the cluster, or will, and here it is waited for.
template <int RANKS>
__device__ __forceinline__ Cut cut_by_radix(const Part& part, int topk, int rank, int* bins, int* scratch) {
  RadixState state = {0ull, kPositionBits + 32, topk, false};
  if (RANKS > 1) cluster_wait();
  clear_bins<kThreads>(bins);
  __syncthreads();
  select_digit<RANKS, 0>(part, rank, bins, scratch, state) ||
      select_digit<RANKS, 1>(part, rank, bins, scratch, state) ||
      select_digit<RANKS, 2>(part, rank, bins, scratch, state) ||
      select_digit<RANKS, 3>(part, rank, bins, scratch, state) ||
      select_digit<RANKS, 4>(part, rank, bins, scratch, state);
  // The least selected key is the prefix, filled with zeros.
  const unsigned long long least = state.prefix << state.shift;
  return {(unsigned)(least >> kPositionBits), (int)(kLastPosition - ((unsigned)least & kLastPosition))};
}

// Writes the selected tokens of a part. counts: one for every warp, and one more. The CTAs leave with a cluster barrier arrived
// at and not waited for, if they are several.
template <int RANKS>
__device__ __forceinline__ void emit_selected(const Part& part, const Cut& cut, int rank, int form, const int* pages,
                                              int offset, int* counts, int* out) {
  const auto selected_of = [&](int token, const unsigned (&keys)[4], int count) {
    unsigned mask = 0;
#pragma unroll
    for (int v = 0; v < 4; ++v) mask |= (unsigned)(v < count && is_selected(keys[v], token + v, cut)) << v;
    return mask;
  };
  int selected = 0, total;
  for_each_load(part, [&](int token, const unsigned (&keys)[4], int count) {
    selected += __popc(selected_of(token, keys, count));
  });
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
  for_each_load(part, [&](int token, const unsigned (&keys)[4], int count) {
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
__device__ __noinline__ void select_by_radix(Part part, int topk, int rank, int form, const int* pages, int offset,
                                             int* bins, int* scratch, int* out) {
  const Cut cut = cut_by_radix<RANKS>(part, topk, rank, bins, scratch);
  emit_selected<RANKS>(part, cut, rank, form, pages, offset, scratch, out);
}

}  // namespace misa
