// Selection among a row's candidates by the scores of all heads.
//
// Why this is CUDA: radix selection is (cta.cuh), and so are loads from another CTA's shared memory (cluster.cuh).
#pragma once

#include "cta.cuh"
#include "cluster.cuh"
#include "gather.cuh"

namespace misa {

// The slots of the cache of a CTA's part of the listed positions, entries `first` .. `first + share`; returns how many
// positions are on the whole list, which ends at its first -1.
template <int THREADS>
__device__ __forceinline__ int list_slots(const int* list, int capacity, int first, int share, const int* pages,
                                          unsigned* slots, int* scratch) {
  int mine = 0, count;
#pragma unroll 8
  for (int i = threadIdx.x; i < capacity; i += THREADS) {
    const int position = list[i];
    const unsigned slot = slot_of(max(position, 0), pages);  // without a condition: all loads are under way together
    if (i >= first && i < first + share) slots[i - first] = slot;
    mine += position >= 0;
  }
  cta_exclusive_scan<THREADS>(mine, scratch, count);
  return count;
}

// Collects the scores of the list in the first CTA of a cluster; every CTA has those of its part at the start of its own
// `scores`, 16-byte aligned. All CTAs must call this.
template <int THREADS, int RANKS>
__device__ __forceinline__ void collect_scores(unsigned* scores, int share, int count, int rank) {
  cluster_arrive();
  cluster_wait();  // all CTAs' scores are written
  if (rank == 0) {
#pragma unroll
    for (int peer = 1; peer < RANKS; ++peer) {
      const int size = min(count - peer * share, share);
      for (int i = threadIdx.x * 4; i < size; i += THREADS * 4) {
        *reinterpret_cast<int4*>(scores + peer * share + i) = load_peer4(reinterpret_cast<int*>(scores + i), peer);
      }
    }
  }
  cluster_arrive();
  cluster_wait();  // the first CTA has read them: the others may end
}

// Selects `need` of `count` listed positions, given their scores as ordered keys, and writes them in the order of the list,
// which is ascending: of equal scores, too, the first are selected. histogram: kBins ints, 16-byte aligned.
template <int THREADS>
__device__ __forceinline__ void select_listed(const int* list, const unsigned* scores, int count, int need,
                                              void* histogram, int* scratch, int form, const int* pages, int offset,
                                              int* out) {
  int* const bins = (int*)histogram;
  // Scores with a larger prefix are selected, and `need` of those that share it.
  unsigned prefix = 0;
  int left = 32;
  for (bool settled = need == count; left > 0 && !settled;) {
    const int width = min(left, 11);
    left -= width;
    clear_bins<THREADS>(bins);
    __syncthreads();
#pragma unroll 8
    for (int i = threadIdx.x; i < count; i += THREADS) {
      const unsigned key = scores[i] >> left;
      if (key >> width == prefix) atomicAdd(&bins[key & ((1u << width) - 1)], 1);
    }
    __syncthreads();
    find_bin<THREADS>(bins, need, scratch, scratch + 32);
    prefix = prefix << width | (unsigned)scratch[32];
    need -= scratch[33];
    settled = need == scratch[34];
  }
  // Each warp takes a contiguous part of the list: it counts its own, then writes behind those of the warps before.
  constexpr int kWarps = THREADS / 32, kUnroll = 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int share = (count + kWarps * 32 - 1) / (kWarps * 32) * 32;
  const int first = warp * share, last = min(first + share, count);
  // Of an entry, whether it is selected for certain, and whether it is one of those of which the first are. Without a branch: all loads are
  // under way together.
  const auto compare = [&](int i, bool& above, bool& tied) {
    const unsigned key = left < 32 ? scores[min(i, last - 1)] >> left : 0u;
    above = i < last && key > prefix;
    tied = i < last && key == prefix;
  };
  int num_above = 0, num_tied = 0;
#pragma unroll 4
  for (int i = first + lane; i < last; i += 32) {
    bool above, tied;
    compare(i, above, tied);
    num_above += above;
    num_tied += tied;
  }
  num_above = __reduce_add_sync(0xffffffffu, num_above);
  num_tied = __reduce_add_sync(0xffffffffu, num_tied);
  __syncthreads();
  if (lane == 0) {
    scratch[warp] = num_above;
    scratch[kWarps + warp] = num_tied;
  }
  __syncthreads();
  int slot = 0;
  for (int i = 0; i < warp; ++i) {
    const int taken = min(scratch[kWarps + i], need);
    slot += scratch[i] + taken;
    need -= taken;
  }
  const unsigned before = (1u << lane) - 1;
  for (int base = first; base < last; base += 32 * kUnroll) {
    int position[kUnroll];
    bool above[kUnroll], tied[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * 32 + lane;
      position[u] = list[min(i, last - 1)];
      compare(i, above[u], tied[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const unsigned ties = __ballot_sync(0xffffffffu, tied[u]);
      const bool selected = above[u] || (tied[u] && __popc(ties & before) < need);
      const unsigned vote = __ballot_sync(0xffffffffu, selected);
      if (selected) out[slot + __popc(vote & before)] = output_index(position[u], form, pages, offset);
      slot += __popc(vote);
      need -= min(__popc(ties), need);
    }
  }
}

}  // namespace misa
