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
constexpr int kBatch = kLoads * 4 * 32;       // tokens that a warp holds
constexpr int kRowSamples = 2 * kThreads;     // scores that bound the k-th one from below
constexpr int kFineBins = kThreads;           // of the histogram of the scores over that bound
constexpr int kContenders = kThreads;         // scores of a bin that are compared one with another
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

// Begins to load the scores of a batch, four adjacent ones a lane and load. They may have been written while this kernel ran
// already, so they are read through L2.
__device__ __forceinline__ void load_scores(const Part& part, int first, uint4 (&keys)[kLoads]) {
  const float* const scores = part.scores + token_of_lane(first);
  const int left = part.end - token_of_lane(first);
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    keys[u] = make_uint4(0, 0, 0, 0);
    if (u * 128 < left) keys[u] = __ldcg(reinterpret_cast<const uint4*>(scores + u * 128));
  }
}

// Makes ordered keys of them; 0, which no number has, past the end.
__device__ __forceinline__ void order_scores(const Part& part, int first, uint4 (&keys)[kLoads]) {
  const int left = part.end - token_of_lane(first);
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    keys[u].x = u * 128 < left ? ordered(__uint_as_float(keys[u].x)) : 0;
    keys[u].y = u * 128 + 1 < left ? ordered(__uint_as_float(keys[u].y)) : 0;
    keys[u].z = u * 128 + 2 < left ? ordered(__uint_as_float(keys[u].z)) : 0;
    keys[u].w = u * 128 + 3 < left ? ordered(__uint_as_float(keys[u].w)) : 0;
  }
}

// Calls visit(key, i, n) for all tokens of this lane, the n-th one i tokens after its first, and a few keys 0.
template <typename Visit>
__device__ __forceinline__ void for_each_of_lane(const uint4 (&keys)[kLoads], Visit visit) {
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    visit(keys[u].x, u * 128, u * 4);
    visit(keys[u].y, u * 128 + 1, u * 4 + 1);
    visit(keys[u].z, u * 128 + 2, u * 4 + 2);
    visit(keys[u].w, u * 128 + 3, u * 4 + 3);
  }
}

// Which of this lane's tokens satisfy test(key, i), by their number.
template <typename Test>
__device__ __forceinline__ unsigned mask_of_lane(const uint4 (&keys)[kLoads], Test test) {
  unsigned mask = 0;
  for_each_of_lane(keys, [&](unsigned key, int i, int n) { mask |= (unsigned)test(key, i) << n; });
  return mask;
}

// Calls visit(first, keys) for the batches of a part: the one that is HELD in registers, or all, which are loaded again.
template <bool HELD, typename Visit>
__device__ __forceinline__ void for_each_batch(const Part& part, uint4 (&keys)[kLoads], Visit visit) {
  if constexpr (HELD) {
    visit(part.first, keys);
  } else {
    for (int first = part.first; first < part.end; first += kBatch) {
      load_scores(part, first, keys);
      order_scores(part, first, keys);
      visit(first, keys);
    }
  }
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
  int above = inclusive - sum, earlier_above = earlier_inclusive - earlier_sum, total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) {
      above += scratch[i];
      if (RANKS > 1) earlier_above += scratch[kWarps + i];
    }
    total += scratch[i];
  }
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
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    least = min(least, (unsigned)scratch[i]);
    most = max(most, (unsigned)scratch[kWarps + i]);
  }
  most = max(most, least);
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

// The cut between a row's topk best and the others, by a histogram of the scores over a bound that a sample gives. False if
// the scores are too unevenly spread for that. bins: kBins and kFineBins that are clear. before: how many tokens are selected in
// the blocks of lower rank. The blocks leave with a cluster barrier arrived at and not waited for, if they are several.
template <int RANKS, bool HELD>
__device__ __forceinline__ bool cut_by_sample(const unsigned (&sample)[2], int need_of_sample, int topk, const Part& part,
                                              uint4 (&keys)[kLoads], int rank, int* bins, int* scratch, Cut& cut, int& before) {
  int shift;
  const unsigned low = bound_from_below(sample, need_of_sample, bins, scratch, shift);
  if constexpr (HELD) order_scores(part, part.first, keys);
  int* const fine = bins + kBins;
  const auto bin_of = [&](unsigned key) { return (int)min((key - low) >> shift, kFineBins - 1u); };
  for_each_batch<HELD>(part, keys, [&](int first, const uint4(&keys)[kLoads]) {
    for_each_of_lane(keys, [&](unsigned key, int, int) {
      if (key >= low) atomicAdd(&fine[bin_of(key)], 1);
    });
  });
  sync_ranks<RANKS>();
  Bin bin;
  const int total = find_bin_of_all<RANKS, kFineBins>(fine, topk, rank, scratch, bin);
  if (RANKS > 1) cluster_arrive();  // the other blocks' histograms were read
  const int need = topk - bin.above;
  if (total < topk || bin.count > kContenders) return false;

  // The k-th entry is one of a few: each block shows its own to all, in a place of their list that is its own.
  unsigned long long* const contenders = reinterpret_cast<unsigned long long*>(bins);  // the sample's bins are done with
  static_assert(kContenders * sizeof(*contenders) <= kBins * sizeof(int), "they lie there");
  for_each_batch<HELD>(part, keys, [&](int first, const uint4(&keys)[kLoads]) {
    unsigned mask = mask_of_lane(keys, [&](unsigned key, int) { return key >= low && bin_of(key) == bin.index; });
    for (; mask; mask &= mask - 1) {
      const int which = __ffs(mask) - 1;
      unsigned score = 0;
      for_each_of_lane(keys, [&](unsigned key, int, int n) { score = n == which ? key : score; });
      const int position = token_of_lane(first) + which / 4 * 128 + which % 4;
      const unsigned long long entry = entry_key(score, position);
      unsigned long long* const place = contenders + bin.earlier + atomicAdd(&scratch[kListed], 1);
      if constexpr (RANKS == 1) {
        *place = entry;
      } else {
        for (int r = 0; r < RANKS; ++r) send(place, entry, mailbox(scratch), r);
      }
    }
  });
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
    for (int j = 0; j < bin.count; ++j) larger += contenders[j] > mine;
    selected = larger < need;
    if (larger == need - 1) {
      *result = {(unsigned)(mine >> kPositionBits), (int)(kLastPosition - ((unsigned)mine & kLastPosition))};
    }
  }
  before = bin.earlier_above + __syncthreads_count(selected && threadIdx.x < bin.earlier);
  cut = *result;
  return true;
}

