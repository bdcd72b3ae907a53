"""The second stage of hierarchical MISA: a row's candidates scored with all heads, and the best of them selected."""

import tilelang.language as T

from misa_kernels.constants import FORMS, HEAD_DIM, PAGE_BYTES, PAGE_SIZE
from misa_kernels.dimensions import dimensions
from misa_kernels.headers import BINS, SCRATCH, include
from misa_kernels.paged_cache import PAGE_WORDS

THREADS = 256
LISTED_TILE = 64  # tokens that a warpgroup multiplies at a time
TILE = THREADS // 128 * LISTED_TILE
ALIGNMENT = 1024  # bytes, of the queries


def get_rerank_kernel(num_heads: int, capacity: int, ranks: int):
    """Listed keys on the M side of a wgmma, the row's heads on the N side.

    Args:
        num_heads: heads of the indexer, H.
        capacity: most candidates a row may have.
        ranks: CTAs that share a row, a cluster: each scores a part of the candidates, the first one selects.
    """
    rows, pages, batch, max_pages, stride, candidates_, topk = dimensions(
        "rows pages batch max_pages table_stride num_candidates topk"
    )

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
            T.import_source(
                include(
                    "listed_scores.cuh",
                    "rerank.cuh",
                    kListedTile=LISTED_TILE,
                    kQueriesAlignment=ALIGNMENT,
                )
            )
            T.annotate_min_blocks_per_sm(3)
            scores = T.alloc_shared((capacity,), T.uint32)
            q_shared = T.alloc_shared((num_heads * HEAD_DIM + ALIGNMENT,), T.int8)
            bins = T.alloc_shared((BINS,), T.int32)
            scratch = T.alloc_shared((SCRATCH,), T.int32)
            gates = T.alloc_shared((num_heads,), T.float32)
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
                T.call_extern(
                    "handle",
                    f"misa::copy_queries_in_quads<{num_heads}, {THREADS}>",
                    T.address_of(q[row, 0, 0]),
                    T.address_of(q_shared[0]),
                )
                if tx < num_heads:
                    gates[tx] = weights[row, tx]
                T.call_extern(
                    "handle",
                    f"misa::score_slots<{num_heads}, {THREADS}>",
                    keys.data,
                    scales.data,
                    T.address_of(scores[0]),
                    mine,
                    T.address_of(q_shared[0]),
                    T.address_of(gates[0]),
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
                        T.address_of(bins[0]),
                        T.address_of(scratch[0]),
                        form,
                        T.address_of(page_table[seq, 0]),
                        offset,
                        T.address_of(out[row, 0]),
                    )

    return rerank
