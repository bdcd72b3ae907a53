// The emulator's side of include/cluster.cuh: a cluster's blocks have their shared memory at `shared`, one after another.
#pragma once

namespace misa {

inline char* shared;
inline size_t shared_size;  // of a block

template <typename T>
T* peer_address(T* address, int rank) {
  const std::ptrdiff_t offset = (char*)address - shared - emulator::running->block * (std::ptrdiff_t)shared_size;
  if (offset < 0 || offset >= (std::ptrdiff_t)shared_size) std::abort();
  return (T*)(shared + rank * shared_size + offset);
}

inline void cluster_arrive() {
  emulator::running->cluster_generation = emulator::cluster_barrier.generation;
  emulator::arrive(emulator::cluster_barrier);
}

inline void cluster_wait() {
  while (emulator::cluster_barrier.generation == emulator::running->cluster_generation) emulator::yield();
}

template <int RANKS>
void sync_ranks() {
  if constexpr (RANKS == 1) {
    __syncthreads();
  } else {
    cluster_arrive();
    cluster_wait();
  }
}

template <typename T>
T load_peer(const T* address, int rank) {
  return *peer_address(address, rank);
}
inline int4 load_peer4(const int* address, int rank) { return *(const int4*)peer_address(address, rank); }

// The mailbox's barrier counts bytes.
inline void prepare_mailbox(uint64_t* barrier) { *barrier = 0; }

inline void send(unsigned long long* to, unsigned long long value, uint64_t* barrier, int rank) {
  *peer_address(to, rank) = value;
  *peer_address(barrier, rank) += sizeof value;
}

inline void receive(uint64_t* barrier, uint64_t bytes) {
  while (*barrier < bytes) emulator::yield();
  if (*barrier != bytes) std::abort();
}

}  // namespace misa
