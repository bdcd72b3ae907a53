// Runs device functions on a CPU, so that their logic is tested where there is no GPU. Every thread is a fiber, which runs until
// it must wait for others: at a barrier, or in a function of the whole warp. Nothing is said about the memory model.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __noinline__

struct int4 {
  int x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

constexpr size_t kStack = 64 << 10;

struct Barrier {
  int expected = 0, arrived = 0, generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  int thread, block;
  int cluster_generation;  // of the cluster's barrier when this thread arrived there
  bool done;
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][32];  // by turns: a lane may still read those of the last time
};

inline std::vector<Fiber> fibers;
inline std::vector<Barrier> block_barriers;
inline std::vector<std::vector<Warp>> warps;  // of every block
inline std::vector<int> votes;                // of every block, for __syncthreads_count
inline Barrier cluster_barrier;
inline ucontext_t scheduler;
inline Fiber* running;
inline std::function<void(int block)> body;

inline void yield() { swapcontext(&running->context, &scheduler); }

inline void arrive(Barrier& barrier) {
  if (++barrier.arrived < barrier.expected) return;
  barrier.arrived = 0;
  ++barrier.generation;
}

inline void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  arrive(barrier);
  while (barrier.generation == generation) yield();
}

// What all lanes of the warp bring, by lane.
inline const uint64_t* share(uint64_t value) {
  Warp& warp = warps[running->block][running->thread / 32];
  uint64_t* values = warp.values[warp.barrier.generation % 2];
  values[running->thread % 32] = value;
  wait(warp.barrier);
  return values;
}

// Runs `work(block)` as all threads of some blocks, which form a cluster. Exits if they wait for each other for ever.
inline void run(int blocks, int threads, std::function<void(int)> work) {
  body = std::move(work);
  cluster_barrier = {blocks * threads};
  block_barriers.assign(blocks, {threads});
  warps.assign(blocks, std::vector<Warp>(threads / 32, Warp{{32}}));
  votes.assign(blocks, 0);
  fibers.resize(blocks * threads);
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(kStack);
    fiber.thread = i % threads;
    fiber.block = i / threads;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.data(), 0, kStack};
    fiber.context.uc_link = &scheduler;
    makecontext(
        &fiber.context,
        +[] {
          body(running->block);
          running->done = true;
        },
        0);
  }
  size_t left = fibers.size();
  for (int round = 0; left > 0; ++round) {
    if (round == 1000000) {
      std::puts("the threads wait for each other");
      std::exit(1);
    }
    for (Fiber& fiber : fibers) {
      if (fiber.done) continue;
      running = &fiber;
      swapcontext(&scheduler, &fiber.context);
      left -= fiber.done;
    }
  }
}

struct ThreadIndex {
  struct {
    operator unsigned() const { return running->thread; }
  } x;
};

}  // namespace emulator

inline emulator::ThreadIndex threadIdx;

using std::max;
using std::min;
inline unsigned min(unsigned a, int b) { return std::min(a, (unsigned)b); }
inline unsigned max(unsigned a, int b) { return std::max(a, (unsigned)b); }

template <typename To, typename From>
To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline unsigned __float_as_uint(float value) { return bits_of<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return bits_of<float>(bits); }
inline float __int_as_float(int bits) { return bits_of<float>(bits); }
inline unsigned __brev(unsigned bits) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (bits >> i & 1) << (31 - i);
  return result;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(bits); }
inline int __clz(unsigned bits) { return bits ? __builtin_clz(bits) : 32; }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return shift % 32 ? high << shift % 32 | low >> (32 - shift % 32) : high;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = (uint64_t)high << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= (unsigned)(bytes >> (selector >> i * 4 & 7) * 8 & 0xff) << i * 8;
  return result;
}

template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T atomicAdd(T* address, T value) {
  return std::exchange(*address, *address + value);
}

template <typename T>
T atomicOr(T* address, T value) {
  return std::exchange(*address, *address | value);
}

template <typename T>
T atomicAnd(T* address, T value) {
  return std::exchange(*address, *address & value);
}

inline void cudaGridDependencySynchronize() {}
size_t __cvta_generic_to_shared(const void*);  // of functions that are PTX, which nobody calls here

inline void __syncwarp() { emulator::share(0); }
inline void __syncthreads() { emulator::wait(emulator::block_barriers[emulator::running->block]); }

inline int __syncthreads_count(bool predicate) {
  int& votes = emulator::votes[emulator::running->block];
  votes += predicate;
  __syncthreads();
  const int count = votes;
  __syncthreads();
  votes = 0;
  __syncthreads();
  return count;
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  const uint64_t* values = emulator::share(predicate);
  unsigned vote = 0;
  for (int lane = 0; lane < 32; ++lane) vote |= (unsigned)values[lane] << lane;
  return vote;
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return (T)emulator::share((uint64_t)value)[lane & 31];
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const uint64_t* values = emulator::share((uint64_t)value);
  const int lane = emulator::running->thread % 32;
  return lane < delta ? value : (T)values[lane - delta];
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return (T)emulator::share((uint64_t)value)[emulator::running->thread % 32 ^ mask];
}

template <typename T, typename Reduce>
T reduce(T value, Reduce with) {
  const uint64_t* values = emulator::share((uint64_t)value);
  T result = (T)values[0];
  for (int lane = 1; lane < 32; ++lane) result = with(result, (T)values[lane]);
  return result;
}
template <typename T>
T __reduce_add_sync(unsigned, T value) {
  return reduce(value, std::plus<T>());
}
template <typename T>
T __reduce_min_sync(unsigned, T value) {
  return reduce(value, [](T a, T b) { return std::min(a, b); });
}
template <typename T>
T __reduce_max_sync(unsigned, T value) {
  return reduce(value, [](T a, T b) { return std::max(a, b); });
}
