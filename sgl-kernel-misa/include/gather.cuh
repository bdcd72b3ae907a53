// Scattered keys of the paged cache to shared memory.
#pragma once

#include "layout.cuh"

namespace misa {

__device__ __forceinline__ void cp_async_16(void* to, const void* from) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

__device__ __forceinline__ void cp_async_4(void* to, const void* from) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(to);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
}

// Begins to copy the keys and scales of listed slots `first` .. `first + TILE` (the last one repeated past `count`) and
// closes a group of copies, an empty one if there is nothing to copy.
//
// Why this is CUDA: TileLang gathers through registers, and waits for them before it multiplies; with asynchronous copies
// the next tile is under way meanwhile. The keys go where TileLang's wgmma reads them: rows of 128 bytes whose 16-byte
// pieces are swizzled by the row modulo 8.
template <int THREADS, int TILE>
__device__ __forceinline__ void gather_keys(const void* keys, const void* scales, const unsigned* slots, int first,
                                            int count, void* k_shared, void* s_shared) {
  constexpr long long kPageBytes = 8448;
  if (first < count) {
#pragma unroll
    for (int i = 0; i < TILE * 8 / THREADS; ++i) {
      const int row = i * (THREADS / 8) + threadIdx.x / 8, piece = threadIdx.x % 8;
      const unsigned slot = slots[min(first + row, count - 1)];
      const long long page = slot / kPage * kPageBytes;
      const char* key = (const char*)keys + page + slot % kPage * 128;
      cp_async_16((char*)k_shared + row * 128 + (piece ^ row % 8) * 16, key + piece * 16);
      if (piece == 0) cp_async_4((char*)s_shared + row * 4, (const char*)scales + page + slot % kPage * 4);
    }
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}

__device__ __forceinline__ unsigned slot_of(int position, const int* pages) {
  return (unsigned)pages[position / kPage] * kPage + position % kPage;
}

// Waits for all groups of copies but the last LATER ones, and shows what they copied to the tensor cores. A barrier must
// follow.
template <int LATER>
__device__ __forceinline__ void wait_gathered() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace misa
