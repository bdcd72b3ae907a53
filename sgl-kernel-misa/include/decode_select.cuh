// Exact selection of a row's top k from its scores, by the thread blocks of a cluster.
#pragma once

#include <cstdint>

#include "block.cuh"

namespace misa {

constexpr int kCluster = 8;         // blocks that may share a row
constexpr int kAlone = 8192;        // tokens of a row that one block selects from by itself
constexpr int kRowSamples = 1024;   // scores that bound the k-th one from below
constexpr int kContenders = 512;    // scores of a bin that are compared one with another
static_assert(2 * kContenders * sizeof(int64_t) <= kBins * sizeof(int), "they lie in the second histogram");
constexpr unsigned kLastPosition = 0x3fffffu;

// The entries of a row that are selected: those of a score over `score`, and of that score up to position `last`.
struct Cut {
  unsigned score;  // as an ordered key
  int last;
};

// A block's slice of a row. scores: from the slice's first token on; keys: its copy in shared memory, if CACHED.
// The scores may have been written while this kernel ran already, so they are read through L2.
struct Slice {
  const float* scores;
  unsigned* keys;
  int first, count;  // tokens of the row
  int rank, ranks;   // this block and all that share the row
};

// Bits of a key below a digit: 11, 11 and 10 bits of the score, 11 and 11 of the position. Constants, so that the compiler
// sees which half of a key a digit lies in. -1: the whole key's bits.
template <int DIGIT>
constexpr int kDigitShift = DIGIT < 2 ? 43 - 11 * DIGIT : DIGIT == 2 ? 22 : DIGIT == 3 ? 11 : 0;

// Waits until a sequence is scored, by a kernel that may still be running. Every thread of a block must call this.
__device__ __forceinline__ void wait_for_progress(const int* progress, int pages) {
  if (threadIdx.x == 0) {
    int done;
    while (true) {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(progress) : "memory");
      if (done >= pages) break;
      __nanosleep(100);
    }
  }
  __syncthreads();
}

// A barrier of all threads of a cluster, in two halves. What was written before the first is seen after the second, in
// shared memory of other blocks too. (TileLang's own let the compiler move accesses across.)
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// A barrier of all threads of the blocks that share a row: one, or all of the cluster.
__device__ __forceinline__ void sync_ranks(int ranks) {
  if (ranks == 1) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
}

// Reads a block's copy of what `address` is in this block's shared memory.
__device__ __forceinline__ unsigned peer_address(const void* address, int rank) {
  unsigned peer;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(peer)
               : "r"((unsigned)__cvta_generic_to_shared(address)), "r"(rank));
  return peer;
}

__device__ __forceinline__ int load_peer(const int* address, int rank) {
  int value;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(value) : "r"(peer_address(address, rank)) : "memory");
  return value;
}

__device__ __forceinline__ int4 load_peer4(const int* address, int rank) {
  int4 value;
  asm volatile("ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(peer_address(address, rank))
               : "memory");
  return value;
}

// The score of token i of a slice, as it is ordered.
template <bool CACHED>
__device__ __forceinline__ unsigned slice_key(const Slice& slice, int i) {
  return CACHED ? slice.keys[i] : ordered(__ldcg(&slice.scores[i]));
}

// Calls visit(key, i) for every token i of a slice, four adjacent tokens a thread and several such loads at once.
template <int THREADS, bool CACHED, typename Visit>
__device__ __forceinline__ void for_each(const Slice& slice, Visit visit) {
  constexpr int kUnroll = CACHED ? 4 : 8;
  for (int base = threadIdx.x * 4; base < slice.count; base += THREADS * 4 * kUnroll) {
    uint4 loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * THREADS * 4;
      loaded[u] = make_uint4(0, 0, 0, 0);
      if (i < slice.count) {
        loaded[u] = CACHED ? *reinterpret_cast<const uint4*>(slice.keys + i)
                           : __ldcg(reinterpret_cast<const uint4*>(slice.scores + i));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * THREADS * 4;
      const unsigned key[4] = {loaded[u].x, loaded[u].y, loaded[u].z, loaded[u].w};
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        if (i + v < slice.count) visit(CACHED ? key[v] : ordered(__uint_as_float(key[v])), i + v);
      }
    }
  }
}

