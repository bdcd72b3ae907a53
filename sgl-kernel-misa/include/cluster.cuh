// What the CTAs of a cluster exchange through distributed shared memory.
//
// Why this is CUDA: TileLang 0.1.11 has no load of a number from another CTA's shared memory and no store that completes there on
// an mbarrier; its barrier of a cluster lets the compiler move accesses across.
#pragma once

#include <cstdint>

namespace misa {

// The split barrier of all threads of a cluster: `cluster_arrive`, then `cluster_wait`. What a CTA wrote to its own shared memory
// before it arrived may be read by the others once they have waited. What need not wait is done between the two: a CTA that has
// read all it reads of others arrives, goes on, and waits only before it overwrites what they may still read, or ends. Every
// thread calls them in turn, one wait for each arrival, in all CTAs alike. The fences are restricted to shared memory: a full one
// waits for global memory.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
  asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
}

// A barrier of all threads of the RANKS CTAs of a cluster, or of one CTA by itself.
template <int RANKS>
__device__ __forceinline__ void sync_ranks() {
  if constexpr (RANKS == 1) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
}

// Where another CTA of the cluster has what `address` is in this CTA's shared memory. It must have started (a barrier of
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

// A mailbox is written by other CTAs with `send`, and read after `receive` for all that is due, once in a kernel. One thread
// prepares it, before a barrier of the cluster.
__device__ __forceinline__ void prepare_mailbox(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"((unsigned)__cvta_generic_to_shared(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void send(unsigned long long* to, unsigned long long value, uint64_t* barrier, int rank) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(peer_address(to, rank)),
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
