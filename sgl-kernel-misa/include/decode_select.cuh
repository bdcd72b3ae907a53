// Exact selection of a row's top k from its scores, by the CTAs of a cluster. Why this is CUDA: see decode_row.cuh.
#pragma once

#include "decode_candidates.cuh"
#include "decode_radix.cuh"

namespace misa {

constexpr int kAlone = 8192;  // tokens of a row that one CTA selects from by itself

// Selects from a row that RANKS CTAs share. need_of_sample: see `bound_from_below`; HELD, list: see `list_candidates`.
template <int RANKS, bool HELD>
__device__ __forceinline__ void select_shared(const Part& part, int length, int topk, int need_of_sample, int rank,
                                              int form, const int* pages, int offset, uint2* list, int* bins,
                                              int* scratch, int* out) {
  unsigned sample[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned at = (unsigned)(i * kThreads + threadIdx.x) * (unsigned)length / kRowSamples;
    sample[i] = min(ordered(__ldcg(&part.scores[at])), kInfinity);
  }
  uint4 scores[kLoads];
  load_scores(part, part.first, scores);
  const Bound bound = bound_from_below(sample, need_of_sample, bins, scratch);
  const int count = list_candidates<HELD>(part, scores, from_ordered(bound.low), list, scratch);
  Cut cut;
  int before;
  if (cut_candidates<RANKS>(list, count, bound, topk, rank, bins, scratch, cut, before)) {
    emit_candidates(list, count, cut, before, form, pages, offset, scratch, out);
  } else {
    select_by_radix<RANKS>(part, topk, rank, form, pages, offset, bins, scratch, out);
  }
  if (RANKS > 1) cluster_wait();  // for the arrival above: no other CTA still reads this one's shared memory
}

// Selects the topk of a row of length > topk; every thread of the cluster must call this. The CTAs take contiguous shares
// of the tokens, the first one all of a short row, and so do their warps; what a warp can hold it keeps in registers.
// row_scores: 16-byte aligned, with room up to a multiple of 4. list: kCandidates; bins: 2 * kBins, 16-byte aligned; scratch: 64.
//
// The scores are those of the kernel before this one, which is waited for here; nothing else is.
template <int RANKS>
__device__ __forceinline__ void select_row(const float* row_scores, int length, int topk, int rank, int form,
                                           const int* pages, int offset, void* list_, int* bins, int* scratch,
                                           int* out) {
  uint2* const list = (uint2*)list_;
  const bool alone = RANKS == 1 || length <= kAlone;
  if (alone && rank > 0) return;
  const int warps = (alone ? 1 : RANKS) * kWarps, warp = rank * kWarps + threadIdx.x / 32;
  const int share = (length + warps * 128 - 1) / (warps * 128) * 128;  // of a warp
  const Part part = {row_scores, warp * share, min(warp * share + share, length)};
  // As many samples as the selected tokens should hold, and four standard deviations more.
  const float expected = (float)topk * kRowSamples / length;
  const int need = min((int)(expected + 4.f * sqrtf(expected) + 2.f), kRowSamples);
  clear_bins<kThreads>(bins, kBins + 2 * kFineBins);
  if (threadIdx.x == 0) {
    scratch[kListed] = 0;
    prepare_mailbox(mailbox(scratch));
  }
  if (!alone) sync_ranks<RANKS>();
  cudaGridDependencySynchronize();
  if (RANKS > 1 && alone) {
    select_shared<1, true>(part, length, topk, need, rank, form, pages, offset, list, bins, scratch, out);
  } else if (share <= kWarpTokens) {
    select_shared<RANKS, true>(part, length, topk, need, rank, form, pages, offset, list, bins, scratch, out);
  } else {
    select_shared<RANKS, false>(part, length, topk, need, rank, form, pages, offset, list, bins, scratch, out);
  }
}

}  // namespace misa
