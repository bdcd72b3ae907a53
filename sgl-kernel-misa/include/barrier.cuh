// A barrier of some warps, and a fence between threads and tensor cores.
//
// Why this is CUDA: TileLang has both, but its do not tell the compiler that memory is accessed, so that it may move accesses
// across.
#pragma once

namespace misa {

// What this thread has written to shared memory is seen by the tensor cores of the threads that pass the next barrier.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of some warps of a CTA, THREADS in all.
template <int THREADS>
__device__ __forceinline__ void sync_some() {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

}  // namespace misa
