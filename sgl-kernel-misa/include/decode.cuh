// Exact selection of a row's top k from its scores, by the thread blocks of a cluster.
#pragma once

#include "block.cuh"

namespace misa {

constexpr int kCluster = 8;  // blocks that share a row
constexpr unsigned kLastPosition = 0x3fffffu;

// Bits of a key below a digit: 11, 11 and 10 bits of the score, 11 and 11 of the position. Constants, so that the compiler
// sees which half of a key a digit lies in. -1: the whole key's bits.
template <int DIGIT>
constexpr int kDigitShift = DIGIT < 2 ? 43 - 11 * DIGIT : DIGIT == 2 ? 22 : DIGIT == 3 ? 11 : 0;

// Stores one page's scores (rr 0 and 1 of a lane's row) that the row sees.
__device__ __forceinline__ void store_scores(const float* score, int token, int length, int init, int local, float* out) {
#pragma unroll
  for (int rr = 0; rr < 2; ++rr) {
    const int position = token + rr * 8;
    if (position < length) {
      const bool forced = position < init || position >= length - local;
      out[position] = forced ? __int_as_float(0x7f800000) : score[rr];
    }
  }
}

// A barrier of all threads of a cluster, in two halves. What was written before the first is seen after the second, in
// shared memory of other blocks too. (TileLang's own let the compiler move accesses across.)
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
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

// The score of token i of a slice, as it is ordered. CACHED: from the copy in shared memory.
template <bool CACHED>
__device__ __forceinline__ unsigned slice_key(const float* scores, const unsigned* keys, int i) {
  return CACHED ? keys[i] : ordered(scores[i]);
}

// Adds the DIGITth digit of the slice's entries that share the prefix to `bins`. The first pass over a slice that is to be
// cached fills the cache. Reads up to the next multiple of 4 tokens, four at a time and eight such loads at once.
template <int THREADS, int DIGIT, bool CACHED>
__device__ __forceinline__ void count_digit(const float* scores, unsigned* keys, int first, int count,
                                            unsigned long long prefix, int* bins) {
  constexpr bool kFromCache = CACHED && DIGIT > 0;
  constexpr int kBefore = kDigitShift<DIGIT - 1>, kAfter = kDigitShift<DIGIT>;
  constexpr int kUnroll = kFromCache ? 4 : 8;
  for (int base = threadIdx.x * 4; base < count; base += THREADS * 4 * kUnroll) {
    uint4 loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * THREADS * 4;
      loaded[u] = make_uint4(0, 0, 0, 0);
      if (i < count) loaded[u] = *reinterpret_cast<const uint4*>(kFromCache ? (const void*)(keys + i) : scores + i);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * THREADS * 4;
      unsigned key[4] = {loaded[u].x, loaded[u].y, loaded[u].z, loaded[u].w};
      if (!kFromCache) {
#pragma unroll
        for (int v = 0; v < 4; ++v) key[v] = ordered(__uint_as_float(key[v]));
      }
      if (CACHED && DIGIT == 0 && i < count) {
        *reinterpret_cast<uint4*>(keys + i) = make_uint4(key[0], key[1], key[2], key[3]);
      }
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const unsigned long long entry = entry_key(key[v], first + i + v);
        const bool shares = DIGIT == 0 || entry >> kBefore == prefix;
        if (i + v < count && shares) atomicAdd(&bins[(unsigned)(entry >> kAfter) & ((1u << (kBefore - kAfter)) - 1)], 1);
      }
    }
  }
}

// One digit of the radix selection by all blocks of the cluster. bins: two histograms of this block, of which the digit's
// own is clear. Every thread of the cluster returns with the same state; returns whether the selection is known.
template <int THREADS, int DIGIT, bool CACHED>
__device__ __forceinline__ bool select_digit(const float* scores, unsigned* keys, int first, int count, int* bins,
                                             int* scratch, RadixState& state) {
  static_assert(THREADS * 4 == kBins, "a thread owns four bins");
  int* mine = bins + DIGIT % 2 * kBins;
  count_digit<THREADS, DIGIT, CACHED>(scores, keys, first, count, state.prefix, mine);
  cluster_sync();
  // All blocks have counted this digit, so none still reads the histogram of the digit before.
  clear_bins<THREADS>(bins + (DIGIT + 1) % 2 * kBins);

  const int bin = kBins - 4 - threadIdx.x * 4;  // bins in descending order
  int sums[4] = {0, 0, 0, 0};
#pragma unroll
  for (int rank = 0; rank < kCluster; ++rank) {
    const int4 peer = load_peer4(mine + bin, rank);
    sums[0] += peer.x;
    sums[1] += peer.y;
    sums[2] += peer.z;
    sums[3] += peer.w;
  }
  int total;
  int above = block_exclusive_scan<THREADS>(sums[0] + sums[1] + sums[2] + sums[3], scratch, total);
#pragma unroll
  for (int i = 3; i >= 0; --i) {
    if (above < state.need && above + sums[i] >= state.need) {  // of all bins, one
      scratch[32] = bin + i;
      scratch[33] = above;
      scratch[34] = sums[i];
    }
    above += sums[i];
  }
  __syncthreads();
  state.prefix = state.prefix << (kDigitShift<DIGIT - 1> - kDigitShift<DIGIT>) | (unsigned)scratch[32];
  state.shift = kDigitShift<DIGIT>;
  state.need -= scratch[33];
  state.done = state.need == scratch[34];
  return state.done;
}

