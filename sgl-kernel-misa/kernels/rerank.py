"""The second stage of hierarchical MISA: a row's candidates scored with all heads, and the best of them selected."""

import tilelang.language as T

from kernels.accumulator import row_of
from kernels.constants import FORMS, HEAD_DIM, PAGE_BYTES, PAGE_SIZE
from kernels.dimensions import dimensions
from kernels.headers import BINS, SCRATCH, include
from kernels.paged_cache import PAGE_WORDS, get_gather_keys

THREADS = 256
TILE = 128
STAGES = 2  # tiles on the chip: one is scored while the next is gathered; so three CTAs fit on an SM


def get_rerank_kernel(num_heads: int, capacity: int, ranks: int):
    """Gathered keys on the M side of a wgmma, the row's heads on the N side.

    Args:
        num_heads: heads of the indexer, H.
        capacity: most candidates a row may have.
        ranks: CTAs that share a row, a cluster: each scores a part of the candidates, the first one selects.
    """
    rows, pages, batch, max_pages, stride, candidates_, topk = dimensions(
        "rows pages batch max_pages table_stride num_candidates topk"
    )

    gather_keys = get_gather_keys(THREADS, TILE, STAGES)
    assert (
        STAGES * TILE * HEAD_DIM >= 4 * BINS
    ), "the histogram lies where the keys were"

    @T.prim_func
    def rerank(
        q: T.Tensor((rows, num_heads, HEAD_DIM), T.float8_e4m3fn),
        weights: T.Tensor((rows, num_heads), T.float32),
        candidates: T.Tensor((rows, candidates_), T.int32),
        keys: T.StridedTensor(
            (pages, PAGE_SIZE, HEAD_DIM), (PAGE_BYTES, HEAD_DIM, 1), T.float8_e4m3fn
        ),
        scales: T.StridedTensor((pages, PAGE_SIZE), (PAGE_WORDS, 1), T.float32),
        page_table: T.StridedTensor((batch, max_pages), (stride, 1), T.int32),
        cu_rows: T.Tensor((batch + 1,), T.int32),
        lengths: T.Tensor((rows,), T.int32),
        offsets: T.Tensor((rows,), T.int32),
        out: T.Tensor((rows, topk), T.int32),
        init_tokens: T.int32,
        local_tokens: T.int32,
        form: T.int32,
    ):
        with T.Kernel(rows * ranks, threads=THREADS, cluster_dims=(ranks, 1, 1)) as cta:
            T.import_source(include("gather.cuh", "score.cuh", "rerank.cuh"))
            scores = T.alloc_shared((capacity,), T.uint32)
            q_shared = T.alloc_shared((num_heads, HEAD_DIM), T.float8_e4m3fn)
            k_shared = T.alloc_shared((STAGES, TILE, HEAD_DIM), T.float8_e4m3fn)
            s_shared = T.alloc_shared((STAGES, TILE), T.float32)
            scratch = T.alloc_shared((SCRATCH,), T.int32)
            acc = T.alloc_fragment((TILE, num_heads), T.float32)
            gate = T.alloc_local((num_heads // 4,), T.float32)
            scale = T.alloc_local((2,), T.float32)
            score = T.alloc_local((2,), T.float32)
            count = T.alloc_var(T.int32)
            mine = T.alloc_var(T.int32)
            offset = T.alloc_var(T.int32)
            tx = T.get_thread_binding()
            row = T.truncdiv(cta, ranks)
            rank = T.truncmod(cta, ranks)
            share = T.ceildiv(T.ceildiv(candidates_, ranks), TILE) * TILE
            entry = row_of(tx)
            seq = T.call_extern(
                "int32", "misa::sequence_of_row", cu_rows.data, batch, row
            )
            count = 0
            if seq < batch:
                # An entry is a slot until its key is gathered, then a score.
                count = T.call_extern(
                    "int32",
                    f"misa::list_slots<{THREADS}>",
                    T.address_of(candidates[row, 0]),
                    candidates_,
                    rank * share,
                    share,
                    T.address_of(page_table[seq, 0]),
                    T.address_of(scores[0]),
                    T.address_of(scratch[0]),
                )
            mine = T.max(T.min(count - rank * share, share), 0)
            offset = 0
            if form == FORMS["ragged"]:
                offset = offsets[row]
            for i in T.serial(T.if_then_else(rank == 0, T.ceildiv(topk, THREADS), 0)):
                if i * THREADS + tx < topk and i * THREADS + tx >= T.min(count, topk):
                    out[row, i * THREADS + tx] = -1
            if count > 0:
                for i in T.serial(num_heads * 8 // THREADS):
                    for v in T.vectorized(16):
                        q_shared[i * (THREADS // 8) + tx // 8, tx % 8 * 16 + v] = q[
                            row, i * (THREADS // 8) + tx // 8, tx % 8 * 16 + v
                        ]
                T.call_extern("handle", "misa::fence_async")
                for i in T.unroll(num_heads // 8):
                    for b in T.unroll(2):
                        gate[i * 2 + b] = weights[row, i * 8 + tx % 4 * 2 + b]
                T.call_extern(
                    "handle",
                    f"misa::fill_last_tile<{THREADS}, {TILE}>",
                    T.address_of(scores[0]),
                    mine,
                )
                for tile in T.unroll(STAGES - 1):
                    gather_keys(keys, scales, scores, tile, mine, k_shared, s_shared)
                for tile in T.serial(T.ceildiv(mine, TILE)):
                    gather_keys(
                        keys,
                        scales,
                        scores,
                        tile + STAGES - 1,
                        mine,
                        k_shared,
                        s_shared,
                    )
                    T.call_extern("handle", f"misa::wait_gathered<{STAGES - 1}>")
                    T.sync_threads()  # the tile is there
                    T.gemm(
                        k_shared[tile % STAGES, :, :],
                        q_shared,
                        acc,
                        transpose_B=True,
                        clear_accum=True,
                        policy=T.GemmWarpPolicy.FullRow,
                    )
                    for rr in T.unroll(2):
                        scale[rr] = s_shared[tile % STAGES, entry + rr * 8]
                    T.call_extern(
                        "handle",
                        f"misa::sum_heads_of_quad<{num_heads}>",
                        acc.data,
                        gate.data,
                        scale.data,
                        score.data,
                    )
                    # Entries that only fill up the last tile get scores too; nobody looks at them.
                    if tx % 4 == 0:
                        for rr in T.unroll(2):
                            scores[tile * TILE + entry + rr * 8] = T.call_extern(
                                "uint32", "misa::ordered", score[rr]
                            )
                    # The tile was read: the next gather overwrites it. And its slots have become scores.
                    T.sync_threads()
                if ranks > 1:
                    T.call_extern(
                        "handle",
                        f"misa::collect_scores<{THREADS}, {ranks}>",
                        T.address_of(scores[0]),
                        share,
                        count,
                        rank,
                    )
                if rank == 0:
                    if init_tokens + local_tokens > 0:
                        T.call_extern(
                            "handle",
                            f"misa::force_listed<{THREADS}>",
                            T.address_of(candidates[row, 0]),
                            T.address_of(scores[0]),
                            count,
                            init_tokens,
                            lengths[row] - local_tokens,
                        )
                    T.call_extern(
                        "handle",
                        f"misa::select_listed<{THREADS}>",
                        T.address_of(candidates[row, 0]),
                        T.address_of(scores[0]),
                        count,
                        T.min(count, topk),
                        T.address_of(k_shared[0, 0, 0]),  # free by now: the histogram
                        T.address_of(scratch[0]),
                        form,
                        T.address_of(page_table[seq, 0]),
                        offset,
                        T.address_of(out[row, 0]),
                    )

    return rerank
