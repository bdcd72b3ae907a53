"""Scores of up to four rows a sequence against all its keys.

The keys are read once for all rows of a sequence. The pages of all sequences lie end to end, and the grid, which is resident
as a whole, takes an equal share of them a block.
"""

import tilelang.language as T

from kernels.dimensions import dimensions
from kernels.paged_cache import PAGE_BYTES, PAGE_WORDS

STAGES = 8
MAX_ROWS = 4


def get_decode_score_kernel(heads: int):
    """A producer warp streams pages as in `score`; one consumer warpgroup scores them for four rows.

    After `decode_route` (`routed` is 1) the keys begin to stream before the heads are known: only the heads are that
    kernel's, and only what follows from them waits for it.
    """
    columns = MAX_ROWS * heads
    pieces = columns * 8 // 128  # of 16 bytes of the queries, a thread
    rows, num_heads, pages, batch, max_pages, active_heads, stride, width = dimensions(
        "rows num_heads pages batch max_pages active_heads table_stride width"
    )

    @T.macro
    def load_queries(
        q, weights, active, seq, rows_per_seq, heads_of, piece, q_shared, gate
    ):
        """Every load of a step is under way before the first is waited for."""
        tx = T.get_thread_binding()
        row = seq * rows_per_seq + T.min(tx % 4, rows_per_seq - 1)
        for i in T.unroll(pieces):
            c = T.min((i * 128 + tx) // 8, columns - 1)
            j = c // 8 * 2 + c % 2
            r = seq * rows_per_seq + T.min(c % 8 // 2, rows_per_seq - 1)
            heads_of[i] = active[r, T.min(j, active_heads - 1)]
        for j in T.unroll(heads):
            heads_of[pieces + j] = active[row, T.min(j, active_heads - 1)]
        for i in T.unroll(pieces):
            c = T.min((i * 128 + tx) // 8, columns - 1)
            r = seq * rows_per_seq + T.min(c % 8 // 2, rows_per_seq - 1)
            for v in T.vectorized(16):
                piece[i * 16 + v] = q[r, heads_of[i], tx % 8 * 16 + v]
        for j in T.unroll(heads):
            gate[j] = weights[row, heads_of[pieces + j]]
        for j in T.unroll(heads):
            gate[j] = T.if_then_else(j < active_heads, gate[j], 0.0)
        for i in T.unroll(pieces):
            c = (i * 128 + tx) // 8
            for v in T.vectorized(16):
                q_shared[c, tx % 8 * 16 + v] = piece[i * 16 + v]

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
        blocks: T.int32,
        routed: T.int32,
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
            walk = T.alloc_local((8,), T.int32)
            heads_of = T.alloc_local((pieces + heads,), T.int32)
            piece = T.alloc_local((pieces * 16,), T.float8_e4m3fn)
            length = T.alloc_var(T.int32)
            count = T.alloc_var(T.int32)
            page = T.alloc_var(T.int32)
            row = T.alloc_var(T.int32)
            tx = T.get_thread_binding()
            lane = tx % 32
            token = tx % 128 // 32 * 16 + lane // 4

            if routed == 0:
                T.pdl_sync()
            # The next kernel does little before it waits for this one, but it takes a while to start.
            T.pdl_trigger()
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
                    T.mbarrier_wait_parity(empty[i % STAGES], ((i // STAGES) % 2) ^ 1)
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
                        # Lanes without a row of their own score one that is there and store nothing.
                        row = walk[0] * rows_per_seq + T.min(lane % 4, rows_per_seq - 1)
                        length = 0
                        if lane % 4 < rows_per_seq:
                            length = lengths[row]
                        # The heads are those of the kernel before this one; nothing more of it is waited for.
                        T.pdl_sync()
                        T.call_extern("handle", "misa::sync_some<128>")
                        load_queries(
                            q,
                            weights,
                            active,
                            walk[0],
                            rows_per_seq,
                            heads_of,
                            piece,
                            q_shared,
                            gate,
                        )
                        T.call_extern("handle", "misa::fence_async")
                        T.call_extern("handle", "misa::sync_some<128>")
                        # The same fence once more, or TileLang places one before every page's products.
                        T.fence_proxy_async()
                    T.mbarrier_wait_parity(full[i % STAGES], (i // STAGES) % 2)
                    T.gemm(
                        k_shared[i % STAGES, :, :],
                        q_shared,
                        acc,
                        transpose_B=True,
                        clear_accum=True,
                    )
                    for rr in T.unroll(2):
                        scale[rr] = T.call_extern(
                            "float32",
                            "misa::load_scale",
                            T.address_of(s_shared[i % STAGES, token + rr * 8]),
                        )
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
                # A block without a page waits as well: whoever waits for this kernel relies on all before it.
                T.pdl_sync()

    return decode_score
