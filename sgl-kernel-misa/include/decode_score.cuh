// How the blocks of `decode_score` share the pages of a batch, and what they do with a page's scores.
#pragma once

#include "barrier.cuh"
#include "block.cuh"

namespace misa {

// A block's way through the pages of a batch. The pages of all sequences that need a selection lie end to end, and every block
// takes an equal part of them. A segment is what a part has of one sequence.
struct Walk {
  int sequence;
  int page;     // of the sequence
  int left;     // pages of the segment after this one
  int segment;  // pages of the segment
  int first;    // pages of the sequences before
  int next;     // page of the batch after the segment
  int end;      // page of the batch after the block's part
  int fetched;  // this lane's of the pages that are fetched 32 at a time
};

static_assert(sizeof(Walk) == 8 * sizeof(int), "the kernel sets 8 ints aside");

// Pages of a sequence that are scored: none if all its rows see at most topk tokens.
__device__ __forceinline__ int scored_pages(const int* lengths, int sequence, int rows_per_seq, int topk) {
  int longest = 0;
  for (int r = 0; r < rows_per_seq; ++r) longest = max(longest, lengths[sequence * rows_per_seq + r]);
  return longest > topk ? (longest + kPage - 1) / kPage : 0;
}

// Returns how many pages the block takes in all. As with the others here, every lane of a warp must call it.
__device__ __forceinline__ int walk_begin(int* walk, const int* lengths, int batch, int rows_per_seq, int topk, int block,
                                          int blocks) {
  int total = 0;
  for (int i = threadIdx.x & 31; i < batch; i += 32) total += scored_pages(lengths, i, rows_per_seq, topk);
  total = __reduce_add_sync(0xffffffffu, total);
  const int share = total / blocks, rest = total % blocks;  // the first `rest` blocks take one page more
  const int begin = block * share + min(block, rest), count = share + (block < rest);
  *reinterpret_cast<Walk*>(walk) = {0, 0, 0, 0, 0, begin, begin + count, 0};
  return count;
}

// Goes to the block's next page; returns whether a segment begins with it. There must be one.
__device__ __forceinline__ bool walk_step(int* walk_, const int* lengths, int batch, int rows_per_seq, int topk) {
  Walk& walk = *reinterpret_cast<Walk*>(walk_);
  if (walk.left > 0) {
    --walk.left;
    ++walk.page;
    return false;
  }
  // The sequence that holds page `next` of the batch is this one or a later one: 32 of them at a time.
  int pages = 0;
  while (true) {
    const int lane = threadIdx.x & 31, mine = walk.sequence + lane;
    pages = mine < batch ? scored_pages(lengths, mine, rows_per_seq, topk) : 0;
    const int after = walk.first + warp_inclusive_scan(pages);
    const unsigned holds = __ballot_sync(0xffffffffu, after > walk.next);
    const int lane_of = holds ? __ffs(holds) - 1 : 31;
    walk.first = __shfl_sync(0xffffffffu, holds ? after - pages : after, lane_of);
    pages = __shfl_sync(0xffffffffu, pages, lane_of);
    walk.sequence += holds ? lane_of : 32;
    if (holds) break;
  }
  walk.page = walk.next - walk.first;
  walk.segment = min(walk.end - walk.next, pages - walk.page);
  walk.left = walk.segment - 1;
  walk.next += walk.segment;
  return true;
}

// The same, and returns the page's place in the cache.
__device__ __forceinline__ int walk_to_page(int* walk_, const int* lengths, int batch, int rows_per_seq, int topk,
                                            const int* page_table, int table_stride) {
  walk_step(walk_, lengths, batch, rows_per_seq, topk);
  Walk& walk = *reinterpret_cast<Walk*>(walk_);
  const int at = walk.segment - 1 - walk.left, lane = threadIdx.x & 31;
  if (at % 32 == 0 && lane <= walk.left) {
    walk.fetched = page_table[(long long)walk.sequence * table_stride + walk.page + lane];
  }
  return __shfl_sync(0xffffffffu, walk.fetched, at % 32);
}

// A scale that the streaming warp has copied; not to be read before the barrier that says so was waited for.
__device__ __forceinline__ float load_scale(const float* scale) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"((unsigned)__cvta_generic_to_shared(scale)) : "memory");
  return value;
}

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

}  // namespace misa
