// Exact selection of a row's top k from its scores and their histogram, by several blocks a row.
#pragma once

#include "block.cuh"

namespace misa {

__device__ __forceinline__ int first_digit(float score) { return ordered(score) >> 21; }

// Counts one page's scores (rr 0 and 1 of a lane's row) and stores those that the row sees.
__device__ __forceinline__ void store_scores(const float* score, int token, int length, int init, int local, float* out,
                                             int* bins) {
#pragma unroll
  for (int rr = 0; rr < 2; ++rr) {
    const int position = token + rr * 8;
    if (position < length) {
      const bool forced = position < init || position >= length - local;
      const float value = forced ? __int_as_float(0x7f800000) : score[rr];
      out[position] = value;
      atomicAdd(&bins[first_digit(value)], 1);
    }
  }
}

// Adds a block's histogram to the row's.
template <int THREADS>
__device__ __forceinline__ void flush_bins(const int* bins, int* out) {
  for (int i = threadIdx.x; i < kBins; i += THREADS) {
    if (bins[i]) atomicAdd(&out[i], bins[i]);
  }
}

// Over the words (32 tokens each) of one block: the bits of scores whose first digit is above `bin` go to the plane, scores
// whose first digit is `bin` to `positions` and `scores` as long as there is room; *count is their number all the same.
template <int THREADS>
__device__ __forceinline__ void partition(const float* row_scores, int length, int first_word, int last_word, int bin,
                                          unsigned* plane, unsigned* scores, int* positions, int capacity, int* count) {
  constexpr int kWarps = THREADS / 32, kUnroll = 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  for (int base = first_word + warp; base < last_word; base += kWarps * kUnroll) {
    float value[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int word = base + u * kWarps, position = word * 32 + lane;
      value[u] = word < last_word && position < length ? row_scores[position] : 0.f;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int word = base + u * kWarps, position = word * 32 + lane;
      const unsigned key = ordered(value[u]);
      const bool visible = word < last_word && position < length;
      const int digit = key >> 21;
      const unsigned above = __ballot_sync(0xffffffffu, visible && digit > bin);
      const unsigned inside = __ballot_sync(0xffffffffu, visible && digit == bin);
      if (lane == 0 && word < last_word) plane[word] = above;
      if (inside) {
        int slot = 0;
        if (lane == 0) slot = atomicAdd(count, __popc(inside));
        slot = __shfl_sync(0xffffffffu, slot, 0) + __popc(inside & ((1u << lane) - 1));
        if (inside >> lane & 1 && slot < capacity) {
          scores[slot] = key;
          positions[slot] = position;
        }
      }
    }
  }
}

__device__ __forceinline__ uint2* pairs(unsigned* list) { return reinterpret_cast<uint2*>(list); }

// Appends a block's candidates to the row's list, and counts the block in. Returns whether it is the row's last, which then
// sees everything that the others wrote. counters: candidates, blocks.
template <int THREADS>
__device__ __forceinline__ bool append_candidates(const unsigned* scores, const int* positions, int count, int room,
                                                  int capacity, int* counters, int blocks, uint2* list, int* scratch) {
  if (threadIdx.x == 0) scratch[0] = atomicAdd(&counters[0], count);
  __syncthreads();
  const int base = scratch[0];
  for (int i = threadIdx.x; i < min(count, room); i += THREADS) {
    if (base + i < capacity) list[base + i] = make_uint2(scores[i], positions[i]);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) scratch[0] = atomicAdd(&counters[1], 1) == blocks - 1;
  __syncthreads();
  __threadfence();
  const bool last = scratch[0];
  __syncthreads();
  return last;
}

// Selects among the candidates of a row, from the list where it holds them all, else from the scores; sets their bits.
template <int THREADS>
__device__ __forceinline__ void select_in_bin(const uint2* list, int count, int capacity, const float* row_scores, int length,
                                              unsigned* scores, int* positions, int* bins, int* state, int* scratch,
                                              unsigned* plane) {
  const bool listed = count <= capacity;
  const int entries = listed ? count : length;
  if (listed) {
    for (int i = threadIdx.x; i < count; i += THREADS) {
      const uint2 entry = __ldcg(&list[i]);
      scores[i] = entry.x;
      positions[i] = entry.y;
    }
  }
  __syncthreads();
  for (int digit = 1; digit <= 5; ++digit) {
    if (digit < 5 && radix_state(state)->done) continue;
    if (digit < 5) clear_bins<THREADS>(bins);
    __syncthreads();
    for (int i = threadIdx.x; i < entries; i += THREADS) {
      const int position = listed ? positions[i] : i;
      const unsigned long long key = entry_key(listed ? scores[i] : ordered(row_scores[i]), position);
      if (digit < 5) {
        radix_count(radix_state(state), digit, key, bins);
      } else if (radix_selected(radix_state(state), key)) {
        atomicOr(&plane[position / 32], 1u << position % 32);
      }
    }
    if (digit < 5) radix_advance<THREADS>(state, digit, bins, scratch);
  }
  __syncthreads();
}

// Writes the positions of a plane's bits in ascending order.
template <int THREADS>
__device__ __forceinline__ void emit_plane(const unsigned* plane, int words, int form, const int* pages, int offset,
                                           int* scratch, int* out) {
  int base = 0;
  for (int first = 0; first < words; first += THREADS) {
    const int i = first + threadIdx.x;
    unsigned word = i < words ? __ldcg(&plane[i]) : 0;
    int total;
    int slot = base + block_exclusive_scan<THREADS>(__popc(word), scratch, total);
    for (; word; word &= word - 1) out[slot++] = output_index(i * 32 + __ffs(word) - 1, form, pages, offset);
    base += total;
  }
}

}  // namespace misa
