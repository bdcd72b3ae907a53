// The router of decode: the heads of the few rows of a sequence, by the CTAs of a cluster.
//
// Why this is CUDA: the CTAs add up single numbers of each other's shared memory, which TileLang 0.1.11 cannot load, and numbers
// are widened by their bits (`add_pair`, `widen`), where TileLang's conversions take the time of the kernel.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cluster.cuh"
#include "gather.cuh"
#include "layout.cuh"
#include "route.cuh"

namespace misa {

constexpr int kThreads = 256;
constexpr int kTile = kThreads / 16;  // pooled keys at a time: 16 threads average one
constexpr int kGroup = 16;            // pages of a pooled key whose means are under way at once
constexpr int kKeyBytes = 320;  // from one pooled key to the next: so the tensor cores' operands meet no bank conflict

// The pooled keys of a sequence: those of its complete blocks, then for every row that of the partial block at its end.
template <int ROWS>
struct Blocks {
  int complete;                 // of the longest row
  int all;                      // and as many more as the last row with a partial block says
  int full[ROWS], pages[ROWS];  // a row's complete blocks, and the pages of its partial one
};

template <int ROWS>
__device__ __forceinline__ Blocks<ROWS> blocks_of(const int* lengths, int rows, int block_pages) {
  int seen[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) seen[r] = r < rows ? lengths[r] / kPage : 0;
  Blocks<ROWS> blocks = {};
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    blocks.full[r] = seen[r] / block_pages;
    blocks.pages[r] = seen[r] % block_pages;
    blocks.complete = max(blocks.complete, blocks.full[r]);
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) blocks.all = blocks.pages[r] > 0 ? r + 1 : blocks.all;
  blocks.all += blocks.complete;
  return blocks;
}

// Adds two bf16 numbers to float64 sums. The bits of a bf16 number in those of a float64 one are that number times 2^-896,
// whatever its exponent, so this takes no conversion, of which there are few a cycle.
__device__ __forceinline__ void add_pair(double* sums, unsigned pair) {
  sums[0] = fma(__hiloint2double((int)(pair << 16) >> 3 & 0x8fffe000, 0), 0x1p896, sums[0]);
  sums[1] = fma(__hiloint2double((int)pair >> 3 & 0x8fffe000, 0), 0x1p896, sums[1]);
}

__device__ __forceinline__ uint4 load(const uint4* from) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from)
               : "memory");
  return value;
}

// The mean of `count` pages' means, bf16: 8 dimensions for each of 16 threads. id: this thread's of the first 16 pages; noted:
// a place in shared memory for these threads. Every thread of a warp must call this; count may be 0.
__device__ __forceinline__ uint4 pool_block(const uint4* page_means, const int* pages, int count, int id, int* noted) {
  const int lane = threadIdx.x % 16;
  const int longest = __reduce_max_sync(0xffffffffu, count);
  if (lane == 0) *noted = count;
  double sums[8] = {};
  for (int begin = 0; begin < longest; begin += kGroup) {
    if (begin > 0 && begin < count) id = pages[min(begin + lane, count - 1)];
    const int last = max(0, count - 1 - begin);
    uint4 means[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      // Past the last page that page again, and nothing of it: no load waits for a condition.
      const int page = __shfl_sync(0xffffffffu, id, min(i, last), 16);
      means[i] = load(page_means + (long long)(count > 0 ? page : 0) * 16 + lane);
    }
    // Read here, behind a barrier, for the loads to have begun by then: else the compiler adds what it has loaded first.
    __syncwarp();
    const int left = *noted - begin;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const bool counts = i < left;
      add_pair(sums, counts ? means[i].x : 0);
      add_pair(sums + 2, counts ? means[i].y : 0);
      add_pair(sums + 4, counts ? means[i].z : 0);
      add_pair(sums + 6, counts ? means[i].w : 0);
    }
  }
  unsigned pooled[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = (float)(sums[i * 2] / count), high = (float)(sums[i * 2 + 1] / count);
    pooled[i] = __bfloat16_as_ushort(__float2bfloat16_rn(low)) |
                (unsigned)__bfloat16_as_ushort(__float2bfloat16_rn(high)) << 16;
  }
  return make_uint4(pooled[0], pooled[1], pooled[2], pooled[3]);
}

// Two of four e4m3 numbers, the first or the last, as bf16: exact. Their bits in those of bf16 numbers are these times 2^-120.
template <bool LAST>
__device__ __forceinline__ unsigned widen(unsigned four) {
  const unsigned spread = __byte_perm(four, 0, LAST ? 0x3424 : 0x1404);
  const unsigned bits = (spread & 0x80008000u) | (spread >> 4 & 0x07f007f0u);
  unsigned wide;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(wide) : "r"(bits), "r"(0x7b807b80u));
  return wide;
}

__device__ __forceinline__ void multiply(float* acc, const unsigned* a, unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Dot products of 16 heads with a tile of pooled keys: acc[half * 4 + ...] as m16n8k16 has them. The order of the 128
// dimensions is the same for both and else free: lane % 4 takes 8 of every 32, so what it takes is adjacent.
__device__ __forceinline__ void multiply_tile(const char* heads, const char* pooled, float* acc) {
  const int group = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) acc[i] = 0.f;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    // The queries' 16-byte pieces are swizzled by the head modulo 4, which is the same for both rows of a lane.
    const int at = ((j * 2 + part / 2) ^ (group % 4 * 2)) * 16 + part % 2 * 8;
    const uint2 upper = *reinterpret_cast<const uint2*>(heads + group * 128 + at);
    const uint2 lower = *reinterpret_cast<const uint2*>(heads + (group + 8) * 128 + at);
    const unsigned first[4] = {widen<false>(upper.x), widen<false>(lower.x), widen<true>(upper.x),
                               widen<true>(lower.x)};
    const unsigned second[4] = {widen<false>(upper.y), widen<false>(lower.y), widen<true>(upper.y),
                                widen<true>(lower.y)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 key = *reinterpret_cast<const uint4*>(pooled + (half * 8 + group) * kKeyBytes + j * 64 + part * 16);
      multiply(acc + half * 4, first, key.x, key.y);
      multiply(acc + half * 4, second, key.z, key.w);
    }
  }
}

