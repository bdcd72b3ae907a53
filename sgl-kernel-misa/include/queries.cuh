// What a row scores with: the queries and gates of its slots. The routed heads come first, in ascending order; with the sampled
// router the last slot of those that a kernel is compiled for is the shared head's, and slots between them stay empty.
//
// Why this is CUDA: TileLang copies through registers, and waits for each load where some slots are empty; with asynchronous copies all
// are under way together, and empty slots get their zeros without a read.
#pragma once

#include "barrier.cuh"
#include "layout.cuh"

namespace misa {

// Sixteen bytes to shared memory, or zeros instead: nothing is read then.
__device__ __forceinline__ void cp_async_16_or_zero(void* to, const void* from, bool copied) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(copied ? 16 : 0)
               : "memory");
}

// The query tensors of an operation: q [rows, num_heads, 128], active [rows, active_heads]; where `shared`, shared_q [rows, 128].
struct Queries {
  const void* q;
  const int* active;
  const void* shared_q;
  int num_heads, active_heads, shared;
};

// Begins to copy 16 bytes, piece `piece` of 8, of the query of a row's slot to column `column` of `q_shared`, where TileLang's
// wgmma reads them: rows of 128 bytes whose pieces are swizzled by the row modulo 8. Zeros for an empty slot.
template <int SLOTS>
__device__ __forceinline__ void copy_query(const Queries& queries, int row, int slot, int piece, void* q_shared,
                                           int column) {
  const bool routed = slot < queries.active_heads, shared = queries.shared && slot == SLOTS - 1;
  const int head = routed ? queries.active[(long long)row * queries.active_heads + slot] : 0;
  const char* from = shared ? (const char*)queries.shared_q + (long long)row * kHeadDim
                            : (const char*)queries.q + ((long long)row * queries.num_heads + head) * kHeadDim;
  cp_async_16_or_zero((char*)q_shared + column * kHeadDim + (piece ^ column % 8) * 16, from + piece * 16,
                      routed || shared);
}

// What the dot product of a row's slot is multiplied with. `sum_heads` takes the doubled relu of routed heads, hence 2 here.
template <int SLOTS>
__device__ __forceinline__ float gate_of(const Queries& queries, const float* weights, const float* shared_scale,
                                         int row, int slot) {
  if (slot < queries.active_heads) {
    const int head = queries.active[(long long)row * queries.active_heads + slot];
    return weights[(long long)row * queries.num_heads + head];
  }
  return queries.shared && slot == SLOTS - 1 ? 2.f * shared_scale[row] : 0.f;
}

// The queries of a tile of rows, `columns` of them in the order that `sum_heads` takes (see there), row0 .. row1 - 1; the last
// row's come again for rows behind it. Every one of THREADS threads must call this; a barrier must follow.
template <int SLOTS, int COLUMNS, int THREADS>
__device__ __forceinline__ void copy_queries(const void* q, const int* active, const void* shared_q, int num_heads,
                                             int active_heads, int shared, int row0, int row1, void* q_shared) {
  static_assert(COLUMNS * 8 % THREADS == 0, "whole rounds");
  const Queries queries = {q, active, shared_q, num_heads, active_heads, shared};
#pragma unroll
  for (int i = 0; i < COLUMNS * 8 / THREADS; ++i) {
    const int column = (i * THREADS + (int)threadIdx.x) / 8, piece = threadIdx.x % 8;
    const int row = row0 + column / (4 * SLOTS) * 4 + column % 8 / 2, slot = column % (4 * SLOTS) / 8 * 2 + column % 2;
    copy_query<SLOTS>(queries, min(row, row1 - 1), slot, piece, q_shared, column);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  fence_async();
}

// Begins to copy the queries of one row for `select`, whose columns belong to four rows: the other three are zero. Closes a group of
// copies; `wait_gathered` and a barrier must follow.
template <int SLOTS, int THREADS>
__device__ __forceinline__ void copy_queries_of_row(const void* q, const int* active, const void* shared_q,
                                                    int num_heads, int active_heads, int shared, int row,
                                                    void* q_shared) {
  const Queries queries = {q, active, shared_q, num_heads, active_heads, shared};
#pragma unroll
  for (int i = 0; i < (4 * SLOTS * 8 + THREADS - 1) / THREADS; ++i) {
    const int column = (i * THREADS + (int)threadIdx.x) / 8, piece = threadIdx.x % 8;
    if (4 * SLOTS * 8 % THREADS == 0 || column < 4 * SLOTS) {
      const bool mine = column % 8 < 2;
      const int slot = mine ? column / 8 * 2 + column % 2 : SLOTS;  // SLOTS: one that is empty
      copy_query<SLOTS>(queries, row, slot, piece, q_shared, column);
    }
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// The gates of a row's slots, to registers.
template <int SLOTS>
__device__ __forceinline__ void load_gates_of(const float* weights, const int* active, const float* shared_scale,
                                              int num_heads, int active_heads, int shared, int row, float* gate) {
  const Queries queries = {nullptr, active, nullptr, num_heads, active_heads, shared};
#pragma unroll
  for (int slot = 0; slot < SLOTS; ++slot) gate[slot] = gate_of<SLOTS>(queries, weights, shared_scale, row, slot);
}

}  // namespace misa
