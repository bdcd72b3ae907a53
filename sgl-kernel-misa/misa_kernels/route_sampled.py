"""The sampled router: which heads score a row, and the shared head that stands for the lines of all others.

One router for prefill, decode and verify. A row's result is made by the same instructions in the same order wherever the row
lies, so it is the same bits in any batch: one wgmma of its 64 heads with 256 sampled keys, sums over that accumulator, and a
fit of every head (`sampled_router.cuh`). What it costs does not grow with the context.
"""

import tilelang.language as T

from misa_kernels.constants import HEAD_DIM, PAGE_BYTES, PAGE_SIZE, ROUTER_CTAS_PER_SM
from misa_kernels.dimensions import dimensions
from misa_kernels.headers import include
from misa_kernels.paged_cache import PAGE_WORDS

THREADS = 128  # one warpgroup
SAMPLES = 256  # the most keys that stand for a prefix
COLUMNS = 64  # heads of the wgmma


def get_route_sampled_kernel(num_heads: int):
    """One CTA a tile of up to `tile_rows` rows of one sequence; `rows_per_seq` rows a sequence, or as `cu_rows` says where that is 0.

    An indexer of 32 heads fills half of the wgmma with the same heads again.
    """
    rows, pages, batch, max_pages, stride, routed, bounds = dimensions(
        "rows pages batch max_pages table_stride routed bounds"
    )

    @T.prim_func
    def route_sampled(
        q: T.Tensor((rows, num_heads, HEAD_DIM), T.float8_e4m3fn),
        weights: T.Tensor((rows, num_heads), T.float32),
        keys: T.StridedTensor(
            (pages, PAGE_SIZE, HEAD_DIM), (PAGE_BYTES, HEAD_DIM, 1), T.float8_e4m3fn
        ),
        scales: T.StridedTensor((pages, PAGE_SIZE), (PAGE_WORDS, 1), T.float32),
        page_table: T.StridedTensor((batch, max_pages), (stride, 1), T.int32),
        cu_rows: T.Tensor((bounds,), T.int32),
        lengths: T.Tensor((rows,), T.int32),
        heads: T.Tensor((rows, routed), T.int32),
        shared_q: T.Tensor((rows, HEAD_DIM), T.float8_e4m3fn),
        shared_scale: T.Tensor((rows,), T.float32),
        dealt: T.Tensor((1,), T.int32),
        rows_per_seq: T.int32,
        tile_rows: T.int32,
        tiles: T.int32,
    ):
        with T.Kernel(tiles, threads=THREADS) as tile:
            T.import_source(
                include(
                    "sampled_router.cuh",
                    kRouterThreads=THREADS,
                    kSamples=SAMPLES,
                    kColumns=COLUMNS,
                )
            )
            T.annotate_min_blocks_per_sm(ROUTER_CTAS_PER_SM)
            q_shared = T.alloc_shared((2, COLUMNS, HEAD_DIM), T.float8_e4m3fn)
            k_shared = T.alloc_shared((SAMPLES, HEAD_DIM), T.float8_e4m3fn)
            s_shared = T.alloc_shared((SAMPLES,), T.float32)
            scaled = T.alloc_shared((SAMPLES,), T.float32)
            ranked = T.alloc_shared((COLUMNS,), T.uint32)  # the estimates, as keys
            slopes = T.alloc_shared((COLUMNS,), T.float32)
            factors = T.alloc_shared((COLUMNS,), T.float32)
            sums = T.alloc_shared((THREADS // 32 * HEAD_DIM,), T.float32)
            largest = T.alloc_shared((THREADS // 32,), T.float32)
            votes = T.alloc_shared((2,), T.uint32)
            acc = T.alloc_fragment((COLUMNS, SAMPLES), T.float32)
            seq = T.alloc_var(T.int32)
            row0 = T.alloc_var(T.int32)
            row1 = T.alloc_var(T.int32)
            length = T.alloc_var(T.int32)
            shift = T.alloc_var(T.int32)
            copied = T.alloc_var(T.int32)
            samples = T.alloc_var(T.int32)  # that `scaled` is for
            tx = T.get_thread_binding()

            # In decode, `decode_score` may start: until it has the heads it reads only what was there before this kernel.
            T.pdl_trigger()
            if tile == 0 and tx == 0:
                dealt[0] = 0
            if rows_per_seq > 0:
                parts = T.truncdiv(rows_per_seq + tile_rows - 1, tile_rows)
                seq = T.truncdiv(tile, parts)
                row0 = seq * rows_per_seq + (tile - seq * parts) * tile_rows
                row1 = T.min(row0 + tile_rows, (seq + 1) * rows_per_seq)
            else:
                # Rows behind the last sequence are padding, a sequence of their own.
                seq = T.call_extern(
                    "int32",
                    "misa::sequence_of_tile",
                    cu_rows.data,
                    batch,
                    tile,
                    tile_rows,
                )
                row0 = T.call_extern(
                    "int32",
                    "misa::first_row_of_tile",
                    cu_rows.data,
                    seq,
                    tile,
                    tile_rows,
                )
                row1 = rows
                if seq < batch:
                    row1 = cu_rows[seq + 1]
                row1 = T.min(row1, row0 + tile_rows)
            copied = -1
            samples = -1
            if row0 < row1:
                T.call_extern(
                    "handle",
                    f"misa::copy_heads<{num_heads}>",
                    T.address_of(q[row0, 0, 0]),
                    T.address_of(q_shared[0, 0, 0]),
                )
            for i in T.serial(T.max(row1 - row0, 0)):
                row = row0 + i
                # The next row's queries are on their way while this one is routed; the last one's come once more.
                T.call_extern(
                    "handle",
                    f"misa::copy_heads<{num_heads}>",
                    T.address_of(q[T.min(row + 1, row1 - 1), 0, 0]),
                    T.address_of(q_shared[(i + 1) % 2, 0, 0]),
                )
                length = 0
                if seq < batch:
                    length = lengths[row]
                if length <= 0:
                    T.call_extern(
                        "handle",
                        "misa::route_nothing",
                        routed,
                        T.address_of(heads[row, 0]),
                        T.address_of(shared_q[row, 0]),
                        T.address_of(shared_scale[row]),
                    )
                else:
                    shift = T.call_extern("int32", "misa::sample_stride_shift", length)
                    if shift != copied:
                        copied = shift
                        samples = -1
                        T.call_extern(
                            "handle",
                            "misa::copy_samples",
                            keys.data,
                            scales.data,
                            T.address_of(page_table[seq, 0]),
                            shift,
                            T.shift_right(lengths[row1 - 1], shift) - 1,
                            T.address_of(k_shared[0, 0]),
                            T.address_of(s_shared[0]),
                        )
                    if T.shift_right(length, shift) != samples:
                        samples = T.shift_right(length, shift)
                        T.sync_threads()
                        T.call_extern(
                            "handle",
                            "misa::scale_samples",
                            T.address_of(s_shared[0]),
                            samples,
                            T.address_of(scaled[0]),
                        )
                    T.call_extern("handle", "misa::wait_gathered<1>")
                    T.sync_threads()
                    T.gemm(
                        q_shared[i % 2, :, :],
                        k_shared,
                        acc,
                        transpose_B=True,
                        clear_accum=True,
                    )
                    T.call_extern(
                        "handle",
                        f"misa::fit_lines<{num_heads}>",
                        acc.data,
                        T.address_of(scaled[0]),
                        samples,
                        T.address_of(weights[row, 0]),
                        T.address_of(slopes[0]),
                        T.address_of(ranked[0]),
                    )
                    T.sync_threads()
                    T.call_extern(
                        "handle",
                        f"misa::pick_heads<{num_heads}>",
                        T.address_of(ranked[0]),
                        routed,
                        T.address_of(votes[0]),
                        T.address_of(heads[row, 0]),
                    )
                    T.call_extern(
                        "handle",
                        f"misa::share_lines<{num_heads}>",
                        T.address_of(q_shared[i % 2, 0, 0]),
                        T.address_of(weights[row, 0]),
                        T.address_of(slopes[0]),
                        T.address_of(votes[0]),
                        T.address_of(factors[0]),
                        T.address_of(sums[0]),
                        T.address_of(largest[0]),
                        T.address_of(shared_q[row, 0]),
                        T.address_of(shared_scale[row]),
                    )
                # The buffers are free for the next row.
                T.sync_threads()

    return route_sampled
