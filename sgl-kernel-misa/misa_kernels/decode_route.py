"""The router of decode: which heads score the rows of a sequence, in one kernel.

The same heads as `pool_blocks` and `route` choose, by the same definitions; the sums over blocks are in another order.
"""

import tilelang.language as T

from misa_kernels.constants import HEAD_DIM
from misa_kernels.dimensions import dimensions
from misa_kernels.headers import include

THREADS = 256
TILE = 16  # pooled keys at a time
KEY_BYTES = 320  # from one of them to the next


def get_decode_route_kernel(num_heads: int, most_rows: int, ranks: int):
    """A cluster of `ranks` CTAs a sequence of up to `most_rows` rows; its pooled keys are dealt to them."""
    rows, pages, batch, max_pages, stride, active_heads = dimensions(
        "rows pages batch max_pages table_stride active_heads"
    )

    @T.prim_func
    def decode_route(
        q: T.Tensor((rows, num_heads, HEAD_DIM), T.float8_e4m3fn),
        weights: T.Tensor((rows, num_heads), T.float32),
        pooled_keys: T.Tensor((pages, HEAD_DIM), T.bfloat16),
        page_table: T.StridedTensor((batch, max_pages), (stride, 1), T.int32),
        lengths: T.Tensor((rows,), T.int32),
        out: T.Tensor((rows, active_heads), T.int32),
        dealt: T.Tensor((1,), T.int32),
        rows_per_seq: T.int32,
        block_pages: T.int32,
    ):
        with T.Kernel(ranks, batch, threads=THREADS, cluster_dims=(ranks, 1, 1)) as (
            rank,
            seq,
        ):
            T.import_source(
                include(
                    "decode_route.cuh",
                    kThreads=THREADS,
                    kTile=TILE,
                    kKeyBytes=KEY_BYTES,
                )
            )
            T.annotate_min_blocks_per_sm(2)
            q_shared = T.alloc_shared((most_rows * num_heads, HEAD_DIM), T.int8)
            k_shared = T.alloc_shared((TILE, KEY_BYTES), T.int8)
            sees = T.alloc_shared((2 * TILE,), T.uint32)
            sums = T.alloc_shared((most_rows * num_heads,), T.float32)
            head_keys = T.alloc_shared((most_rows * num_heads,), T.uint32)
            votes = T.alloc_shared((2 * most_rows,), T.uint32)
            # `decode_score` may start: until it has the heads it reads only what was there before this kernel.
            T.pdl_trigger()
            if rank == 0 and seq == 0 and T.get_thread_binding() == 0:
                dealt[0] = 0
            T.call_extern(
                "handle",
                f"misa::route_sequence<{num_heads}, {most_rows}, {ranks}>",
                T.address_of(q[seq * rows_per_seq, 0, 0]),
                T.address_of(weights[seq * rows_per_seq, 0]),
                pooled_keys.data,
                T.address_of(page_table[seq, 0]),
                T.address_of(lengths[seq * rows_per_seq]),
                rows_per_seq,
                max_pages,
                block_pages,
                active_heads,
                rank,
                T.address_of(q_shared[0, 0]),
                T.address_of(k_shared[0, 0]),
                T.address_of(sees[0]),
                T.address_of(sums[0]),
                T.address_of(head_keys[0]),
                T.address_of(votes[0]),
                T.address_of(out[seq * rows_per_seq, 0]),
            )

    return decode_route