// Writes the heads of a sequence's rows, up to ROWS. q, weights, lengths, out: of its first row; pages: its row of the page
// table, of max_pages columns. Shared memory: q_shared, ROWS * HEADS * 128 bytes; k_shared, kTile * kKeyBytes; sees, 2 * kTile;
// sums, ROWS * HEADS of every CTA; keys, ROWS * HEADS; votes, 2 * ROWS.
//
// The pooled keys are dealt to the CTAs one by one.
// 1. A CTA averages a tile of its own at a time and adds up relu(q . k) of it, for all rows. Of the two barriers in the loop the
//    first guards the tile and `sees` until they are written, the second until they are read.
// 2. Row r's sums come together in CTA r % RANKS, in the order of the CTAs: behind a barrier of the cluster.
// 3. That CTA picks the row's heads.
template <int HEADS, int ROWS, int RANKS>
__device__ __forceinline__ void route_sequence(const void* q, const float* weights, const void* page_means,
                                               const int* pages, const int* lengths, int rows, int max_pages,
                                               int block_pages, int active_heads, int rank, void* q_shared_,
                                               void* k_shared_, unsigned* sees, float* sums, unsigned* keys,
                                               unsigned* votes, int* out) {
  static_assert(ROWS * HEADS <= RANKS * kThreads, "in the end, a head of a row a thread");
  constexpr int kMine = ROWS * HEADS / 16 / (kThreads / 32);  // groups of 16 heads of a row that a warp multiplies
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 16;
  char* const q_shared = (char*)q_shared_;
  char* const k_shared = (char*)k_shared_;
  // In the end, one head of one row a thread: row tid / HEADS of those that come together here.
  const int my_row = tid / HEADS * RANKS + rank, my_head = my_row * HEADS + tid % HEADS;
  const float weight = my_row < rows ? fabsf(weights[my_head]) : 0.f;
  // The pages of the first tile before the lengths are known: they are those if the block is complete.
  const int guess = ((tid / 16) * RANKS + rank) * block_pages;
  int id = pages[min(guess + lane, max_pages - 1)];
  for (int i = tid; i < rows * HEADS * 8; i += kThreads) {
    cp_async_16(q_shared + i / 8 * 128 + (i % 8 ^ (i / 8 % 4 * 2)) * 16, (const char*)q + i * 16);
  }
  const Blocks<ROWS> blocks = blocks_of<ROWS>(lengths, rows, block_pages);

  float dots[kMine][2] = {};
  for (int tile = 0; tile * kTile * RANKS + rank < blocks.all; ++tile) {
    const int block = (tile * kTile + tid / 16) * RANKS + rank, row = block - blocks.complete;
    int first = block * block_pages, count = row < 0 ? block_pages : 0;
    unsigned seen = 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (block < blocks.full[r]) seen |= 1u << r;
      if (row == r && blocks.pages[r] > 0) {
        seen = 1u << r;
        first = blocks.full[r] * block_pages;
        count = blocks.pages[r];
      }
    }
    if ((tile > 0 || first != guess) && count > 0) id = pages[first + min(lane, count - 1)];
    const uint4 pooled = pool_block((const uint4*)page_means, pages + first, count, id, (int*)sees + kTile + tid / 16);
    *reinterpret_cast<uint4*>(k_shared + tid / 16 * kKeyBytes + lane * 16) = pooled;
    if (lane == 0) sees[tid / 16] = seen;
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int group = i * (kThreads / 32) + warp, row = group * 16 / HEADS;
      if (row < rows) {
        float acc[8];
        multiply_tile(q_shared + group * 16 * 128, k_shared, acc);
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const bool visible = sees[c / 4 * 8 + tid % 4 * 2 + c % 2] >> row & 1;
          dots[i][c / 2 % 2] += visible ? fmaxf(acc[c], 0.f) : 0.f;
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
#pragma unroll
    for (int rr = 0; rr < 2; ++rr) {
      const float sum = quad_sum(dots[i][rr]);
      if (tid % 4 == 0) sums[(i * (kThreads / 32) + warp) * 16 + tid % 32 / 4 + rr * 8] = sum;
    }
  }
  sync_ranks<RANKS>();  // all CTAs' sums are written

  if (my_row < rows) {
    float sum = 0.f;
#pragma unroll
    for (int r = 0; r < RANKS; ++r) sum += RANKS == 1 ? sums[my_head] : load_peer(&sums[my_head], r);
    const int count = (lengths[my_row] / kPage + block_pages - 1) / block_pages;
    keys[tid] = head_key(count > 0 ? weight * sum / (float)count : 0.f);
  }
  if (RANKS > 1) cluster_arrive();  // the other CTAs' sums were read
  __syncthreads();                  // the keys are written
  for (int i = 0; i * RANKS + rank < rows; ++i) {
    pick_heads<HEADS>(keys + i * HEADS, active_heads, votes + i * 2, out + (i * RANKS + rank) * active_heads);
  }
  if (RANKS > 1) cluster_wait();  // no other CTA still reads this one's sums
}

}  // namespace misa
