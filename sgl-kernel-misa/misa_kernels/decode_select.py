"""Exact top-k of a row from its scores.

The CTAs of a cluster share a row, each with its part of the scores in registers, and exchange what they count through
distributed shared memory. A sample bounds the k-th score from below; the few tokens over that bound are listed, and the rest
is done on the lists. Where that fails, a radix selection looks at all digits of all scores.
"""

import tilelang.language as T

from misa_kernels.constants import DECODE_CANDIDATES, FORMS
from misa_kernels.dimensions import dimensions
from misa_kernels.headers import BINS, SCRATCH, include

THREADS = 512


def get_decode_select_kernel(ranks: int):
    """A cluster of `ranks` CTAs a row. It starts while `decode_score` runs, and prepares what does not depend on it."""
    rows, batch, max_pages, stride, width, topk = dimensions(
        "rows batch max_pages table_stride width topk"
    )

    @T.prim_func
    def decode_select(
        scores: T.Tensor((rows, width), T.float32),
        page_table: T.StridedTensor((batch, max_pages), (stride, 1), T.int32),
        lengths: T.Tensor((rows,), T.int32),
        offsets: T.Tensor((rows,), T.int32),
        out: T.Tensor((rows, topk), T.int32),
        rows_per_seq: T.int32,
        form: T.int32,
    ):
        with T.Kernel(ranks, rows, threads=THREADS, cluster_dims=(ranks, 1, 1)) as (
            rank,
            row,
        ):
            T.import_source(
                include(
                    "decode_select.cuh", kThreads=THREADS, kCandidates=DECODE_CANDIDATES
                )
            )
            T.annotate_min_blocks_per_sm(2)
            candidates = T.alloc_shared((DECODE_CANDIDATES,), T.uint64)
            bins = T.alloc_shared((2 * BINS,), T.int32)
            scratch = T.alloc_shared((SCRATCH,), T.int32)
            length = T.alloc_var(T.int32)
            offset = T.alloc_var(T.int32)
            seq = T.truncdiv(row, rows_per_seq)
            length = lengths[row]
            offset = 0
            if form == FORMS["ragged"]:
                offset = offsets[row]
            # The length is that of the whole cluster: all of its CTAs wait for each other, or none.
            if length > topk:
                T.call_extern(
                    "handle",
                    f"misa::select_row<{ranks}>",
                    T.address_of(scores[row, 0]),
                    length,
                    topk,
                    rank,
                    form,
                    T.address_of(page_table[seq, 0]),
                    offset,
                    T.address_of(candidates[0]),
                    T.address_of(bins[0]),
                    T.address_of(scratch[0]),
                    T.address_of(out[row, 0]),
                )
            else:
                if rank == 0:
                    T.call_extern(
                        "handle",
                        f"misa::select_all<{THREADS}>",
                        length,
                        topk,
                        form,
                        T.address_of(page_table[seq, 0]),
                        offset,
                        T.address_of(out[row, 0]),
                    )
            # Whoever waits for this kernel may rely on all before it.
            T.pdl_sync()

    return decode_select
