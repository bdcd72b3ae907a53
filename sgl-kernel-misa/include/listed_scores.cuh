// Scores of a row's listed tokens by all heads of the indexer.
//
// Why this is CUDA: keys go from the cache to the registers that a wgmma multiplies. TileLang multiplies what lies in shared memory, to which
// keys that lie anywhere are copied 16 bytes at a time, with an address, a fence and a barrier for each tile.
#pragma once

#include "barrier.cuh"
#include "cta.cuh"
#include "gather.cuh"
#include "wgmma.cuh"

namespace misa {

constexpr int kQueriesAlignment = 1024;  // of a wgmma operand that is swizzled by 128 bytes
constexpr int kListedTile = 64;          // tokens of a warpgroup's wgmma
static_assert(kPageBytes == 66 * kHeadDim, "see score_slots");

// The first such address in `room`, which has kQueriesAlignment bytes more than the queries.
__device__ __forceinline__ void* aligned(void* room) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(room);
  return (char*)room + (kQueriesAlignment - address % kQueriesAlignment) % kQueriesAlignment;
}

// The order of a key's bytes, for which any will do as long as queries have the same: of the 32 bytes that a lane of a quad multiplies,
// it loads two pieces of 16, at quad * 16 and at 64 + quad * 16. A wgmma takes 8 bytes of a lane: step j of four takes words j % 2 * 2
// and j % 2 * 2 + 1 of piece j / 2, for bytes quad * 4 .. + 3 of its first and of its second half.
//
// The queries of a row, HEADS of 128 bytes, in that order to shared memory, whose rows are swizzled by 128 bytes. A barrier must follow.
template <int HEADS, int THREADS>
__device__ __forceinline__ void copy_queries_in_quads(const void* q, void* q_room) {
  char* const q_shared = (char*)aligned(q_room);
#pragma unroll
  for (int i = threadIdx.x; i < HEADS * 8; i += THREADS) {
    const int head = i / 8, step = i % 8 / 2, half = i % 2;
    const unsigned* from = (const unsigned*)q + head * 32 + step / 2 * 16 + step % 2 * 2 + half;
    const uint4 piece = {from[0], from[4], from[8], from[12]};
    *reinterpret_cast<uint4*>(q_shared + head * kHeadDim + (i % 8 ^ head % 8) * 16) = piece;
  }
  fence_async();
}

// The score of one of a quad's two tokens: a lane adds its heads in ascending order for both, then the four lanes of the quad add their
// sums, 0 + 1 and 2 + 3 first. Even lanes get that of row lane / 4, odd ones that of row lane / 4 + 8. acc: of an m64 wgmma whose columns
// are the heads; gates: from the lane's first pair on, in shared memory; scale: of the lane's token. x + |x| is 2 relu(x), see sum_heads.
template <int HEADS>
__device__ __forceinline__ float sum_heads_of_quad(const float* acc, const float2* gates, float scale, bool odd) {
  float sum[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < HEADS / 8; ++i) {
    const float2 gate = gates[i * 4];
#pragma unroll
    for (int rr = 0; rr < 2; ++rr) {
      const float first = acc[i * 4 + rr * 2], second = acc[i * 4 + rr * 2 + 1];
      sum[rr] = fmaf(gate.x, first + fabsf(first), sum[rr]);
      sum[rr] = fmaf(gate.y, second + fabsf(second), sum[rr]);
    }
  }
  float mine = odd ? sum[1] : sum[0];
  mine += __shfl_xor_sync(0xffffffffu, odd ? sum[0] : sum[1], 1);
  mine += __shfl_xor_sync(0xffffffffu, mine, 2);
  return mine * (0.5f * scale);
}

// Scores the first `count` listed tokens: an entry of `scores` is a token's slot of the cache before, and its score as an ordered key after.
// Each warp reads and writes the entries of its own tokens. q_room: what copy_queries_in_quads left; gates: of all heads, 8-byte aligned.
// Begins and ends with a barrier.
//
// The next tile's keys are asked for as soon as the tensor cores have read this one's, and are under way while its heads are summed.
// Their slots are read before.
template <int HEADS, int THREADS>
__device__ __forceinline__ void score_slots(const void* keys, const void* scales, unsigned* scores, int count,
                                            void* q_room, const void* gates) {
  constexpr int kTogether = THREADS / 128 * kListedTile;  // tokens of all warpgroups
  fill_last_tile<THREADS, kTogether>(scores, count);
  int quad = threadIdx.x % 4, entry = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const unsigned queries = operand(aligned(q_room));
  const char* pieces = (const char*)keys + quad * 16;
  // Kept as they are: the compiler would make them anew, of their parts, in every tile.
  asm("" : "+l"(pieces));
  asm("" : "+r"(quad));
  asm("" : "+r"(entry));
  const float2* const gates_of_lane = (const float2*)gates + quad;
  uint4 key[2][2];
  unsigned slot[2];
  float scale, acc[HEADS / 2];
#pragma unroll
  for (int i = 0; i < HEADS / 2; ++i) acc[i] = 0.f;
  const auto load_slots = [&](int first) { slot[0] = scores[first + entry], slot[1] = scores[first + entry + 8]; };
  const auto load_keys = [&]() {
#pragma unroll
    for (int rr = 0; rr < 2; ++rr) {
      // A page is 66 rows of 128 bytes, 64 of keys and 2 of scales.
      const char* from = pieces + (unsigned long long)(slot[rr] + slot[rr] / kPage * 2) * kHeadDim;
      key[rr][0] = __ldg((const uint4*)from);
      key[rr][1] = __ldg((const uint4*)(from + 64));
    }
    scale = __ldg((const float*)((const char*)scales + scale_offset(quad % 2 ? slot[1] : slot[0])));
  };
  const int last = (count - 1) / kTogether * kTogether;
  if (count > 0) {
    load_slots(0);
    load_keys();
  }
#pragma unroll 1
  for (int first = 0; first < count; first += kTogether) {
    tl::warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint4 low = key[0][step / 2], high = key[1][step / 2];
      const unsigned a[4] = {step % 2 ? low.z : low.x, step % 2 ? high.z : high.x, step % 2 ? low.w : low.y,
                             step % 2 ? high.w : high.y};
      wgmma<HEADS>(acc, a, queries + 2 * step, step > 0);
    }
    tl::warpgroup_commit_batch();
    load_slots(min(first + kTogether, last));  // the last ones come again, which spares a branch
    tl::warpgroup_wait<0>();
    tl::warpgroup_fence_operand(acc, HEADS / 2);
    const float of_token = scale;
    load_keys();
    const float score = sum_heads_of_quad<HEADS>(acc, gates_of_lane, of_token, quad % 2);
    __syncwarp();  // all lanes have read the entries' slots, of the last tile twice
    if (quad < 2) scores[first + entry + quad * 8] = ordered(score);
  }
  __syncthreads();
}

}  // namespace misa