// One digit of the radix selection by all blocks that share a row. bins: two histograms of this block, of which the digit's
// own is clear. Every thread returns with the same state; returns whether the selection is known.
template <int RANKS, int DIGIT>
__device__ __forceinline__ bool select_digit(const Part& part, int rank, int* bins, int* scratch, RadixState& state) {
  constexpr int kBefore = kDigitShift<DIGIT - 1>, kAfter = kDigitShift<DIGIT>;
  int* const mine = bins + DIGIT % 2 * kBins;
  for (int first = part.first; first < part.end; first += 128) {
    const int i = first + threadIdx.x % 32 * 4;
    float4 loaded = make_float4(0.f, 0.f, 0.f, 0.f);
    if (i < part.end) loaded = __ldcg(reinterpret_cast<const float4*>(part.scores + i));
    const float score[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const unsigned long long entry = entry_key(ordered(score[v]), i + v);
      if (i + v < part.end && (DIGIT == 0 || entry >> kBefore == state.prefix)) {
        atomicAdd(&mine[(unsigned)(entry >> kAfter) & ((1u << (kBefore - kAfter)) - 1)], 1);
      }
    }
  }
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

// Which of this lane's tokens of a batch are selected.
__device__ __forceinline__ unsigned selected_of_batch(int first, const uint4 (&keys)[kLoads], const Cut& cut) {
  const int last = cut.last - token_of_lane(first);
  return mask_of_lane(keys, [&](unsigned key, int i) { return key > cut.score || (key == cut.score && i <= last); });
}

// This lane's of the pages of a batch, if the output is slots.
__device__ __forceinline__ int fetch_page(const Part& part, int first, int form, const int* pages) {
  const int token = first + threadIdx.x % 32 * kPage;
  return form == 1 && token < part.end && token < first + kBatch ? pages[token / kPage] : 0;
}

// Writes the selected tokens of a batch from `out` on, in the form asked for; returns how many there are.
__device__ __forceinline__ int write_batch(unsigned mask, int first, int form, int page, int offset, int* out) {
  const int lane = threadIdx.x % 32;
  // The counts of the eight groups of four tokens, a byte each (at most 128 in a warp): even groups, odd groups.
  unsigned count = mask - (mask >> 1 & 0x55555555u);
  count = (count & 0x33333333u) + (count >> 2 & 0x33333333u);
  const unsigned counts[2] = {count & 0x0f0f0f0fu, count >> 4 & 0x0f0f0f0fu};
  unsigned inclusive[2], total[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    inclusive[i] = (unsigned)warp_inclusive_scan((int)counts[i]);
    total[i] = __shfl_sync(0xffffffffu, inclusive[i], 31);
  }
  int written = 0;
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    const int of_token = __shfl_sync(0xffffffffu, page, u * 2 + lane / 16);
    const int index = form == 1 ? of_token * kPage + lane * 4 % kPage : token_of_lane(first) + u * 128 + offset;
    int to = written + (int)((inclusive[u % 2] - counts[u % 2]) >> u / 2 * 8 & 0xffu);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      if (mask >> (u * 4 + v) & 1) out[to++] = index + v;
    }
    written += (int)(total[u % 2] >> u / 2 * 8 & 0xffu);
  }
  return written;
}