// Fills a slice's keys. Up to the next multiple of 4 tokens what is behind the slice comes along.
template <int THREADS>
__device__ __forceinline__ void cache_slice(const Slice& slice) {
  constexpr int kUnroll = 8;
  for (int base = threadIdx.x * 4; base < slice.count; base += THREADS * 4 * kUnroll) {
    uint4 loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * THREADS * 4;
      if (i < slice.count) loaded[u] = __ldcg(reinterpret_cast<const uint4*>(slice.scores + i));
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * THREADS * 4;
      if (i < slice.count) {
        *reinterpret_cast<uint4*>(slice.keys + i) =
            make_uint4(ordered(__uint_as_float(loaded[u].x)), ordered(__uint_as_float(loaded[u].y)),
                       ordered(__uint_as_float(loaded[u].z)), ordered(__uint_as_float(loaded[u].w)));
      }
    }
  }
}

// The bin that holds the `need`-th largest entry of the sum of all blocks' histograms of 2048 bins; nothing is found if there
// are fewer entries. result[0 .. 2]: the bin, entries in bins above it, entries in it. Returns the number of entries.
template <int THREADS>
__device__ __forceinline__ int find_bin_of_all(const int* bins, int need, int ranks, int* scratch, int* result) {
  static_assert(THREADS * 4 == kBins, "a thread owns four bins");
  const int bin = kBins - 4 - threadIdx.x * 4;  // bins in descending order
  int sums[4] = {0, 0, 0, 0};
#pragma unroll
  for (int rank = 0; rank < kCluster; ++rank) {
    if (rank >= ranks) break;
    const int4 peer = ranks == 1 ? *reinterpret_cast<const int4*>(bins + bin) : load_peer4(bins + bin, rank);
    sums[0] += peer.x;
    sums[1] += peer.y;
    sums[2] += peer.z;
    sums[3] += peer.w;
  }
  int total;
  int above = block_exclusive_scan<THREADS>(sums[0] + sums[1] + sums[2] + sums[3], scratch, total);
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    if (above < need && above + sums[i] >= need) {  // of all bins, one
      result[0] = bin + i;
      result[1] = above;
      result[2] = sums[i];
    }
    above += sums[i];
  }
  __syncthreads();
  return total;
}

// A score that the k-th one of the row should not lie under, from a sample of the row; every block finds the same. And the
// shift that spreads the sample's scores from there on over the bins.
template <int THREADS>
__device__ __forceinline__ unsigned bound_from_below(const float* row_scores, int length, int topk, int* scratch, int& shift) {
  constexpr int kPer = kRowSamples / THREADS;
  unsigned sample[kPer], top = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const unsigned at = (unsigned)(i * THREADS + threadIdx.x) * (unsigned)length / kRowSamples;
    sample[i] = ordered(__ldcg(&row_scores[at]));
    top = max(top, sample[i]);
  }
  top = __reduce_max_sync(0xffffffffu, top);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = (int)top;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) top = max(top, (unsigned)scratch[i]);
  // As many samples as the selected tokens should hold, and five standard deviations more.
  const float expected = (float)topk * kRowSamples / length;
  const int need = min((int)(expected + 5.f * sqrtf(expected) + 2.f), kRowSamples);
  unsigned low = 0, high = top;
  // The largest bound that `need` samples reach, or one that not many more do.
  while (low < high) {
    const unsigned middle = high - (high - low) / 2;
    int reach = 0;
#pragma unroll
    for (int i = 0; i < kPer; ++i) reach += __syncthreads_count(sample[i] >= middle);
    if (reach >= need) {
      low = middle;
      if (reach <= need + need / 16) break;
    } else {
      high = middle - 1;
    }
  }
  shift = max(0, 32 - __clz(top - low) - 11);
  return low;
}

