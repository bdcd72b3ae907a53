// Products on the tensor cores of a warpgroup: FP8 keys, 64 of them, by the queries that lie in shared memory.
//
// Why this is CUDA: TileLang works out the operands' addresses anew for each product, in every thread; here a warp does, and only what
// changes from one to the next. Its templates for the instructions themselves are used.
#pragma once

#include <tl_templates/cuda/intrin.h>
#include <tl_templates/cuda/instruction/wgmma.h>

#include "layout.cuh"

namespace misa {

// This thread's warpgroup, a number that the compiler knows to be the same in a whole warp.
__device__ __forceinline__ int warpgroup() { return __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0); }

// Rows of 128 bytes in shared memory, swizzled by 128 bytes and so aligned to 1024, as the lower half of the descriptor of their first 32
// bytes; those of the next 32 are 2 more, since addresses count in sixteens.
__device__ __forceinline__ unsigned operand(const void* rows) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(rows);
  return 1u << 16 | (address & 0x3ffff) / 16;
}

// The whole descriptor. The upper half says: swizzled by 128 bytes, and 1024 bytes from eight rows to the next. The compiler sees that it
// is the same for all.
__device__ __forceinline__ unsigned long long descriptor(unsigned operand) {
  return (unsigned long long)(1u << 30 | 1024 / 16) << 32 | operand;
}

// acc = keys . queries over 32 of their 128 bytes, added to acc where `add`; COLUMNS queries.
template <int COLUMNS>
__device__ __forceinline__ void wgmma(float* acc, unsigned keys, unsigned queries, bool add) {
  constexpr auto kKey = tl::DataType::kFloat8_e4m3, kSum = tl::DataType::kFloat32;
  tl::wgmma_ss<kKey, kKey, kSum, 64, COLUMNS, 32, false, false>(descriptor(keys), descriptor(queries),
                                                                reinterpret_cast<uint32_t*>(acc), add);
}

// The same with keys in registers: rows lane / 4 and + 8 of the warp, bytes lane % 4 * 4 .. + 3 of the first half, then both of the second
// half.
template <int COLUMNS>
__device__ __forceinline__ void wgmma(float* acc, const unsigned* keys, unsigned queries, bool add) {
  constexpr auto kKey = tl::DataType::kFloat8_e4m3, kSum = tl::DataType::kFloat32;
  tl::wgmma_rs<kKey, kKey, kSum, 64, COLUMNS, 32, false, false>(keys, descriptor(queries),
                                                                reinterpret_cast<uint32_t*>(acc), add);
}

// Begins a group: the products of the keys of a page, at `stage` of those in shared memory, and the queries of a warpgroup, COLUMNS of
// them. queries: of all warpgroups, one after the other.
template <int COLUMNS>
__device__ __forceinline__ void begin_page(float* acc, const void* keys, int stage, const void* queries,
                                           int warpgroup) {
  const unsigned a = operand((const char*)keys + stage * kPage * kHeadDim),
                 b = operand((const char*)queries + warpgroup * COLUMNS * kHeadDim);
  tl::warpgroup_fence_operand(acc, COLUMNS / 2);
  tl::warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < kHeadDim / 32; ++step) wgmma<COLUMNS>(acc, a + 2 * step, b + 2 * step, step > 0);
  tl::warpgroup_commit_batch();
}

}  // namespace misa
