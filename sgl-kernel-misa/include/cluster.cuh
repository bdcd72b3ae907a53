// What the thread blocks of a cluster exchange through distributed shared memory.
#pragma once

namespace misa {

// A barrier of all threads of a cluster, in two halves. What was written before the first is seen after the second, in
// shared memory of other blocks too. (TileLang's own let the compiler move accesses across.)
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

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
// the cluster says so), and must not end before it is read.
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

__device__ __forceinline__ int4 load_peer4(const int* address, int rank) {
  int4 value;
  asm volatile("ld.shared::cluster.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(peer_address(address, rank))
               : "memory");
  return value;
}

__device__ __forceinline__ void store_peer(int* address, int rank, int value) {
  asm volatile("st.shared::cluster.s32 [%0], %1;" ::"r"(peer_address(address, rank)), "r"(value) : "memory");
}

__device__ __forceinline__ void store_peer(float* address, int rank, float value) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(peer_address(address, rank)), "f"(value) : "memory");
}

__device__ __forceinline__ void store_peer(unsigned long long* address, int rank, unsigned long long value) {
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(peer_address(address, rank)), "l"(value) : "memory");
}

}  // namespace misa
