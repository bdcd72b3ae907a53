"""Exact top-k of a row from the two bits a token that `score` left.

Two neighbouring thresholds of the three bracket the k-th score: what lies above both is selected, what lies between them
(several hundred tokens, or any number where the thresholds misjudged) is scored again with the same instructions, hence to
the same bits, and selected by radix. Few enough candidates are kept in shared memory; more than that are streamed once a
digit.
"""

import tilelang.language as T

from kernels.constants import FORMS, HEAD_DIM, PAGE_BYTES, PAGE_SIZE, SPAN
from kernels.dimensions import dimensions
from kernels.headers import BINS, SCRATCH, include
from kernels.paged_cache import PAGE_WORDS, get_gather_keys

THREADS = 256
TILE = 128  # candidates scored at a time, 64 a warpgroup
DIGITS = 5  # of a radix selection
STATE_INTS = 8  # of its state
STAGES = 2  # tiles on the chip: one is scored while the next is gathered


def get_select_kernel(heads: int, capacity: int):
    """One CTA a row.

    Args:
        heads: as for `score`.
        capacity: candidates kept in shared memory, a multiple of SPAN.
    """
    # The row's heads lie in the columns of lanes 0, 4, 8, ...; the others are zero.
    columns = 4 * heads
    (
        rows,
        num_heads,
        pages,
        batch,
        max_pages,
        active_heads,
        stride,
        width,
        slots,
        topk,
    ) = dimensions(
        "rows num_heads pages batch max_pages active_heads table_stride width slots topk"
    )

    gather_keys = get_gather_keys(THREADS, TILE, STAGES)

    @T.macro
    def store_scores(acc, gate, s_shared, scores, rectified, tile):
        """Entries that only fill up the last tile get scores too; nobody looks at them."""
        tx = T.get_thread_binding()
        entry = tx // 32 * 16 + tx % 32 // 4
        scale = T.alloc_local((2,), T.float32)
        score = T.alloc_local((2,), T.float32)
        for rr in T.unroll(2):
            scale[rr] = s_shared[tile % STAGES, entry + rr * 8]
        T.call_extern(
            "handle",
            f"misa::sum_heads<{heads}, 1>",
            acc.data,
            gate.data,
            scale.data,
            rectified,
            score.data,
        )
        if tx % 4 == 0:
            for rr in T.unroll(2):
                scores[tile * TILE + entry + rr * 8] = T.call_extern(
                    "uint32", "misa::ordered", score[rr]
                )

    @T.prim_func
    def select(
        q: T.Tensor((rows, num_heads, HEAD_DIM), T.float8_e4m3fn),
        weights: T.Tensor((rows, num_heads), T.float32),
        active: T.Tensor((rows, active_heads), T.int32),
        shared_q: T.Tensor((rows, HEAD_DIM), T.float8_e4m3fn),
        shared_scale: T.Tensor((rows,), T.float32),
        keys: T.StridedTensor(
            (pages, PAGE_SIZE, HEAD_DIM), (PAGE_BYTES, HEAD_DIM, 1), T.float8_e4m3fn
        ),
        scales: T.StridedTensor((pages, PAGE_SIZE), (PAGE_WORDS, 1), T.float32),
        page_table: T.StridedTensor((batch, max_pages), (stride, 1), T.int32),
        cu_rows: T.Tensor((batch + 1,), T.int32),
        lengths: T.Tensor((rows,), T.int32),
        thresholds: T.Tensor((slots, 3), T.float32),
        planes: T.Tensor((slots, 2, width), T.uint32),
        offsets: T.Tensor((rows,), T.int32),
        out: T.Tensor((rows, topk), T.int32),
        first_tile: T.int32,
        tile_rows: T.int32,
        init_tokens: T.int32,
        local_tokens: T.int32,
        form: T.int32,
        shared: T.int32,
    ):
        with T.Kernel(slots, threads=THREADS) as slot:
            T.import_source(
                include(
                    "gather.cuh",
                    "queries.cuh",
                    "score.cuh",
                    "select.cuh",
                    kDigits=DIGITS,
                    kStateInts=STATE_INTS,
                )
            )
            # The next kernel may start, and wait like this one: its launch takes as long as the last blocks here.
            T.pdl_trigger()
            T.pdl_sync()
            positions = T.alloc_shared((capacity,), T.int32)
            # Slots of the cache, then scores.
            scores = T.alloc_shared((capacity,), T.uint32)
            bins = T.alloc_shared((BINS,), T.int32)
            q_shared = T.alloc_shared((columns, HEAD_DIM), T.float8_e4m3fn)
            k_shared = T.alloc_shared((STAGES, TILE, HEAD_DIM), T.float8_e4m3fn)
            s_shared = T.alloc_shared((STAGES, TILE), T.float32)
            scratch = T.alloc_shared((SCRATCH,), T.int32)
            state = T.alloc_shared((STATE_INTS,), T.int32)
            info = T.alloc_shared((4,), T.int32)  # as `classify` says
            listed = T.alloc_shared((1,), T.int32)  # entries of `positions`
            acc = T.alloc_fragment((TILE, columns), T.float32)
            gate = T.alloc_local((heads,), T.float32)
            row = T.alloc_var(T.int32)
            length = T.alloc_var(T.int32)
            offset = T.alloc_var(T.int32)
            words = T.alloc_var(T.int32)
            chunk = T.alloc_var(T.int32)
            parts = T.alloc_var(T.int32)
            rounds = T.alloc_var(T.int32)
            part = T.alloc_var(T.int32)
            digit = T.alloc_var(T.int32)
            count = T.alloc_var(T.int32)
            above = T.alloc_var(T.int32)
            tx = T.get_thread_binding()

            seq = T.call_extern(
                "int32",
                "misa::sequence_of_tile",
                cu_rows.data,
                batch,
                first_tile + T.truncdiv(slot, tile_rows),
                tile_rows,
            )
            row = T.call_extern(
                "int32",
                "misa::first_row_of_tile",
                cu_rows.data,
                seq,
                first_tile + T.truncdiv(slot, tile_rows),
                tile_rows,
            )
            row += T.truncmod(slot, tile_rows)
            length = -1
            offset = 0
            if seq < batch:
                if row < cu_rows[T.min(seq + 1, batch)]:
                    length = lengths[row]
                    if form == FORMS["ragged"]:
                        offset = offsets[row]
            elif row < rows:
                length = 0  # padding
            if length >= 0 and length <= topk:
                T.call_extern(
                    "handle",
                    f"misa::select_all<{THREADS}>",
                    length,
                    topk,
                    form,
                    T.address_of(page_table[T.min(seq, batch - 1), 0]),
                    offset,
                    T.address_of(out[row, 0]),
                )
            if length > topk:
                T.call_extern(
                    "handle",
                    f"misa::copy_queries_of_row<{heads}, {THREADS}>",
                    q.data,
                    active.data,
                    shared_q.data,
                    num_heads,
                    active_heads,
                    shared,
                    row,
                    q_shared.data,
                )
                T.call_extern(
                    "handle",
                    f"misa::load_gates_of<{heads}>",
                    weights.data,
                    active.data,
                    shared_scale.data,
                    num_heads,
                    active_heads,
                    shared,
                    row,
                    gate.data,
                )
                if tx == 0:
                    listed[0] = 0
                words = (length + SPAN - 1) // SPAN * 32
                T.call_extern(
                    "handle",
                    f"misa::classify<{THREADS}>",
                    T.address_of(planes[slot, 0, 0]),
                    T.address_of(planes[slot, 1, 0]),
                    words,
                    length,
                    topk,
                    T.address_of(thresholds[slot, 0]),
                    T.address_of(scratch[0]),
                    T.address_of(info[0]),
                )
                # The plane in which tokens are marked as selected.
                above = T.if_then_else(info[3] == 2, 1, 0)
                # Five digits count the candidates, the round after them selects. So many words of a plane can hold no
                # more candidates than fit.
                chunk = words
                if info[0] > capacity:
                    chunk = capacity // 32
                parts = T.truncdiv(words + chunk - 1, chunk)
                rounds = parts * (DIGITS + 1)
                if info[2] != 0 or info[1] == 0:
                    rounds = 0
                T.call_extern(
                    "handle",
                    "misa::radix_begin_between",
                    T.address_of(state[0]),
                    info[1],
                    info[3],
                    T.address_of(thresholds[slot, 0]),
                )
                T.sync_threads()
                count = 0
                for step in T.serial(rounds):
                    digit = T.truncdiv(step, parts)
                    part = step - digit * parts
                    # Once a digit has settled it, only the last round is left.
                    if digit == DIGITS or state[4] == 0:
                        if digit < DIGITS and part == 0:
                            T.call_extern(
                                "handle",
                                f"misa::clear_bins<{THREADS}>",
                                T.address_of(bins[0]),
                            )
                        T.sync_threads()
                        if digit == 0 or chunk < words:
                            T.call_extern(
                                "handle",
                                f"misa::collect<{THREADS}>",
                                T.address_of(planes[slot, above, 0]),
                                T.address_of(planes[slot, 1 - above, 0]),
                                part * chunk,
                                T.min(part * chunk + chunk, words),
                                T.address_of(page_table[seq, 0]),
                                T.address_of(positions[0]),
                                T.address_of(scores[0]),
                                T.address_of(listed[0]),
                            )
                            T.sync_threads()
                            count = listed[0]
                            T.call_extern(
                                "handle",
                                f"misa::fill_last_tile<{THREADS}, {TILE}>",
                                T.address_of(scores[0]),
                                count,
                            )
                            if tx == 0:
                                listed[0] = 0  # for the next part
                            gather_keys(
                                keys, scales, scores, 0, count, k_shared, s_shared
                            )
                            for b in T.serial(T.ceildiv(count, TILE)):
                                gather_keys(
                                    keys,
                                    scales,
                                    scores,
                                    b + 1,
                                    count,
                                    k_shared,
                                    s_shared,
                                )
                                T.call_extern(
                                    "handle", f"misa::wait_gathered<{STAGES - 1}>"
                                )
                                T.sync_threads()
                                T.gemm(
                                    k_shared[b % STAGES, :, :],
                                    q_shared,
                                    acc,
                                    transpose_B=True,
                                    clear_accum=True,
                                    policy=T.GemmWarpPolicy.FullRow,
                                )
                                store_scores(
                                    acc,
                                    gate,
                                    s_shared,
                                    scores,
                                    T.cast(1 - shared, T.float32),
                                    b,
                                )
                                T.sync_threads()
                            if init_tokens + local_tokens > 0:
                                T.call_extern(
                                    "handle",
                                    f"misa::force_listed<{THREADS}>",
                                    T.address_of(positions[0]),
                                    T.address_of(scores[0]),
                                    count,
                                    init_tokens,
                                    length - local_tokens,
                                )
                        for i in T.serial(T.ceildiv(count, THREADS)):
                            if i * THREADS + tx < count:
                                T.call_extern(
                                    "handle",
                                    "misa::radix_visit",
                                    T.address_of(state[0]),
                                    digit,
                                    scores[i * THREADS + tx],
                                    positions[i * THREADS + tx],
                                    T.address_of(bins[0]),
                                    T.address_of(planes[slot, above, 0]),
                                )
                        if digit < DIGITS and part == parts - 1:
                            T.call_extern(
                                "handle",
                                f"misa::radix_advance<{THREADS}>",
                                T.address_of(state[0]),
                                T.address_of(bins[0]),
                                T.address_of(scratch[0]),
                            )
                T.sync_threads()
                T.call_extern(
                    "handle",
                    f"misa::emit<{THREADS}>",
                    T.address_of(planes[slot, above, 0]),
                    T.address_of(planes[slot, 1 - above, 0]),
                    words,
                    above == 1,
                    T.if_then_else(info[2] == 0, 0, info[1]),
                    form,
                    T.address_of(page_table[seq, 0]),
                    offset,
                    T.address_of(scratch[0]),
                    T.address_of(out[row, 0]),
                )

    return select
