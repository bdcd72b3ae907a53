"""Scores of up to four rows a sequence against all its keys.

The keys are read once for all rows of a sequence. Each block takes an equal share of its sequence's pages, whatever the
length is, so that one long sequence fills the chip.
"""

import tilelang.language as T

from kernels.dimensions import dimensions
from kernels.paged_cache import PAGE_BYTES, PAGE_WORDS

STAGES = 8
MAX_ROWS = 4


def get_decode_score_kernel(heads: int):
    """A producer warpgroup streams pages as in `score`; one consumer warpgroup scores them for four rows."""
    columns = MAX_ROWS * heads
    rows, num_heads, pages, batch, max_pages, active_heads, stride, width = dimensions(
        "rows num_heads pages batch max_pages active_heads table_stride width"
    )

    @T.prim_func
    def decode_score(
        q: T.Tensor((rows, num_heads, 128), T.float8_e4m3fn),
        weights: T.Tensor((rows, num_heads), T.float32),
        active: T.Tensor((rows, active_heads), T.int32),
        keys: T.StridedTensor((pages, 64, 128), (PAGE_BYTES, 128, 1), T.float8_e4m3fn),
        scales: T.StridedTensor((pages, 64), (PAGE_WORDS, 1), T.float32),
        page_table: T.StridedTensor((batch, max_pages), (stride, 1), T.int32),
        lengths: T.Tensor((rows,), T.int32),
        scores: T.Tensor((rows, width), T.float32),
        rows_per_seq: T.int32,
        splits: T.int32,
        topk: T.int32,
        init_tokens: T.int32,
        local_tokens: T.int32,
    ):
        with T.Kernel(splits, batch, threads=256) as (split, seq):
            T.import_source('#include "score.cuh"\n#include "decode.cuh"\n')
            q_shared = T.alloc_shared((columns, 128), T.float8_e4m3fn)
            k_shared = T.alloc_shared((STAGES, 64, 128), T.float8_e4m3fn)
            s_shared = T.alloc_shared((STAGES, 64), T.float32)
            full = T.alloc_barrier([32] * STAGES)
            empty = T.alloc_barrier([4] * STAGES)
            acc = T.alloc_fragment((64, columns), T.float32)
            gate = T.alloc_local((heads,), T.float32)
            scale = T.alloc_local((2,), T.float32)
            score = T.alloc_local((2,), T.float32)
            longest = T.alloc_var(T.int32)
            length = T.alloc_var(T.int32)
            p0 = T.alloc_var(T.int32)
            num_pages = T.alloc_var(T.int32)
            tx = T.get_thread_binding()
            lane = tx % 32
            token = tx % 128 // 32 * 16 + lane // 4
            row = seq * rows_per_seq + T.min(lane % 4, rows_per_seq - 1)

            longest = 0
            for r in T.serial(rows_per_seq):
                longest = T.max(longest, lengths[seq * rows_per_seq + r])
            num_pages = (longest + 63) // 64
            p0 = T.truncdiv(num_pages * split, splits)
            num_pages = T.truncdiv(num_pages * (split + 1), splits) - p0
            if longest > topk and num_pages > 0:
                with T.ws(1):
                    # One warp streams. Every key is read once: the cache is better used for what is read again.
                    for i in T.serial(T.if_then_else(tx < 160, num_pages, 0)):
                        page = page_table[seq, p0 + i]
                        T.mbarrier_wait_parity(
                            empty[i % STAGES], ((i // STAGES) % 2) ^ 1
                        )
                        T.tma_copy(
                            keys[page, 0:64, 0:128],
                            k_shared[i % STAGES, :, :],
                            barrier=full[i % STAGES],
                            leader_scope_threads=32,
                            eviction_policy="evict_first",
                        )
                        T.tma_copy(
                            scales[page, 0:64],
                            s_shared[i % STAGES, :],
                            barrier=full[i % STAGES],
                            leader_scope_threads=32,
                            eviction_policy="evict_first",
                        )
                        T.mbarrier_arrive(full[i % STAGES])
                with T.ws(0):
                    for i in T.unroll(columns * 8 // 128):
                        c = (i * 128 + tx) // 8
                        d = (i * 128 + tx) % 8 * 16
                        j = c // 8 * 2 + c % 2
                        r = seq * rows_per_seq + T.min(c % 8 // 2, rows_per_seq - 1)
                        if c < columns:
                            head = active[r, T.min(j, active_heads - 1)]
                            for v in T.vectorized(16):
                                q_shared[c, d + v] = q[r, head, d + v]
                    T.fence_proxy_async()
                    T.sync_threads(1, 128)
                    # Lanes without a row of their own score one that is there and store nothing.
                    length = 0
                    if lane % 4 < rows_per_seq:
                        length = lengths[row]
                    for j in T.unroll(heads):
                        gate[j] = 0.0
                        if j < active_heads:
                            gate[j] = weights[row, active[row, j]]
                    for i in T.serial(num_pages):
                        T.mbarrier_wait_parity(full[i % STAGES], (i // STAGES) % 2)
                        T.gemm(
                            k_shared[i % STAGES, :, :],
                            q_shared,
                            acc,
                            transpose_B=True,
                            clear_accum=True,
                        )
                        scale[0] = s_shared[i % STAGES, token]
                        scale[1] = s_shared[i % STAGES, token + 8]
                        T.sync_warp()
                        if lane == 0:
                            T.mbarrier_arrive(empty[i % STAGES])
                        T.call_extern(
                            "handle",
                            f"misa::sum_heads<{heads}, 1>",
                            acc.data,
                            gate.data,
                            scale.data,
                            score.data,
                        )
                        T.call_extern(
                            "handle",
                            "misa::store_scores",
                            score.data,
                            (p0 + i) * 64 + token,
                            length,
                            init_tokens,
                            local_tokens,
                            T.address_of(scores[row, 0]),
                        )

    return decode_score
