"""The second stage of hierarchical MISA: a row's candidates scored with all heads, and the best of them selected."""

from types import SimpleNamespace

import tilelang.language as T

from misa_kernels.constants import FORMS, HEAD_DIM, PAGE_BYTES, PAGE_SIZE
from misa_kernels.dimensions import dimensions
from misa_kernels.gather import TILE, get_score_listed
from misa_kernels.headers import BINS, SCRATCH, include
from misa_kernels.paged_cache import PAGE_WORDS

THREADS = 256


def stages_for(capacity: int) -> int:
    """Tiles on the chip: three, where three CTAs still fit on an SM with them."""
    return 3 if capacity <= 4096 else 2


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

    stages = stages_for(capacity)
    assert (
        stages * TILE * HEAD_DIM >= 4 * BINS
    ), "the histogram lies where the keys were"

    @T.macro
    def sum_heads(row):
        T.call_extern(
            "handle",
            f"misa::sum_heads_of_quad<{num_heads}>",
            row.acc.data,
            row.gate.data,
            row.scale.data,
            row.score.data,
        )

    score_listed = get_score_listed(THREADS, stages, sum_heads)

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
            k_shared = T.alloc_shared((stages, TILE, HEAD_DIM), T.float8_e4m3fn)
            s_shared = T.alloc_shared((stages, TILE), T.float32)
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
                score_listed(
                    SimpleNamespace(
                        keys=keys,
                        scales=scales,
                        scores=scores,
                        q_shared=q_shared,
                        k_shared=k_shared,
                        s_shared=s_shared,
                        acc=acc,
                        registers=TILE * num_heads // THREADS,
                        gate=gate,
                        scale=scale,
                        score=score,
                    ),
                    mine,
                )
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