// The cut between a row's topk best and the others, by a histogram of the scores over a bound that a sample gives. False if
// the scores are too unevenly spread for that. bins: kBins that are cleared, and as many.
template <int THREADS>
__device__ __forceinline__ bool cut_by_sample(const float* row_scores, int length, int topk, const Slice& slice, int* bins,
                                              int* scratch, Cut& cut) {
  int shift;
  const unsigned low = bound_from_below<THREADS>(row_scores, length, topk, scratch, shift);
  for_each<THREADS, true>(slice, [&](unsigned key, int) {
    if (key >= low) atomicAdd(&bins[min((key - low) >> shift, kBins - 1u)], 1);
  });
  int* const result = scratch + 32;
  int* const listed = scratch + 40;
  if (threadIdx.x == 0) *listed = 0;
  sync_ranks(slice.ranks);
  if (find_bin_of_all<THREADS>(bins, topk, slice.ranks, scratch, result) < topk) return false;
  const unsigned bin = result[0];
  const int need = topk - result[1], count = result[2];
  if (need == count) {
    cut = {low + (bin << shift), (int)kLastPosition};
    return true;
  }
  if (count > kContenders) return false;

  // The k-th entry is one of a few: each block lists its own, then all see all of them.
  int64_t* const contenders = reinterpret_cast<int64_t*>(bins + kBins);
  for_each<THREADS, true>(slice, [&](unsigned key, int i) {
    if (key >= low && min((key - low) >> shift, kBins - 1u) == bin) {
      contenders[atomicAdd(listed, 1)] = (int64_t)entry_key(key, slice.first + i);
    }
  });
  sync_ranks(slice.ranks);
  int64_t* const all = contenders + kContenders;
  int before = 0;
  for (int rank = 0; rank < slice.ranks; ++rank) {
    const int size = slice.ranks == 1 ? *listed : load_peer(listed, rank);
    for (int i = threadIdx.x; i < size; i += THREADS) {
      const int* entry = reinterpret_cast<const int*>(contenders + i);
      const unsigned low_half = slice.ranks == 1 ? entry[0] : load_peer(entry, rank);
      const unsigned high_half = slice.ranks == 1 ? entry[1] : load_peer(entry + 1, rank);
      all[before + i] = (int64_t)((unsigned long long)high_half << 32 | low_half);
    }
    before += size;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const int64_t mine = all[i];  // keys of 54 bits
    int larger = 0;
    for (int j = 0; j < count; ++j) larger += all[j] > mine;
    if (larger == need - 1) {
      result[4] = (int)(unsigned)(mine >> kPositionBits);
      result[5] = (int)(kLastPosition - ((unsigned)mine & kLastPosition));
    }
  }
  __syncthreads();
  cut = {(unsigned)result[4], result[5]};
  return true;
}

// One digit of the radix selection by all blocks that share a row. bins: two histograms of this block, of which the digit's
// own is clear. Every thread returns with the same state; returns whether the selection is known.
template <int THREADS, int DIGIT, bool CACHED>
__device__ __forceinline__ bool select_digit(const Slice& slice, int* bins, int* scratch, RadixState& state) {
  constexpr int kBefore = kDigitShift<DIGIT - 1>, kAfter = kDigitShift<DIGIT>;
  int* const mine = bins + DIGIT % 2 * kBins;
  int* const result = scratch + 32;
  for_each<THREADS, CACHED>(slice, [&](unsigned key, int i) {
    const unsigned long long entry = entry_key(key, slice.first + i);
    if (DIGIT == 0 || entry >> kBefore == state.prefix) {
      atomicAdd(&mine[(unsigned)(entry >> kAfter) & ((1u << (kBefore - kAfter)) - 1)], 1);
    }
  });
  sync_ranks(slice.ranks);
  // All blocks have counted this digit, so none still reads the histogram of the digit before.
  clear_bins<THREADS>(bins + (DIGIT + 1) % 2 * kBins);
  find_bin_of_all<THREADS>(mine, state.need, slice.ranks, scratch, result);
  state.prefix = state.prefix << (kBefore - kAfter) | (unsigned)result[0];
  state.shift = kAfter;
  state.need -= result[1];
  state.done = state.need == result[2];
  return state.done;
}

// The cut whatever the scores are: up to five digits, each counted over all tokens. bins: two histograms; other blocks may
// still read the first.
template <int THREADS, bool CACHED>
__device__ __forceinline__ Cut cut_by_radix(const Slice& slice, int topk, int* bins, int* scratch) {
  RadixState state = {0ull, kPositionBits + 32, topk, 0};
  sync_ranks(slice.ranks);
  clear_bins<THREADS>(bins);
  __syncthreads();
  select_digit<THREADS, 0, CACHED>(slice, bins, scratch, state) || select_digit<THREADS, 1, CACHED>(slice, bins, scratch, state) ||
      select_digit<THREADS, 2, CACHED>(slice, bins, scratch, state) || select_digit<THREADS, 3, CACHED>(slice, bins, scratch, state) ||
      select_digit<THREADS, 4, CACHED>(slice, bins, scratch, state);
  // radix_selected(state, key): key is at least the prefix, filled with zeros.
  const unsigned long long least = state.prefix << state.shift;
  return {(unsigned)(least >> kPositionBits), (int)(kLastPosition - ((unsigned)least & kLastPosition))};
}

