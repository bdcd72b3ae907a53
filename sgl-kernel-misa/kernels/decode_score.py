"""Scores of up to four rows a sequence against all its keys.

The keys are read once for all rows of a sequence. The pages of all sequences lie end to end; the grid, which is resident as
a whole, takes them in rounds, an equal share a block: one long sequence fills the chip, and many finish one after another,
so that `decode_select` can begin with the first while the last are scored.
"""

import tilelang.language as T

from kernels.dimensions import dimensions
from kernels.paged_cache import PAGE_BYTES, PAGE_WORDS

STAGES = 8
MAX_ROWS = 4


def get_decode_score_kernel(heads: int):
    """A producer warp streams pages as in `score`; one consumer warpgroup scores them for four rows.

    The keys begin to stream before the heads are known: only the consumers wait for the kernel before this one.
    """
    columns = MAX_ROWS * heads
    rows, num_heads, pages, batch, max_pages, active_heads, stride, width = dimensions(
        "rows num_heads pages batch max_pages active_heads table_stride width"
    )

    @T.macro
    def load_queries(q, weights, active, seq, rows_per_seq, q_shared, gate):
        tx = T.get_thread_binding()
        for i in T.unroll(-(-columns * 8 // 128)):
            c = (i * 128 + tx) // 8
            d = (i * 128 + tx) % 8 * 16
            j = c // 8 * 2 + c % 2
            r = seq * rows_per_seq + T.min(c % 8 // 2, rows_per_seq - 1)
            if c < columns:
                head = active[r, T.min(j, active_heads - 1)]
                for v in T.vectorized(16):
                    q_shared[c, d + v] = q[r, head, d + v]
        for j in T.unroll(heads):
            gate[j] = 0.0
            if j < active_heads:
                row = seq * rows_per_seq + T.min(tx % 4, rows_per_seq - 1)
                gate[j] = weights[row, active[row, j]]

    @T.prim_func
    def decode_score(
        q: T.Tensor((rows, num_heads, 128), T.float8_e4m3fn),
        weights: T.Tensor((rows, num_heads), T.float32),
        active: T.Tensor((rows, active_heads), T.int32),
        keys: T.StridedTensor((pages, 64, 128), (PAGE_BYTES, 128, 1), T.float8_e4m3fn),
        scales: T.StridedTensor((pages, 64), (PAGE_WORDS, 1), T.float32),
        page_table: T.StridedTensor((batch, max_pages), (stride, 1), T.int32),
        lengths: T.Tensor((rows,), T.int32),
        progress: T.Tensor((batch,), T.int32),
        scores: T.Tensor((rows, width), T.float32),
        rows_per_seq: T.int32,
        blocks: T.int32,
        topk: T.int32,
        init_tokens: T.int32,
        local_tokens: T.int32,
    ):
        with T.Kernel(blocks, threads=256) as block:
            T.import_source('#include "score.cuh"\n#include "decode_score.cuh"\n')
            q_shared = T.alloc_shared((columns, 128), T.float8_e4m3fn)
            k_shared = T.alloc_shared((STAGES, 64, 128), T.float8_e4m3fn)
            s_shared = T.alloc_shared((STAGES, 64), T.float32)
            full = T.alloc_barrier([32] * STAGES)
            empty = T.alloc_barrier([4] * STAGES)
            acc = T.alloc_fragment((64, columns), T.float32)
            gate = T.alloc_local((heads,), T.float32)
            scale = T.alloc_local((2,), T.float32)
            score = T.alloc_local((2,), T.float32)
            walk = T.alloc_local((12,), T.int32)
            length = T.alloc_var(T.int32)
            count = T.alloc_var(T.int32)
            page = T.alloc_var(T.int32)
            row = T.alloc_var(T.int32)
            tx = T.get_thread_binding()
            lane = tx % 32
            token = tx % 128 // 32 * 16 + lane // 4

            count = T.call_extern(
                "int32",
                "misa::walk_begin",
                walk.data,
                lengths.data,
                batch,
                rows_per_seq,
                topk,
                block,
                blocks,
            )
            with T.ws(1):
                # One warp streams. Every key is read once: the cache is better used for what is read again.
                for i in T.serial(T.if_then_else(tx < 160, count, 0)):
                    page = T.call_extern(
                        "int32",
                        "misa::walk_to_page",
                        walk.data,
                        lengths.data,
                        batch,
                        rows_per_seq,
                        topk,
                        page_table.data,
                        stride,
                    )
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
                T.pdl_sync()
                # The next kernel waits for `progress`, which has been cleared by now.
                T.pdl_trigger()
                row = 0
                length = 0
                for i in T.serial(count):
                    if T.call_extern(
                        "bool",
                        "misa::walk_step",
                        walk.data,
                        lengths.data,
                        batch,
                        rows_per_seq,
                        topk,
                    ):
                        load_queries(
                            q, weights, active, walk[0], rows_per_seq, q_shared, gate
                        )
                        T.fence_proxy_async()
                        T.sync_threads(1, 128)
                        # Lanes without a row of their own score one that is there and store nothing.
                        row = walk[0] * rows_per_seq + T.min(lane % 4, rows_per_seq - 1)
                        length = 0
                        if lane % 4 < rows_per_seq:
                            length = lengths[row]
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
                        walk[1] * 64 + token,
                        length,
                        init_tokens,
                        local_tokens,
                        T.address_of(scores[row, 0]),
                    )
                    if walk[2] == 0:
                        T.sync_threads(1, 128)
                        T.call_extern(
                            "handle",
                            "misa::report_progress",
                            T.address_of(progress[walk[0]]),
                            walk[3],
                        )

    return decode_score
