"""Means of the pages that the tokens just stored have completed."""

import tilelang.language as T
from kernels.dimensions import dimensions
from kernels.paged_cache import PAGE_BYTES, PAGE_WORDS


def get_update_pooled_keys_kernel(slot_type: str):
    """Thread d of a block sums dimension d of a page, in float64 and in the order of the tokens."""
    tokens, pages = dimensions("tokens pages")

    @T.prim_func
    def update_pooled_keys(
        keys: T.StridedTensor((pages, 64, 128), (PAGE_BYTES, 128, 1), T.float8_e4m3fn),
        scales: T.StridedTensor((pages, 64), (PAGE_WORDS, 1), T.float32),
        slots: T.Tensor((tokens,), slot_type),
        pooled_keys: T.Tensor((pages, 128), T.bfloat16),
    ):
        # One slot a block: pages that one step completes do not wait for each other.
        with T.Kernel(tokens, threads=128) as token:
            total = T.alloc_var(T.float64)
            page = T.alloc_var(T.int32)
            d = T.get_thread_binding()
            if slots[token] % 64 == 63:
                page = T.cast(slots[token] // 64, T.int32)
                total = T.float64(0)
                for t in T.unroll(64):
                    total += T.cast(
                        T.cast(keys[page, t, d], T.float32), T.float64
                    ) * T.cast(scales[page, t], T.float64)
                pooled_keys[page, d] = T.cast(
                    T.cast(total / T.float64(64), T.float32), T.bfloat16
                )

    return update_pooled_keys
