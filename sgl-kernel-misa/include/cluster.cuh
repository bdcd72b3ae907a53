// What the thread blocks of a cluster exchange through distributed shared memory.
#pragma once

#include <cstdint>

namespace misa {

// A barrier of all threads of a cluster, in two halves: what a block wrote to its own shared memory before the first may be
// read by the others after the second. The fences are restricted to shared memory: a full one waits for global memory.
// (TileLang's own barrier let the compiler move accesses across.)
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
  asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
}

// A barrier of all threads of the RANKS blocks of a cluster, or of one block by itself.
template <int RANKS>
__device__ __forceinline__ void sync_ranks() {
  if constexpr (RANKS == 1) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
}

// Where another block of the cluster has what `address` is in this block's shared memory. It must have started (a barrier of
// the cluster says so), and must not end before it was read.
__device__ __forceinline__ unsigned peer_address(const void* address, int rank) {
  unsigned peer;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(peer)
               : "r"((unsigned)__cvta_generic_to_shared(address)), "r"(rank));
  return peer;
}

__device__ __forceinline__ int load_peer(const int* address, int rank) {
  int value;
  asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(value) : "r"(peer_address(address, rank)) : "memory");
  return value;
}

__device__ __forceinline__ float load_peer(const float* address, int rank) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(peer_address(address, rank)) : "memory");
  return value;
}

__device__ __forceinline__ int4 load_peer4(const int* address, int rank) {
  int4 value;
  asm volatile("ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(peer_address(address, rank))
               : "memory");
  return value;
}

// A mailbox is written by other blocks with `send`, and read after `receive` for all that is due, once in a kernel. One thread
// prepares it, before a barrier of the cluster.
__device__ __forceinline__ void prepare_mailbox(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"((unsigned)__cvta_generic_to_shared(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void send(unsigned long long* to, unsigned long long value, uint64_t* barrier, int rank) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(peer_address(to, rank)),
               "l"(value), "r"(peer_address(barrier, rank))
               : "memory");
}

// Every thread must call this.
__device__ __forceinline__ void receive(uint64_t* barrier, int bytes) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(barrier);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
  }
  int done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], 0;\n"
        "selp.b32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(done)
        : "r"(address)
        : "memory");
  } while (!done);
}

}  // namespace misa
