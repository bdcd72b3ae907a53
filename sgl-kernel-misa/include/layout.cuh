// Where the rows of a batch and the tokens of a sequence lie.
//
// Why this is CUDA: the other headers need it too, and it also compiles for a CPU, where the tests' emulator runs it.
#pragma once

namespace misa {

constexpr int kPage = 64;                        // tokens in a page of the index-K cache
constexpr int kHeadDim = 128;                    // dimensions, and bytes in FP8, of a key or a query
constexpr int kTokenBytes = kHeadDim + 4;        // of a key and its scale
constexpr int kPageBytes = kPage * kTokenBytes;  // keys, then scales
constexpr int kSpan = 1024;                      // tokens in 32 words of a bit plane
static_assert(kHeadDim == 128, "a key is a row of the 128-byte swizzle that TileLang's wgmma reads");
static_assert(kSpan == 32 * 32 && kSpan % kPage == 0 && kPage == 64, "see plane_position");

// Rows are taken in tiles that never straddle two sequences: sequence i owns the tiles from cu_rows[i] / tile_rows + i on,
// which leaves room for its partial tile whatever the lengths, and needs no prefix sum over the batch. The rows after the
// last sequence (padding) form sequence `batch`. Every lane of a warp must call this.
__device__ __forceinline__ int sequence_of_tile(const int* cu_rows, int batch, int tile, int tile_rows) {
  int count = 0;
  for (int i = 1 + (threadIdx.x & 31); i <= batch; i += 32) count += cu_rows[i] / tile_rows + i <= tile;
  return __reduce_add_sync(0xffffffffu, count);
}

__device__ __forceinline__ int first_row_of_tile(const int* cu_rows, int sequence, int tile, int tile_rows) {
  return cu_rows[sequence] + (tile - cu_rows[sequence] / tile_rows - sequence) * tile_rows;
}

// Sequence of a row (a tile of one row, less the room for partial tiles); every lane of a warp must call this.
__device__ __forceinline__ int sequence_of_row(const int* cu_rows, int batch, int row) {
  int count = 0;
  for (int i = 1 + (threadIdx.x & 31); i <= batch; i += 32) count += cu_rows[i] <= row;
  return __reduce_add_sync(0xffffffffu, count);
}

// Position of sample i: one token of every 1 << shift, at an offset that no period in the text can follow.
__device__ __forceinline__ int sample_position(int i, int shift) {
  return (i << shift) + (int)((unsigned)i * 2654435761u >> (32 - shift));
}

// A bit plane holds one bit a token, in the order in which the lanes of a warpgroup own the rows of a wgmma tile: word
// span * 32 + warp * 8 + row % 8, bit page * 2 + (row / 8) % 2 for row `warp * 16 + ...` of page `page` of the span. So the
// scoring kernel collects the bits of 16 pages in a register of its own, without a vote.
__device__ __forceinline__ int plane_position(int word, int bit) {
  return (word >> 5) * kSpan + (bit >> 1) * kPage + ((word >> 3) & 3) * 16 + (bit & 1) * 8 + (word & 7);
}

// The bits of a plane's word whose positions lie below `length`.
__device__ __forceinline__ unsigned plane_visible(int word, int length) {
  unsigned mask = 0;
  for (int bit = 0; bit < 32; ++bit) mask |= (unsigned)(plane_position(word, bit) < length) << bit;
  return mask;
}

// Turns the 32 words of a span, one a lane, into 32 words in the order of the positions, one a lane. What depends on the lane alone is
// worked out once.
struct NaturalOrder {
  unsigned kept[5];    // of its word a lane keeps these bits in each step of the transposition,
  unsigned turned[5];  // and gets the others from its partner's, turned so far to the left
  unsigned bytes;

  __device__ __forceinline__ NaturalOrder() {
    const int lane = threadIdx.x & 31;
    unsigned low = 0x0000ffffu;
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const int step = 16 >> i;
      kept[i] = lane & step ? ~low : low;
      asm("" : "+r"(kept[i]));  // a register: worked out anew it is two instructions more in every step
      turned[i] = lane & step ? 32 - step : step;
      low ^= low << step / 2;
    }
    bytes = lane & 1 ? 0x3726 : 0x5140;
  }

  __device__ __forceinline__ unsigned operator()(unsigned word) const {
    // Transpose: lane page * 2 + rr gets the bits of row rr * 8 + r of warp w, at w * 8 + r.
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const unsigned other = __shfl_xor_sync(0xffffffffu, word, 16 >> i);
      word = (word & kept[i]) | (__funnelshift_l(other, other, turned[i]) & ~kept[i]);
    }
    // Then the rows of each warp, 8 and 8: words 2 * page (warps 0 and 1) and 2 * page + 1.
    return __byte_perm(word, __shfl_xor_sync(0xffffffffu, word, 1), bytes);
  }
};

}  // namespace misa
