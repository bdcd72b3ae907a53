// How the blocks of `decode_score` share the pages of a batch, and what they do with a page's scores.
#pragma once

#include "barrier.cuh"
#include "block.cuh"
#include "gather.cuh"

namespace misa {

constexpr int kChunk = 4;       // pages that are dealt out at a time
constexpr int kShareDealt = 8;  // of all pages the last 1 / 8 are dealt out
constexpr int kFewPages = 32;   // a block: with fewer none are

// A block's way through the pages of a batch. The pages of all sequences that need a selection lie end to end. Every block takes
// an equal part of the first of them, and the last ones are dealt out to those that are ready for more: no SM is as fast as the
// others, or is free as early. A segment is what a block takes of one sequence at a time.
struct Walk {
  int sequence;
  int page;     // of the sequence
  int left;     // pages of the segment after this one
  int segment;  // pages of the segment
  int first;    // pages of the sequences before
  int next;     // page of the batch after the segment
  int end;      // page of the batch after those taken
  int fetched;  // this lane's of the pages that are fetched 32 at a time
  int asked;    // lane 0: what the last question has brought, pages after `dealt`; -1 before the first one
  int dealt;    // page of the batch from which on they are dealt out
  int all;      // pages of the batch
};

constexpr int kWalkInts = sizeof(Walk) / sizeof(int);  // that the kernel sets aside

// Pages of a sequence that are scored: none if all its rows see at most topk tokens.
__device__ __forceinline__ int scored_pages(const int* lengths, int sequence, int rows_per_seq, int topk) {
  int longest = 0;
  for (int r = 0; r < rows_per_seq; ++r) longest = max(longest, lengths[sequence * rows_per_seq + r]);
  return longest > topk ? (longest + kPage - 1) / kPage : 0;
}

// As with the others here, every lane of a warp must call it.
__device__ __forceinline__ void walk_begin(int* walk, const int* lengths, int batch, int rows_per_seq, int topk, int block,
                                           int blocks) {
  int all = 0;
  for (int i = threadIdx.x & 31; i < batch; i += 32) all += scored_pages(lengths, i, rows_per_seq, topk);
  all = __reduce_add_sync(0xffffffffu, all);
  const int dealt = all - (all < blocks * kFewPages ? 0 : all / kShareDealt);
  const int share = dealt / blocks, rest = dealt % blocks;  // the first `rest` blocks take one page more
  const int begin = block * share + min(block, rest), end = begin + share + (block < rest);
  *reinterpret_cast<Walk*>(walk) = {0, 0, 0, 0, 0, begin, end, 0, -1, dealt, all};
}

// Goes to the block's next page and returns its place in the cache, or -1 if there is none. dealt: pages that were dealt out,
// which is 0 when the kernel before this one ends.
__device__ __forceinline__ int walk_to_page(int* walk_, const int* lengths, int batch, int rows_per_seq, int topk,
                                            const int* page_table, int table_stride, int* dealt) {
  Walk& walk = *reinterpret_cast<Walk*>(walk_);
  const int lane = threadIdx.x & 31;
  if (walk.left > 0) {
    --walk.left;
    ++walk.page;
  } else {
    if (walk.next == walk.end) {
      if (walk.dealt == walk.all) return -1;
      if (__shfl_sync(0xffffffffu, walk.asked, 0) < 0) {
        cudaGridDependencySynchronize();
        if (lane == 0) walk.asked = atomicAdd(dealt, kChunk);
      }
      walk.next = walk.dealt + __shfl_sync(0xffffffffu, walk.asked, 0);
      if (walk.next >= walk.all) return -1;
      walk.end = min(walk.next + kChunk, walk.all);
      if (lane == 0) walk.asked = atomicAdd(dealt, kChunk);  // for the next time: the answer takes a while
    }
    // The sequence that holds page `next` of the batch is this one or a later one: 32 of them at a time.
    int pages = 0;
    while (true) {
      const int mine = walk.sequence + lane;
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
  }
  const int at = walk.segment - 1 - walk.left;
  if (at % 32 == 0 && lane <= walk.left) {
    walk.fetched = page_table[(long long)walk.sequence * table_stride + walk.page + lane];
  }
  return __shfl_sync(0xffffffffu, walk.fetched, at % 32);
}

// Three numbers for other warps, that they read behind a barrier.
__device__ __forceinline__ void write_note(int* note, int first, int second, int third) {
  if (threadIdx.x % 32 == 0) *reinterpret_cast<int4*>(note) = make_int4(first, second, third, 0);
}

__device__ __forceinline__ void read_note(const int* note, int* numbers) {
  int unused;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(numbers[0]), "=r"(numbers[1]), "=r"(numbers[2]), "=r"(unused)
               : "r"((unsigned)__cvta_generic_to_shared(note))
               : "memory");
}

// A warp copies what it takes to score a sequence: q_shared holds the queries of its rows' heads, column `i * 8 + t * 2 + b` that
// of head i * 2 + b of row t, as TileLang's wgmma reads them (rows of 128 bytes whose 16-byte pieces are swizzled by the row
// modulo 8); gates, HEADS of four rows; seen, four rows' lengths. Nothing is written for rows that are not there.
template <int HEADS>
__device__ __forceinline__ void load_sequence(const void* q, const float* weights, const int* active, const int* lengths,
                                              int sequence, int rows_per_seq, int num_heads, int active_heads, void* queries, int slot,
                                              float* gates, int* seen) {
  char* const q_shared = (char*)queries + slot * kMaxRows * HEADS * 128;
  const int lane = threadIdx.x % 32, first_row = sequence * rows_per_seq;
  const auto head_of = [&](int row, int j) { return active[(first_row + row) * active_heads + min(j, active_heads - 1)]; };
  // Eight lanes copy a query.
#pragma unroll 8
  for (int i = lane / 8; i < rows_per_seq * HEADS; i += 4) {
    const int row = i / HEADS, j = i % HEADS, column = j / 2 * 8 + row * 2 + j % 2, piece = lane % 8;
    const long long query = (long long)(first_row + row) * num_heads + head_of(row, j);
    cp_async_16(q_shared + column * 128 + (piece ^ column % 8) * 16, (const char*)q + query * 128 + piece * 16);
  }
#pragma unroll 1
  for (int i = lane; i < rows_per_seq * HEADS; i += 32) {
    const int row = i / HEADS, j = i % HEADS;
    gates[i] = j < active_heads ? weights[(long long)(first_row + row) * num_heads + head_of(row, j)] : 0.f;
  }
  if (lane < rows_per_seq) seen[lane] = lengths[first_row + lane];
  asm volatile("cp.async.wait_all;" ::: "memory");
  fence_async();
}

// Reads the gates of a row from shared memory.
template <int HEADS>
__device__ __forceinline__ void load_gates(const float* from, float* gate) {
#pragma unroll
  for (int i = 0; i < HEADS; i += 4) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(gate[i]), "=f"(gate[i + 1]), "=f"(gate[i + 2]), "=f"(gate[i + 3])
                 : "r"((unsigned)__cvta_generic_to_shared(from + i))
                 : "memory");
  }
}

// A number from shared memory; not to be read before the barrier that says it is there was waited for.
__device__ __forceinline__ float load_scale(const float* scale) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"((unsigned)__cvta_generic_to_shared(scale)) : "memory");
  return value;
}

__device__ __forceinline__ int load_length(const int* length) {
  int value;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"((unsigned)__cvta_generic_to_shared(length)) : "memory");
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
