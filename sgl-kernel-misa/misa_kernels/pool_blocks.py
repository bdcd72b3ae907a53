"""Pooled keys of the complete blocks of every sequence: means of their page means."""

import tilelang.language as T

from misa_kernels.constants import HEAD_DIM, PAGE_SIZE
from misa_kernels.dimensions import dimensions

GROUP = 16  # pages whose loads are under way at once


def get_pool_blocks_kernel():
    """A CTA a pooled block: thread d averages its dimension d, in float64."""
    pages, batch, max_pages, stride, blocks, rows = dimensions(
        "pages batch max_pages table_stride blocks rows"
    )

    @T.prim_func
    def pool_blocks(
        pooled_keys: T.Tensor((pages, HEAD_DIM), T.bfloat16),
        page_table: T.StridedTensor((batch, max_pages), (stride, 1), T.int32),
        cu_rows: T.Tensor((batch + 1,), T.int32),
        lengths: T.Tensor((rows,), T.int32),
        out: T.Tensor((batch, blocks, HEAD_DIM), T.bfloat16),
        block_pages: T.int32,
    ):
        with T.Kernel(blocks, batch, threads=HEAD_DIM) as (block, seq):
            means = T.alloc_local((GROUP,), T.float32)
            total = T.alloc_var(T.float64)
            length = T.alloc_var(T.int32)
            d = T.get_thread_binding()
            T.pdl_trigger()
            length = 0
            if cu_rows[seq] < cu_rows[seq + 1]:
                length = lengths[cu_rows[seq + 1] - 1]
            if (block + 1) * block_pages * PAGE_SIZE <= length:
                total = T.float64(0)
                for first in T.serial(T.ceildiv(block_pages, GROUP)):
                    for i in T.unroll(GROUP):
                        # Past the last page that page again, and nothing of it: no load waits for a condition.
                        page = T.min(first * GROUP + i, block_pages - 1)
                        means[i] = T.cast(
                            pooled_keys[page_table[seq, block * block_pages + page], d],
                            T.float32,
                        )
                    for i in T.unroll(GROUP):
                        if first * GROUP + i < block_pages:
                            total += T.cast(means[i], T.float64)
                out[seq, block, d] = T.cast(
                    T.cast(total / T.cast(block_pages, T.float64), T.float32),
                    T.bfloat16,
                )

    return pool_blocks
