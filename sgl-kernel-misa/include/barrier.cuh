// A barrier and a fence that TileLang has too, but without telling the compiler that memory is accessed: it may move accesses
// across those.
#pragma once

namespace misa {

// What this thread has written to shared memory is seen by the tensor cores of the threads that pass the next barrier.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of some warps of a block, THREADS in all.
template <int THREADS>
__device__ __forceinline__ void sync_some() {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

}  // namespace misa
