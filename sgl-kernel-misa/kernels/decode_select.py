"""Exact top-k of a row from its scores.

The blocks of a cluster share a row: each takes a slice of the scores and counts their digits, all add up the histograms of
all through distributed shared memory, and so find the k-th score, however close to each other the scores lie. Then each
writes the positions of its slice.
"""

import tilelang.language as T

from kernels.dimensions import dimensions

CLUSTER = 8  # kCluster of decode.cuh
THREADS = 512
CAPACITY = 16384  # scores of a slice that shared memory holds; of longer slices they are read again


def get_decode_select_kernel():
    """A cluster a row."""
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
        with T.Kernel(CLUSTER, rows, threads=THREADS, cluster_dims=(CLUSTER, 1, 1)) as (
            rank,
            row,
        ):
            T.import_source('#include "decode.cuh"\n')
            T.annotate_min_blocks_per_sm(2)
            keys = T.alloc_shared((CAPACITY,), T.uint32)
            bins = T.alloc_shared((2 * 2048,), T.int32)
            scratch = T.alloc_shared((64,), T.int32)
            length = T.alloc_var(T.int32)
            offset = T.alloc_var(T.int32)
            seq = T.truncdiv(row, rows_per_seq)
            length = lengths[row]
            offset = 0
            if form == 2:
                offset = offsets[row]
            # The length is that of the whole cluster: all of its blocks wait for each other, or none.
            if length > topk:
                T.call_extern(
                    "handle",
                    f"misa::select_row<{THREADS}>",
                    T.address_of(scores[row, 0]),
                    length,
                    topk,
                    rank,
                    form,
                    T.address_of(page_table[seq, 0]),
                    offset,
                    T.address_of(keys[0]),
                    CAPACITY,
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

    return decode_select
