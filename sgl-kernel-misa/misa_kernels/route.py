"""The router: which heads score the tokens of a row.

E[j] = |w[j]| / M * sum over the row's M pooled blocks of relu(q[j] . kbar[b]). The pooled keys of complete blocks come from
`pool_blocks`; that of the partial block at the end of the row's prefix is the row's own and is averaged here.
"""

import tilelang.language as T

from misa_kernels.accumulator import row_of
from misa_kernels.constants import HEAD_DIM, PAGE_SIZE
from misa_kernels.dimensions import dimensions
from misa_kernels.headers import include

MAX_HEADS = 64  # rows of a wgmma; with fewer heads some stay empty
BLOCKS = 32  # pooled keys multiplied at a time: few, so that many CTAs fit on an SM


def get_route_kernel(num_heads: int):
    """One CTA a row: a bf16 wgmma of all heads (M side) with the pooled keys. FP8 queries are exact in bf16."""
    rows, pages, batch, max_pages, stride, blocks, active_heads = dimensions(
        "rows pages batch max_pages table_stride blocks active_heads"
    )

    @T.prim_func
    def route(
        q: T.Tensor((rows, num_heads, HEAD_DIM), T.float8_e4m3fn),
        weights: T.Tensor((rows, num_heads), T.float32),
        pooled_keys: T.Tensor((pages, HEAD_DIM), T.bfloat16),
        pooled_blocks: T.Tensor((batch, blocks, HEAD_DIM), T.bfloat16),
        page_table: T.StridedTensor((batch, max_pages), (stride, 1), T.int32),
        cu_rows: T.Tensor((batch + 1,), T.int32),
        lengths: T.Tensor((rows,), T.int32),
        out: T.Tensor((rows, active_heads), T.int32),
        block_pages: T.int32,
    ):
        with T.Kernel(rows, threads=HEAD_DIM) as row:
            T.import_source(include("route.cuh"))
            T.annotate_min_blocks_per_sm(8)
            q_shared = T.alloc_shared((MAX_HEADS, HEAD_DIM), T.bfloat16)
            k_shared = T.alloc_shared((BLOCKS, HEAD_DIM), T.bfloat16)
            head_keys = T.alloc_shared((MAX_HEADS,), T.uint32)
            votes = T.alloc_shared((2,), T.uint32)
            acc = T.alloc_fragment((MAX_HEADS, BLOCKS), T.float32)
            sums = T.alloc_local((2,), T.float32)
            total = T.alloc_var(T.float64)
            estimate = T.alloc_var(T.float32)
            full = T.alloc_var(T.int32)
            partial = T.alloc_var(T.int32)
            count = T.alloc_var(T.int32)
            tx = T.get_thread_binding()
            T.pdl_trigger()
            for i in T.unroll(4):
                for v in T.vectorized(16):
                    h = i * 16 + tx // 8
                    if h < num_heads:
                        q_shared[h, tx % 8 * 16 + v] = T.cast(
                            q[row, h, tx % 8 * 16 + v], T.bfloat16
                        )
            # Padding rows belong to sequence `batch`.
            seq = T.call_extern(
                "int32", "misa::sequence_of_row", cu_rows.data, batch, row
            )
            full = 0
            partial = 0
            if seq < batch:
                full = lengths[row] // PAGE_SIZE // block_pages
                partial = lengths[row] // PAGE_SIZE % block_pages
            count = full + T.if_then_else(partial > 0, 1, 0)
            # Dimension tx of the partial block's mean.
            total = T.float64(0)
            for group in T.serial(T.ceildiv(partial, 16)):
                # Loads without a condition: all of a group are under way together.
                for i in T.unroll(16):
                    page = T.min(group * 16 + i, partial - 1)
                    mean = T.cast(
                        pooled_keys[page_table[seq, full * block_pages + page], tx],
                        T.float32,
                    )
                    if group * 16 + i < partial:
                        total += T.cast(mean, T.float64)
            for rr in T.unroll(2):
                sums[rr] = 0.0
            # All above comes from before `pool_blocks`.
            T.pdl_sync()
            # Barriers: the tile of pooled keys is zeroed and loaded; the partial block's has joined it; it was read.
            for first in T.serial(T.ceildiv(count, BLOCKS)):
                for i in T.unroll(BLOCKS // 8):
                    b = i * 8 + tx // 16
                    for v in T.vectorized(8):
                        k_shared[b, tx % 16 * 8 + v] = T.bfloat16(0)
                    if first * BLOCKS + b < full:
                        for v in T.vectorized(8):
                            k_shared[b, tx % 16 * 8 + v] = pooled_blocks[
                                seq, first * BLOCKS + b, tx % 16 * 8 + v
                            ]
                T.sync_threads()
                if partial > 0 and full // BLOCKS == first:
                    k_shared[full % BLOCKS, tx] = T.cast(
                        T.cast(total / T.cast(partial, T.float64), T.float32),
                        T.bfloat16,
                    )
                T.call_extern("handle", "misa::fence_async")
                T.sync_threads()
                T.gemm(q_shared, k_shared, acc, transpose_B=True, clear_accum=True)
                T.call_extern(
                    "handle", f"misa::add_relu<{BLOCKS}>", acc.data, sums.data
                )
                T.sync_threads()
            for rr in T.unroll(2):
                h = row_of(tx) + rr * 8
                sums[rr] = T.call_extern("float32", "misa::quad_sum", sums[rr])
                if tx % 4 == 0 and h < num_heads:
                    estimate = 0.0
                    if count > 0:
                        estimate = (
                            T.abs(weights[row, h]) * sums[rr] / T.cast(count, T.float32)
                        )
                    head_keys[h] = T.call_extern("uint32", "misa::head_key", estimate)
            T.sync_threads()  # the keys are written
            T.call_extern(
                "handle",
                f"misa::pick_heads<{num_heads}>",
                T.address_of(head_keys[0]),
                active_heads,
                T.address_of(votes[0]),
                T.address_of(out[row, 0]),
            )

    return route