// Writes the selected tokens of a part. counts: one for every warp, and one more. before: tokens that are selected in the blocks
// of lower rank, if that is KNOWN already. fetched: this lane's pages of the first batch.
template <int RANKS, bool HELD, bool KNOWN>
__device__ __forceinline__ void emit_selected(const Part& part, uint4 (&keys)[kLoads], const Cut& cut, int before, int rank,
                                              int form, const int* pages, int fetched, int offset, int* counts, int* out) {
  const int warp = threadIdx.x / 32;
  unsigned mask = 0;
  int selected = 0;
  for_each_batch<HELD>(part, keys, [&](int first, const uint4(&keys)[kLoads]) {
    mask = selected_of_batch(first, keys, cut);
    selected += __popc(mask);
  });
  selected = __reduce_add_sync(0xffffffffu, selected);
  if (threadIdx.x % 32 == 0) counts[warp] = selected;
  __syncthreads();
  // Every warp learns from the counts of those before it where its own tokens go.
  int slot = 0, total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) slot += counts[i];
    total += counts[i];
  }
  if constexpr (RANKS > 1 && !KNOWN) {
    if (threadIdx.x == 0) counts[kWarps] = total;
    sync_ranks<RANKS>();
    for (int r = 0; r < rank; ++r) before += load_peer(&counts[kWarps], r);
    cluster_arrive();
  }
  slot += before;
  for_each_batch<HELD>(part, keys, [&](int first, const uint4(&keys)[kLoads]) {
    if (!HELD) mask = selected_of_batch(first, keys, cut);
    const int page = HELD ? fetched : fetch_page(part, first, form, pages);
    slot += write_batch(mask, first, form, page, offset, out + slot);
  });
  if (RANKS > 1) cluster_wait();  // a block's shared memory is there until no other reads it
}

// Selects from a row whatever its scores are. Not inlined: it must not take registers from what is done for every row.
template <int RANKS>
__device__ __noinline__ void select_by_radix(Part part, int topk, int rank, int form, const int* pages, int offset, int* bins,
                                             int* scratch, int* out) {
  const Cut cut = cut_by_radix<RANKS>(part, topk, rank, bins, scratch);
  uint4 keys[kLoads];
  emit_selected<RANKS, false, false>(part, keys, cut, 0, rank, form, pages, 0, offset, scratch, out);
}

// Selects from a row that RANKS blocks share. need_of_sample: see `bound_from_below`; fetched: see `emit_selected`.
template <int RANKS, bool HELD>
__device__ __forceinline__ void select_shared(const Part& part, int length, int topk, int need_of_sample, int rank, int form,
                                              const int* pages, int fetched, int offset, int* bins, int* scratch, int* out) {
  unsigned sample[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned at = (unsigned)(i * kThreads + threadIdx.x) * (unsigned)length / kRowSamples;
    sample[i] = ordered(__ldcg(&part.scores[at]));
  }
  uint4 keys[kLoads];
  if constexpr (HELD) load_scores(part, part.first, keys);
  Cut cut;
  int before;
  if (cut_by_sample<RANKS, HELD>(sample, need_of_sample, topk, part, keys, rank, bins, scratch, cut, before)) {
    emit_selected<RANKS, HELD, true>(part, keys, cut, before, rank, form, pages, fetched, offset, scratch, out);
  } else {
    select_by_radix<RANKS>(part, topk, rank, form, pages, offset, bins, scratch, out);
  }
}

// Selects the topk of a row of length > topk; every thread of the cluster must call this. The blocks take contiguous shares
// of the tokens, the first one all of a short row, and so do their warps; what a warp can hold it keeps in registers.
// row_scores: 16-byte aligned, with room up to a multiple of 4. bins: 2 * kBins, 16-byte aligned; scratch: 64.
//
// The scores are those of the kernel before this one, which is waited for here; nothing else is.
template <int RANKS>
__device__ __forceinline__ void select_row(const float* row_scores, int length, int topk, int rank, int form,
                                           const int* pages, int offset, int* bins, int* scratch, int* out) {
  const bool alone = RANKS == 1 || length <= kAlone;
  if (alone && rank > 0) return;
  const int warps = (alone ? 1 : RANKS) * kWarps, warp = rank * kWarps + threadIdx.x / 32;
  const int share = (length + warps * 128 - 1) / (warps * 128) * 128;  // of a warp
  const Part part = {row_scores, warp * share, min(warp * share + share, length)};
  const int fetched = fetch_page(part, part.first, form, pages);
  // As many samples as the selected tokens should hold, and five standard deviations more.
  const float expected = (float)topk * kRowSamples / length;
  const int need = min((int)(expected + 5.f * sqrtf(expected) + 2.f), kRowSamples);
  clear_bins<kThreads>(bins, kBins + kFineBins);
  if (threadIdx.x == 0) {
    scratch[kListed] = 0;
    prepare_mailbox(mailbox(scratch));
  }
  if (!alone) sync_ranks<RANKS>();
  cudaGridDependencySynchronize();
  if (RANKS > 1 && alone) {
    select_shared<1, true>(part, length, topk, need, rank, form, pages, fetched, offset, bins, scratch, out);
  } else if (share <= kBatch) {
    select_shared<RANKS, true>(part, length, topk, need, rank, form, pages, fetched, offset, bins, scratch, out);
  } else {
    select_shared<RANKS, false>(part, length, topk, need, rank, form, pages, fetched, offset, bins, scratch, out);
  }
}

}  // namespace misa
