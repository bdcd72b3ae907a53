// Listed tokens of a sequence, and their keys: from the paged cache to shared memory.
//
// Why this is CUDA: TileLang gathers through registers, and waits for them before it multiplies; with asynchronous copies
// the next tile is under way meanwhile.
#pragma once

#include "barrier.cuh"
#include "cta.cuh"
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

// Bytes from the first key, and from the first scale, of the cache, whose pages hold keys before scales. So written, each is two
// multiplications and no division.
__device__ __forceinline__ long long key_offset(unsigned slot) {
  return (long long)slot * kTokenBytes - slot % kPage * 4;
}
__device__ __forceinline__ long long scale_offset(unsigned slot) {
  return (long long)slot * kTokenBytes - slot % kPage * kHeadDim;
}

// Slots are listed in tiles: the last one is filled up with the last slot. Returns after a barrier.
template <int THREADS, int TILE>
__device__ __forceinline__ void fill_last_tile(unsigned* slots, int count) {
  static_assert(TILE <= THREADS, "one slot a thread");
  const int end = (count + TILE - 1) / TILE * TILE;
  if (count + (int)threadIdx.x < end) slots[count + threadIdx.x] = slots[count - 1];
  __syncthreads();
}

// Begins to copy the keys and scales of the tile of listed slots that begins at `first`, and closes a group of copies, an
// empty one if there is no such tile.
// The keys go where TileLang's wgmma reads them: rows of 128 bytes whose 16-byte
// pieces are swizzled by the row modulo 8.
template <int THREADS, int TILE>
__device__ __forceinline__ void gather_keys(const void* keys, const void* scales, const unsigned* slots, int first,
                                            int count, void* k_shared, void* s_shared) {
  if (first < count) {
    const int row = threadIdx.x / 8, piece = threadIdx.x % 8;
    const char* from = (const char*)keys + piece * 16;
    char* to = (char*)k_shared + row * 128 + (piece ^ row % 8) * 16;
#pragma unroll
    for (int i = 0; i < TILE * 8 / THREADS; ++i) {
      const unsigned slot = slots[first + i * (THREADS / 8) + row];
      cp_async_16(to + i * (THREADS / 8) * 128, from + key_offset(slot));
    }
    if (threadIdx.x < TILE) {
      const unsigned slot = slots[first + threadIdx.x];
      cp_async_4((char*)s_shared + threadIdx.x * 4, (const char*)scales + scale_offset(slot));
    }
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
}

__device__ __forceinline__ unsigned slot_of(int position, const int* pages) {
  return (unsigned)pages[position / kPage] * kPage + position % kPage;
}

// Listed tokens that are always selected, those before `init` and from `local` on, get the score +inf. Each thread looks at
// the entries that radix selection gives it, so no barrier need follow.
template <int THREADS>
__device__ __forceinline__ void force_listed(const int* positions, unsigned* scores, int count, int init, int local) {
  for (int i = threadIdx.x; i < count; i += THREADS) {
    if (positions[i] < init || positions[i] >= local) scores[i] = kInfinity;
  }
}

// Waits for all groups of copies but the last LATER ones, and shows what they copied to the tensor cores. A barrier must
// follow.
template <int LATER>
__device__ __forceinline__ void wait_gathered() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
  fence_async();
}

}  // namespace misa
