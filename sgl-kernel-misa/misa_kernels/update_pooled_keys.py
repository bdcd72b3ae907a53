"""Means of the pages that the tokens just stored have completed."""

import tilelang.language as T

from misa_kernels.constants import HEAD_DIM, PAGE_BYTES, PAGE_SIZE
from misa_kernels.dimensions import dimensions
from misa_kernels.paged_cache import PAGE_WORDS


def get_update_pooled_keys_kernel(slot_type: str):
    """Thread d of a CTA sums dimension d of a page, in float64 and in the order of the tokens."""
    tokens, pages = dimensions("tokens pages")

    @T.prim_func
    def update_pooled_keys(
        keys: T.StridedTensor(
            (pages, PAGE_SIZE, HEAD_DIM), (PAGE_BYTES, HEAD_DIM, 1), T.float8_e4m3fn
        ),
        scales: T.StridedTensor((pages, PAGE_SIZE), (PAGE_WORDS, 1), T.float32),
        slots: T.Tensor((tokens,), slot_type),
        pooled_keys: T.Tensor((pages, HEAD_DIM), T.bfloat16),
    ):
        # One slot a CTA: pages that one step completes do not wait for each other.
        with T.Kernel(tokens, threads=HEAD_DIM) as token:
            total = T.alloc_var(T.float64)
            page = T.alloc_var(T.int32)
            d = T.get_thread_binding()
            if slots[token] % PAGE_SIZE == PAGE_SIZE - 1:
                page = T.cast(slots[token] // PAGE_SIZE, T.int32)
                total = T.float64(0)
                for t in T.unroll(PAGE_SIZE):
                    total += T.cast(
                        T.cast(keys[page, t, d], T.float32), T.float64
                    ) * T.cast(scales[page, t], T.float64)
                pooled_keys[page, d] = T.cast(
                    T.cast(total / T.float64(PAGE_SIZE), T.float32), T.bfloat16
                )

    return update_pooled_keys
