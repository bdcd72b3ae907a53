// The page scheduler of `decode_score`, and what it does with a page's scores.
//
// Why this is CUDA: the scheduler is a struct in registers and a loop of votes, which TileLang has no functions for. What is loaded
// from shared memory is loaded by volatile instructions, because TileLang's waits for an mbarrier do not tell the compiler that memory
// is accessed: it might load before. The queries are copied asynchronously, each from where its head is.
#pragma once

#include <cstddef>

#include "barrier.cuh"
#include "cta.cuh"
#include "gather.cuh"
#include "queries.cuh"

namespace misa {

constexpr int kChunk = 4;       // pages that are dealt out at a time
constexpr int kShareDealt = 8;  // of all pages the last 1 / 8 are dealt out
constexpr int kFewPages = 32;   // a CTA: with fewer none are

// The page scheduler of a CTA. The pages of all sequences that need a selection lie end to end. Every CTA takes an equal part of the
// first of them. The last ones are dealt out, kChunk pages a ticket, to those that are ready for more: no SM is as fast as the
// others, or is free as early. A segment is what a CTA takes of one sequence at a time.
struct PageScheduler {
  int sequence;
  int page;     // of the sequence
  int left;     // pages of the segment after this one
  int segment;  // pages of the segment
  int first;    // pages of the sequences before
  int next;     // page of the batch after the segment
  int end;      // page of the batch after those taken
  int fetched;  // this lane's of the pages that are fetched 32 at a time
  int ticket;   // lane 0: the next one, in pages after `dealt`; -1 before the first was drawn
  int dealt;    // page of the batch from which on they are dealt out
  int all;      // pages of the batch
};

// Ints that the kernel sets aside for it, and the places of those that the kernel reads.
constexpr int kSchedulerInts = sizeof(PageScheduler) / sizeof(int);
constexpr int kSequence = offsetof(PageScheduler, sequence) / sizeof(int),
              kSequencePage = offsetof(PageScheduler, page) / sizeof(int);
constexpr int kLeft = offsetof(PageScheduler, left) / sizeof(int),
              kSegment = offsetof(PageScheduler, segment) / sizeof(int);

// Pages of a sequence that are scored: none if all its rows see at most topk tokens.
__device__ __forceinline__ int scored_pages(const int* lengths, int sequence, int rows_per_seq, int topk) {
  int longest = 0;
  for (int r = 0; r < rows_per_seq; ++r) longest = max(longest, lengths[sequence * rows_per_seq + r]);
  return longest > topk ? (longest + kPage - 1) / kPage : 0;
}

// As with the others here, every lane of a warp must call it.
__device__ __forceinline__ void scheduler_begin(int* scheduler, const int* lengths, int batch, int rows_per_seq,
                                                int topk, int cta, int ctas) {
  int all = 0;
  for (int i = threadIdx.x & 31; i < batch; i += 32) all += scored_pages(lengths, i, rows_per_seq, topk);
  all = __reduce_add_sync(0xffffffffu, all);
  const int dealt = all - (all < ctas * kFewPages ? 0 : all / kShareDealt);
  const int share = dealt / ctas, rest = dealt % ctas;  // the first `rest` CTAs take one page more
  const int begin = cta * share + min(cta, rest), end = begin + share + (cta < rest);
  *reinterpret_cast<PageScheduler*>(scheduler) = {0, 0, 0, 0, 0, begin, end, 0, -1, dealt, all};
}

// Goes to the CTA's next page and returns its place in the cache, or -1 if there is none. dealt: pages whose tickets were drawn,
// which is 0 when the kernel before this one ends.
__device__ __forceinline__ int next_page(int* scheduler, const int* lengths, int batch, int rows_per_seq, int topk,
                                         const int* page_table, int table_stride, int* dealt) {
  PageScheduler& at = *reinterpret_cast<PageScheduler*>(scheduler);
  const int lane = threadIdx.x & 31;
  if (at.left > 0) {
    --at.left;
    ++at.page;
  } else {
    if (at.next == at.end) {
      if (at.dealt == at.all) return -1;
      if (__shfl_sync(0xffffffffu, at.ticket, 0) < 0) {
        cudaGridDependencySynchronize();
        if (lane == 0) at.ticket = atomicAdd(dealt, kChunk);
      }
      at.next = at.dealt + __shfl_sync(0xffffffffu, at.ticket, 0);
      if (at.next >= at.all) return -1;
      at.end = min(at.next + kChunk, at.all);
      if (lane == 0) at.ticket = atomicAdd(dealt, kChunk);  // for the next time: the answer takes a while
    }
    // The sequence that holds page `next` of the batch is this one or a later one: 32 of them at a time.
    int pages = 0;
    while (true) {
      const int mine = at.sequence + lane;
      pages = mine < batch ? scored_pages(lengths, mine, rows_per_seq, topk) : 0;
      const int after = at.first + warp_inclusive_scan(pages);
      const unsigned holds = __ballot_sync(0xffffffffu, after > at.next);
      const int lane_of = holds ? __ffs(holds) - 1 : 31;
      at.first = __shfl_sync(0xffffffffu, holds ? after - pages : after, lane_of);
      pages = __shfl_sync(0xffffffffu, pages, lane_of);
      at.sequence += holds ? lane_of : 32;
      if (holds) break;
    }
    at.page = at.next - at.first;
    at.segment = min(at.end - at.next, pages - at.page);
    at.left = at.segment - 1;
    at.next += at.segment;
  }
  const int done = at.segment - 1 - at.left;  // pages of the segment before this one
  if (done % 32 == 0 && lane <= at.left) {
    at.fetched = page_table[(long long)at.sequence * table_stride + at.page + lane];
  }
  return __shfl_sync(0xffffffffu, at.fetched, done % 32);
}

// A note: three numbers for other warps, which read them behind an mbarrier.
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

// A warp copies what it takes to score a sequence of up to ROWS rows: q_shared holds the queries of its rows' heads, column
// `g * 4 * HEADS + i * 8 + t * 2 + b` that of head i * 2 + b of row g * 4 + t, as TileLang's wgmma reads them (rows of 128 bytes
// whose 16-byte pieces are swizzled by the row modulo 8); gates, HEADS of every row; seen, the rows' lengths. Nothing is written
// for rows that are not there.
template <int HEADS, int ROWS>
__device__ __forceinline__ void load_sequence(const void* q, const float* weights, const int* active,
                                              const void* shared_q, const float* shared_scale, const int* lengths,
                                              int sequence, int rows_per_seq, int num_heads, int active_heads,
                                              int shared, void* q_shared_all, int slot, float* gates, int* seen) {
  const Queries queries = {q, active, shared_q, num_heads, active_heads, shared};
  char* const q_shared = (char*)q_shared_all + slot * ROWS * HEADS * 128;
  const int lane = threadIdx.x % 32, first_row = sequence * rows_per_seq;
  // Eight lanes copy a query.
#pragma unroll 8
  for (int i = lane / 8; i < rows_per_seq * HEADS; i += 4) {
    const int row = i / HEADS, j = i % HEADS, group = ROWS > 4 ? row / 4 : 0;
    const int column = group * 4 * HEADS + j / 2 * 8 + (row - group * 4) * 2 + j % 2;
    copy_query<HEADS>(queries, first_row + row, j, lane % 8, q_shared, column);
  }
#pragma unroll 1
  for (int i = lane; i < rows_per_seq * HEADS; i += 32) {
    gates[i] = gate_of<HEADS>(queries, weights, shared_scale, first_row + i / HEADS, i % HEADS);
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
__device__ __forceinline__ void store_scores(const float* score, int token, int length, int init, int local,
                                             float* out) {
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
