"""Exact top-k of a row from its scores and their histogram.

The histogram of the scores' first digits says in which digit the k-th score lies. Several blocks a row split its scores:
what lies above that digit is selected, what has it goes to a list; the last block to finish selects from the list by radix
and writes the positions. A list that overflows is no loss but time: the scores are still there.
"""

import tilelang.language as T

THREADS = 256
CAPACITY = 4096  # candidates that the list holds; entries of `lists`


def get_decode_select_kernel():
    """`splits` blocks a row. bins: the histogram, then the candidates and the blocks counted, all zero but the histogram."""
    rows, batch, max_pages, stride, width, words, entries, topk = (
        T.dynamic(name)
        for name in (
            "rows",
            "batch",
            "max_pages",
            "table_stride",
            "width",
            "words",
            "entries",
            "topk",
        )
    )

    @T.prim_func
    def decode_select(
        scores: T.Tensor((rows, width), T.float32),
        bins: T.Tensor((rows, entries), T.int32),
        lists: T.Tensor((rows, CAPACITY, 2), T.uint32),
        planes: T.Tensor((rows, words), T.uint32),
        page_table: T.StridedTensor((batch, max_pages), (stride, 1), T.int32),
        lengths: T.Tensor((rows,), T.int32),
        offsets: T.Tensor((rows,), T.int32),
        out: T.Tensor((rows, topk), T.int32),
        rows_per_seq: T.int32,
        splits: T.int32,
        form: T.int32,
    ):
        with T.Kernel(splits, rows, threads=THREADS) as (split, row):
            T.import_source('#include "decode.cuh"\n')
            counts = T.alloc_shared((2048,), T.int32)
            keys = T.alloc_shared((CAPACITY,), T.uint32)
            positions = T.alloc_shared((CAPACITY,), T.int32)
            scratch = T.alloc_shared((64,), T.int32)
            state = T.alloc_shared((8,), T.int32)
            found = T.alloc_shared((4,), T.int32)
            length = T.alloc_var(T.int32)
            offset = T.alloc_var(T.int32)
            share = T.alloc_var(T.int32)
            last = T.alloc_var(T.int32)
            tx = T.get_thread_binding()
            seq = T.truncdiv(row, rows_per_seq)
            length = lengths[row]
            offset = 0
            if form == 2:
                offset = offsets[row]
            if length <= topk:
                if split == 0:
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
            else:
                for i in T.serial(2048 // THREADS):
                    counts[i * THREADS + tx] = bins[row, i * THREADS + tx]
                if tx == 0:
                    found[3] = 0
                T.sync_threads()
                T.call_extern(
                    "handle",
                    f"misa::find_bin<{THREADS}>",
                    T.address_of(counts[0]),
                    topk,
                    T.address_of(scratch[0]),
                    T.address_of(found[0]),
                )
                share = T.truncdiv((length + 31) // 32 + splits - 1, splits)
                T.call_extern(
                    "handle",
                    f"misa::partition<{THREADS}>",
                    T.address_of(scores[row, 0]),
                    length,
                    split * share,
                    T.min(split * share + share, (length + 31) // 32),
                    found[0],
                    T.address_of(planes[row, 0]),
                    T.address_of(keys[0]),
                    T.address_of(positions[0]),
                    CAPACITY,
                    T.address_of(found[3]),
                )
                T.sync_threads()
                last = T.call_extern(
                    "int32",
                    f"misa::append_candidates<{THREADS}>",
                    T.address_of(keys[0]),
                    T.address_of(positions[0]),
                    found[3],
                    CAPACITY,
                    CAPACITY,
                    T.address_of(bins[row, 2048]),
                    splits,
                    T.call_extern(
                        "handle", "misa::pairs", T.address_of(lists[row, 0, 0])
                    ),
                    T.address_of(scratch[0]),
                )
                if last != 0:
                    T.call_extern(
                        "handle",
                        "misa::radix_begin_in_bin",
                        T.address_of(state[0]),
                        found[0],
                        topk - found[1],
                        found[2],
                    )
                    T.call_extern(
                        "handle",
                        f"misa::select_in_bin<{THREADS}>",
                        T.call_extern(
                            "handle", "misa::pairs", T.address_of(lists[row, 0, 0])
                        ),
                        found[2],
                        CAPACITY,
                        T.address_of(scores[row, 0]),
                        length,
                        T.address_of(keys[0]),
                        T.address_of(positions[0]),
                        T.address_of(counts[0]),
                        T.address_of(state[0]),
                        T.address_of(scratch[0]),
                        T.address_of(planes[row, 0]),
                    )
                    T.call_extern(
                        "handle",
                        f"misa::emit_plane<{THREADS}>",
                        T.address_of(planes[row, 0]),
                        (length + 31) // 32,
                        form,
                        T.address_of(page_table[seq, 0]),
                        offset,
                        T.address_of(scratch[0]),
                        T.address_of(out[row, 0]),
                    )

    return decode_select