// The state after which `radix_selected` holds for the `topk` best of all entries of the cluster's slices.
template <int THREADS, bool CACHED>
__device__ __forceinline__ RadixState select_in_cluster(const float* scores, unsigned* keys, int first, int count, int topk,
                                                        int* bins, int* scratch) {
  RadixState state = {0ull, 54, topk, 0};
  clear_bins<THREADS>(bins);
  __syncthreads();
  select_digit<THREADS, 0, CACHED>(scores, keys, first, count, bins, scratch, state) ||
      select_digit<THREADS, 1, CACHED>(scores, keys, first, count, bins, scratch, state) ||
      select_digit<THREADS, 2, CACHED>(scores, keys, first, count, bins, scratch, state) ||
      select_digit<THREADS, 3, CACHED>(scores, keys, first, count, bins, scratch, state) ||
      select_digit<THREADS, 4, CACHED>(scores, keys, first, count, bins, scratch, state);
  return state;
}

// Bits of 1024 tokens of a slice from token `start` on, those below `end` that are selected: a word of 32 tokens a lane. The
// least selected key is `least_score` at `last_position`: of that score, no later position is selected.
template <bool CACHED>
__device__ __forceinline__ unsigned selected_word(const float* scores, const unsigned* keys, int first, int start, int end,
                                                  unsigned least_score, int last_position) {
  constexpr int kUnroll = 8;
  const int lane = threadIdx.x & 31;
  unsigned mine = 0;
  for (int base = 0; base < 32 && start + base * 32 < end; base += kUnroll) {
    unsigned key[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = start + (base + u) * 32 + lane;
      key[u] = i < end ? slice_key<CACHED>(scores, keys, i) : 0;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = start + (base + u) * 32 + lane;
      const bool selected = key[u] > least_score || (key[u] == least_score && first + i <= last_position);
      const unsigned word = __ballot_sync(0xffffffffu, i < end && selected);
      if (lane == base + u) mine = word;
    }
  }
  return mine;
}

// Writes the selected positions of the cluster's slices in ascending order. Every warp owns a contiguous part of its block's
// slice, and learns from the counts of the parts before, in this block and in others, where its own positions go.
template <int THREADS, bool CACHED>
__device__ __forceinline__ void emit_in_cluster(const float* scores, const unsigned* keys, int first, int count, int share,
                                                int rank, const RadixState& state, int form, const int* pages, int offset,
                                                int* counts, int* out) {
  constexpr int kWarps = THREADS / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int start = warp * (share / kWarps), end = min(start + share / kWarps, count);
  // radix_selected(state, key): key is at least the prefix, filled with zeros.
  const unsigned long long least = state.prefix << state.shift;
  const unsigned least_score = (unsigned)(least >> 22);
  const int last_position = kLastPosition - ((unsigned)least & kLastPosition);

  unsigned word = 0;
  int selected = 0;
  for (int span = start; span < end; span += 1024) {
    word = selected_word<CACHED>(scores, keys, first, span, end, least_score, last_position);
    selected += __popc(word);
  }
  selected = __reduce_add_sync(0xffffffffu, selected);
  if (lane == 0) counts[warp] = selected;
  cluster_sync();
  int slot = 0;
  for (int i = lane; i < rank * kWarps + warp; i += 32) slot += load_peer(&counts[i % kWarps], i / kWarps);
  slot = __reduce_add_sync(0xffffffffu, slot);
  cluster_arrive();  // nothing more is read from other blocks

  for (int span = start; span < end; span += 1024) {
    // A part of one span has its bits still.
    if (end - start > 1024) word = selected_word<CACHED>(scores, keys, first, span, end, least_score, last_position);
    const int inclusive = warp_inclusive_scan(__popc(word));
    int to = slot + inclusive - __popc(word);
    for (unsigned bits = word; bits; bits &= bits - 1) {
      out[to++] = output_index(first + span + lane * 32 + __ffs(bits) - 1, form, pages, offset);
    }
    slot += __shfl_sync(0xffffffffu, inclusive, 31);
  }
  cluster_wait();  // a block's shared memory is there until no other reads it
}

// Selects the topk of a row of length > topk; every thread of the cluster must call this. Each block takes a contiguous
// slice of the tokens, and keeps it in `keys` if it is of at most `capacity`. row_scores: 16-byte aligned, with room up to a
// multiple of 4. bins: 2 * kBins; keys and bins 16-byte aligned. scratch: 64 ints.
template <int THREADS>
__device__ __forceinline__ void select_row(const float* row_scores, int length, int topk, int rank, int form,
                                           const int* pages, int offset, unsigned* keys, int capacity, int* bins,
                                           int* scratch, int* out) {
  const int share = ((length + kCluster - 1) / kCluster + THREADS - 1) / THREADS * THREADS;
  const int first = min(rank * share, length), count = min(share, length - first);
  const float* scores = row_scores + first;
  int* counts = scratch + 48;
  if (share <= capacity) {
    const RadixState state = select_in_cluster<THREADS, true>(scores, keys, first, count, topk, bins, scratch);
    emit_in_cluster<THREADS, true>(scores, keys, first, count, share, rank, state, form, pages, offset, counts, out);
  } else {
    const RadixState state = select_in_cluster<THREADS, false>(scores, keys, first, count, topk, bins, scratch);
    emit_in_cluster<THREADS, false>(scores, keys, first, count, share, rank, state, form, pages, offset, counts, out);
  }
}

}  // namespace misa
