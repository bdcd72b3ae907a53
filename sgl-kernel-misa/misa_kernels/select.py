"""Exact top-k of a row from the two bits a token that `score` left.

Two neighbouring thresholds of the three bracket the k-th score: what lies above both is selected, what lies between them,
the candidates, is scored again with the same instructions, hence to the same bits, and selected by radix:

    list and score the candidates                      # some hundred, or any number where the thresholds misjudged
    until the k-th score is known:                     # at most DIGITS times
        count the candidates by their next digit
    select the candidates above it, and of those that equal it the first

Where the candidates are more than fit in shared memory, every line takes them in parts, and each time scores them again.
"""

from types import SimpleNamespace

import tilelang.language as T

from misa_kernels.constants import (
    FORMS,
    HEAD_DIM,
    PAGE_BYTES,
    PAGE_SIZE,
    SPAN,
    rows_per_tile,
)
from misa_kernels.dimensions import dimensions
from misa_kernels.gather import TILE, get_score_listed
from misa_kernels.headers import BINS, SCRATCH, include
from misa_kernels.paged_cache import PAGE_WORDS

THREADS = 256
STAGES = 2
# The candidates' keys make room, in the end, for the positions that each warp writes: those of a span.
assert STAGES * TILE * HEAD_DIM >= THREADS // 32 * SPAN * 4
# Digits of a radix selection of scores, and ints of what is known of it and of the candidates.
DIGITS, RADIX_INTS, CANDIDATES_INTS = 3, 5, 4


