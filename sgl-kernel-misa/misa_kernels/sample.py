"""Copies one key of every 1 << sample_shift out of the paged cache, as pages of 64 of their own.

These are what the thresholds are estimated on.
"""

import tilelang.language as T

from misa_kernels.constants import HEAD_DIM, PAGE_KEY_BYTES, PAGE_SIZE
from misa_kernels.dimensions import dimensions
from misa_kernels.headers import include
from misa_kernels.paged_cache import PAGE_WORDS

KEY_WORDS = HEAD_DIM // 4
SCALES = PAGE_KEY_BYTES // 4  # the word of a page's first scale


def get_sample_kernel():
    """128 threads copy one page of samples, two threads a key."""
    pages, batch, max_pages, stride, sample_pages, rows = dimensions(
        "pages batch max_pages table_stride sample_pages rows"
    )

    @T.prim_func
    def sample(
        index_k: T.Tensor((pages, PAGE_WORDS), T.int32),
        page_table: T.StridedTensor((batch, max_pages), (stride, 1), T.int32),
        cu_rows: T.Tensor((batch + 1,), T.int32),
        lengths: T.Tensor((rows,), T.int32),
        out: T.Tensor((batch, sample_pages, PAGE_WORDS), T.int32),
        sample_shift: T.int32,
    ):
        with T.Kernel(sample_pages, batch, threads=2 * PAGE_SIZE) as (page, seq):
            T.import_source(include())
            T.pdl_trigger()
            length = T.alloc_var(T.int32)
            position = T.alloc_var(T.int32)
            source = T.alloc_var(T.int32)
            tx = T.get_thread_binding()
            key = tx // 2
            length = 0
            if cu_rows[seq] < cu_rows[seq + 1]:
                length = lengths[cu_rows[seq + 1] - 1]
            if page * T.shift_left(PAGE_SIZE, sample_shift) < length:
                position = T.call_extern(
                    "int32",
                    "misa::sample_position",
                    page * PAGE_SIZE + key,
                    sample_shift,
                )
                # A sample past the end is never looked at.
                position = T.min(position, length - 1)
                source = page_table[seq, position // PAGE_SIZE]
                for i in T.unroll(KEY_WORDS // 8):
                    for v in T.vectorized(4):
                        word = tx % 2 * (KEY_WORDS // 2) + i * 4 + v
                        out[seq, page, key * KEY_WORDS + word] = index_k[
                            source, position % PAGE_SIZE * KEY_WORDS + word
                        ]
                if tx % 2 == 0:
                    out[seq, page, SCALES + key] = index_k[
                        source, SCALES + position % PAGE_SIZE
                    ]

    return sample