// Bits of 1024 tokens of a slice from token `start` on, those below `end` that are selected: a word of 32 tokens a lane.
template <bool CACHED>
__device__ __forceinline__ unsigned selected_word(const Slice& slice, int start, int end, const Cut& cut) {
  constexpr int kUnroll = 8;
  const int lane = threadIdx.x & 31;
  unsigned mine = 0;
  for (int base = 0; base < 32 && start + base * 32 < end; base += kUnroll) {
    unsigned key[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = start + (base + u) * 32 + lane;
      key[u] = i < end ? slice_key<CACHED>(slice, i) : 0;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = start + (base + u) * 32 + lane;
      const bool selected = key[u] > cut.score || (key[u] == cut.score && slice.first + i <= cut.last);
      const unsigned word = __ballot_sync(0xffffffffu, i < end && selected);
      if (lane == base + u) mine = word;
    }
  }
  return mine;
}

// Writes the selected positions of the row in ascending order. Every warp owns a contiguous part of its block's slice, and
// learns from the counts of the parts before, in this block and in others, where its own positions go.
template <int THREADS, bool CACHED>
__device__ __forceinline__ void emit_selected(const Slice& slice, int share, const Cut& cut, int form, const int* pages,
                                              int offset, int* counts, int* out) {
  constexpr int kWarps = THREADS / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int start = warp * (share / kWarps), end = min(start + share / kWarps, slice.count);
  unsigned word = 0;
  int selected = 0;
  for (int span = start; span < end; span += 1024) {
    word = selected_word<CACHED>(slice, span, end, cut);
    selected += __popc(word);
  }
  selected = __reduce_add_sync(0xffffffffu, selected);
  if (lane == 0) counts[warp] = selected;
  sync_ranks(slice.ranks);
  int slot = 0;
  for (int i = lane; i < slice.rank * kWarps + warp; i += 32) {
    slot += slice.ranks == 1 ? counts[i] : load_peer(&counts[i % kWarps], i / kWarps);
  }
  slot = __reduce_add_sync(0xffffffffu, slot);
  if (slice.ranks > 1) cluster_arrive();  // nothing more is read from other blocks

  for (int span = start; span < end; span += 1024) {
    // A part of one span has its bits still.
    if (end - start > 1024) word = selected_word<CACHED>(slice, span, end, cut);
    const int inclusive = warp_inclusive_scan(__popc(word));
    int to = slot + inclusive - __popc(word);
    for (unsigned bits = word; bits; bits &= bits - 1) {
      out[to++] = output_index(slice.first + span + lane * 32 + __ffs(bits) - 1, form, pages, offset);
    }
    slot += __shfl_sync(0xffffffffu, inclusive, 31);
  }
  if (slice.ranks > 1) cluster_wait();  // a block's shared memory is there until no other reads it
}

// Selects the topk of a row of length > topk; every thread of the cluster must call this. The blocks take contiguous slices
// of the tokens, the first one all of a short row; a slice of at most `capacity` is kept in `keys`. row_scores: 16-byte
// aligned, with room up to a multiple of 4. bins: 2 * kBins, scratch: 64; both 16-byte aligned.
template <int THREADS>
__device__ __forceinline__ void select_row(const float* row_scores, int length, int topk, int rank, int form,
                                           const int* pages, int offset, unsigned* keys, int capacity, int* bins,
                                           int* scratch, int* out) {
  const int ranks = length <= kAlone ? 1 : kCluster;
  if (rank >= ranks) return;
  const int share = ((length + ranks - 1) / ranks + THREADS - 1) / THREADS * THREADS;
  const int first = min(rank * share, length);
  const Slice slice = {row_scores + first, keys, first, min(share, length - first), rank, ranks};
  int* const counts = scratch + 48;
  if (share <= capacity) {
    cache_slice<THREADS>(slice);
    clear_bins<THREADS>(bins);
    __syncthreads();
    Cut cut;
    if (!cut_by_sample<THREADS>(row_scores, length, topk, slice, bins, scratch, cut)) {
      cut = cut_by_radix<THREADS, true>(slice, topk, bins, scratch);
    }
    emit_selected<THREADS, true>(slice, share, cut, form, pages, offset, counts, out);
  } else {
    const Cut cut = cut_by_radix<THREADS, false>(slice, topk, bins, scratch);
    emit_selected<THREADS, false>(slice, share, cut, form, pages, offset, counts, out);
  }
}

}  // namespace misa