def get_select_kernel(heads: int, capacity: int):
    """One CTA a row.

    Args:
        heads: as for `score`.
        capacity: candidates kept in shared memory, a multiple of SPAN.
    """
    # The row's heads lie in the columns of lanes 0, 4, 8, ...; the others are zero.
    columns = 4 * heads
    tile_rows = rows_per_tile(heads)
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

    @T.macro
    def sum_heads(row):
        T.call_extern(
            "handle",
            f"misa::sum_heads<{heads}, 1>",
            row.acc.data,
            row.gate.data,
            row.scale.data,
            row.rectified,
            row.score.data,
        )

    score_listed = get_score_listed(THREADS, STAGES, sum_heads)

    @T.macro
    def list_and_score(row, first, last):
        """The candidates in words `first` to `last` of the planes, to `row.places` and `row.scores`."""
        T.call_extern(
            "handle",
            f"misa::collect<{THREADS}>",
            row.above,
            row.within,
            row.words,
            first,
            last,
            T.address_of(row.places[0]),
            T.address_of(row.listed[0]),
        )
        T.sync_threads()
        row.count[0] = row.listed[0]
        T.call_extern(
            "handle",
            f"misa::find_slots<{THREADS}>",
            T.address_of(row.places[0]),
            row.count[0],
            row.pages,
            T.address_of(row.scores[0]),
        )
        T.sync_threads()
        score_listed(row, row.count[0])
        if T.get_thread_binding() == 0:
            row.listed[0] = 0  # for the next part
        if row.init_tokens + row.local_tokens > 0:
            T.call_extern(
                "handle",
                f"misa::force_places<{THREADS}>",
                T.address_of(row.places[0]),
                T.address_of(row.scores[0]),
                row.count[0],
                row.init_tokens,
                row.length - row.local_tokens,
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
                    kRadixInts=RADIX_INTS,
                    kCandidatesInts=CANDIDATES_INTS,
                )
            )
            # The next kernel may start, and wait like this one: its launch takes as long as the last blocks here.
            T.pdl_trigger()
            T.pdl_sync()
            places = T.alloc_shared((capacity,), T.uint32)
            # Slots of the cache, then scores.
            scores = T.alloc_shared((capacity,), T.uint32)
            bins = T.alloc_shared((BINS,), T.int32)
            q_shared = T.alloc_shared((columns, HEAD_DIM), T.float8_e4m3fn)
            k_shared = T.alloc_shared((STAGES, TILE, HEAD_DIM), T.float8_e4m3fn)
            s_shared = T.alloc_shared((STAGES, TILE), T.float32)
            scratch = T.alloc_shared((SCRATCH,), T.int32)
            candidates = T.alloc_shared((CANDIDATES_INTS,), T.int32)
            radix = T.alloc_shared((RADIX_INTS,), T.int32)
            listed = T.alloc_shared((1,), T.int32)  # entries of `places`
            selected = T.alloc_shared((THREADS // 32,), T.int32)  # in each warp's share
            acc = T.alloc_fragment((TILE, columns), T.float32)
            gate = T.alloc_local((heads,), T.float32)
            scale = T.alloc_local((2,), T.float32)
            score = T.alloc_local((2,), T.float32)
            row = T.alloc_var(T.int32)
            length = T.alloc_var(T.int32)
            offset = T.alloc_var(T.int32)
            words = T.alloc_var(T.int32)
            first = T.alloc_var(T.int32)
            last = T.alloc_var(T.int32)
            count = T.alloc_local((1,), T.int32)
            upper = T.alloc_var(T.int32)
            searches = T.alloc_var(T.int32)
            rounds = T.alloc_var(T.int32)
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
                # 1. What scores: queries and gates of the row's slots.
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
                # 2. Between which thresholds the k-th score lies, how many tokens do, and how many of them are selected.
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
                    T.address_of(candidates[0]),
                    T.address_of(selected[0]),
                )
                T.call_extern(
                    "handle",
                    "misa::radix_begin",
                    T.address_of(radix[0]),
                    T.address_of(candidates[0]),
                    T.address_of(thresholds[slot, 0]),
                )
                T.call_extern("handle", "misa::wait_gathered<0>")
                T.sync_threads()
                upper = T.call_extern(
                    "int32", "misa::upper_bracket", T.address_of(candidates[0])
                )
                all_fit = (
                    T.call_extern(
                        "int32", "misa::num_candidates", T.address_of(candidates[0])
                    )
                    <= capacity
                )
                this_row = SimpleNamespace(
                    keys=keys,
                    scales=scales,
                    pages=T.address_of(page_table[seq, 0]),
                    above=T.address_of(planes[slot, upper, 0]),
                    within=T.address_of(planes[slot, 1 - upper, 0]),
                    words=words,
                    places=places,
                    scores=scores,
                    listed=listed,
                    count=count,
                    q_shared=q_shared,
                    k_shared=k_shared,
                    s_shared=s_shared,
                    acc=acc,
                    registers=TILE * columns // THREADS,
                    gate=gate,
                    scale=scale,
                    score=score,
                    rectified=T.cast(1 - shared, T.float32),
                    length=length,
                    init_tokens=init_tokens,
                    local_tokens=local_tokens,
                )
                # 3. Digits of the k-th score, then the candidates' bits in the plane above.
                rounds = T.call_extern(
                    "int32",
                    "misa::radix_rounds",
                    T.address_of(candidates[0]),
                )
                searches = 1
                last = words
                for turn in T.serial(rounds):
                    if searches == 1:
                        searches = T.call_extern(
                            "int32", "misa::radix_searches", T.address_of(radix[0])
                        )
                        T.call_extern(
                            "handle",
                            f"misa::clear_bins<{THREADS}>",
                            T.address_of(bins[0]),
                        )
                        first = 0
                        while first < words:
                            # The bins are clear, and the part before was looked at.
                            T.sync_threads()
                            if not all_fit:
                                last = T.call_extern(
                                    "int32",
                                    f"misa::end_of_part<{THREADS}>",
                                    this_row.above,
                                    this_row.within,
                                    first,
                                    words,
                                    capacity,
                                    T.address_of(scratch[0]),
                                )
                            if turn == 0 or not all_fit:
                                list_and_score(this_row, first, last)
                            for i in T.serial(T.ceildiv(count[0], THREADS)):
                                if i * THREADS + tx < count[0]:
                                    if searches == 1:
                                        T.call_extern(
                                            "handle",
                                            "misa::radix_count",
                                            T.address_of(radix[0]),
                                            scores[i * THREADS + tx],
                                            T.address_of(bins[0]),
                                        )
                                    else:
                                        T.call_extern(
                                            "handle",
                                            "misa::radix_mark",
                                            T.address_of(radix[0]),
                                            scores[i * THREADS + tx],
                                            places[i * THREADS + tx],
                                            this_row.above,
                                            this_row.within,
                                            T.address_of(selected[0]),
                                        )
                            first = last
                        if searches == 1:
                            T.call_extern(
                                "handle",
                                f"misa::radix_advance<{THREADS}>",
                                T.address_of(radix[0]),
                                T.address_of(bins[0]),
                                T.address_of(scratch[0]),
                            )
                T.sync_threads()
                # 4. The bits become positions.
                T.call_extern(
                    "handle",
                    f"misa::emit<{THREADS}>",
                    this_row.above,
                    this_row.within,
                    words,
                    length,
                    upper == 1,
                    T.call_extern(
                        "int32",
                        "misa::ties_selected",
                        T.address_of(candidates[0]),
                        T.address_of(radix[0]),
                    ),
                    T.address_of(selected[0]),
                    form,
                    this_row.pages,
                    offset,
                    T.address_of(scratch[0]),
                    T.address_of(k_shared[0, 0, 0]),
                    T.address_of(out[row, 0]),
                )

    return select
