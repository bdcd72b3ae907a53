"""Scores of up to eight rows a sequence against all its keys.

The keys are read once for all rows of a sequence. The pages of all sequences lie end to end, and the CTAs of the grid, which
is resident as a whole, share them: see `PageScheduler` in decode_score.cuh.
"""

import tilelang.language as T

from misa_kernels.accumulator import row_of
from misa_kernels.constants import HEAD_DIM, PAGE_BYTES, PAGE_SIZE, SCORE_CTAS_PER_SM
from misa_kernels.dimensions import dimensions
from misa_kernels.headers import include
from misa_kernels.paged_cache import PAGE_WORDS

STAGES = 8  # pages on the chip
SCHEDULER_INTS = 11  # of a page scheduler
SEQUENCE, PAGE, LEFT, SEGMENT = range(4)  # places of those that are read here
# Places of the numbers in a note about a page: how many segments came before, the page, -1 if there is none, and the pages of its
# segment after it. The note about a segment holds its sequence, -1 if there is none.
SEGMENTS_BEFORE, NOTED_PAGE, PAGES_LEFT = range(3)
NOTED_SEQUENCE = 0


def get_decode_score_kernel(heads: int, most_rows: int):
    """Four warps score four rows; one streams pages, and one gets the queries of the sequences that they belong to.

    Eight rows are scored by eight warps: both groups of four multiply the page that lies in shared memory, each with its rows'
    queries, so what a thread holds does not grow with the rows.

    After `decode_route` (`routed` is 1) the keys begin to stream before the heads are known: only the heads, and that `dealt`
    is 0, are that kernel's doing, and only what follows from them waits for it.

    Args:
        heads: that a row is scored with, 8, 16, 32 or 64.
        most_rows: that a sequence may have, 4 or 8.
    """
    columns = most_rows * heads
    scorers = tuple(range(most_rows // 4))  # warpgroups that score
    scoring = len(scorers) * 128  # their threads; one warpgroup follows
    # Sequences whose queries are there, or under way: the short segments of a CTA may each be of another one.
    depth = max({8: 4, 16: 4, 32: 2, 64: 1}[heads] // len(scorers), 1)
    rows, num_heads, pages, batch, max_pages, active_heads, stride, width = dimensions(
        "rows num_heads pages batch max_pages active_heads table_stride width"
    )

    # Three warpgroups take as many registers as an SM has: each must do with fewer where two CTAs are to fit, and where slots are many
    # the one that scores nothing leaves some to the others.
    two_ctas = len(scorers) > 1 and SCORE_CTAS_PER_SM[heads] > 1
    lends_registers = len(scorers) > 1 and heads > 32

    def row_of_sequence(thread):
        """Lanes 4i .. 4i + 3 share a token, each with the score of a row of its own."""
        return thread % 4 + (thread // 128 * 4 if len(scorers) > 1 else 0)

    if depth > 1:

        @T.macro
        def multiply(k_shared, stage, q_shared, slot, acc):
            T.gemm(
                k_shared[stage, :, :],
                q_shared[slot, :, :],
                acc,
                transpose_B=True,
                clear_accum=True,
                policy=T.GemmWarpPolicy.FullCol,
            )

    else:  # TileLang cannot take as large a part as this of a buffer

        @T.macro
        def multiply(k_shared, stage, q_shared, slot, acc):
            T.gemm(
                k_shared[stage, :, :],
                q_shared,
                acc,
                transpose_B=True,
                clear_accum=True,
                policy=T.GemmWarpPolicy.FullCol,
            )

    @T.prim_func
    def decode_score(
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
        lengths: T.Tensor((rows,), T.int32),
        scores: T.Tensor((rows, width), T.float32),
        dealt: T.Tensor((1,), T.int32),
        rows_per_seq: T.int32,
        blocks: T.int32,
        routed: T.int32,
        topk: T.int32,
        init_tokens: T.int32,
        local_tokens: T.int32,
        shared: T.int32,
    ):
        with T.Kernel(blocks, threads=scoring + 128) as cta:
            T.import_source(
                include(
                    "score.cuh",
                    "decode_score.cuh",
                    kSchedulerInts=SCHEDULER_INTS,
                    kSequence=SEQUENCE,
                    kSequencePage=PAGE,
                    kLeft=LEFT,
                    kSegment=SEGMENT,
                )
            )
            if two_ctas:
                T.annotate_min_blocks_per_sm(2)
            q_shared = T.alloc_shared(
                (depth, columns, HEAD_DIM) if depth > 1 else (columns, HEAD_DIM),
                T.float8_e4m3fn,
            )
            gates = T.alloc_shared((depth, columns), T.float32)
            seen = T.alloc_shared((depth, most_rows), T.int32)
            segments = T.alloc_shared((depth, 4), T.int32)
            k_shared = T.alloc_shared((STAGES, PAGE_SIZE, HEAD_DIM), T.float8_e4m3fn)
            s_shared = T.alloc_shared((STAGES, PAGE_SIZE), T.float32)
            notes = T.alloc_shared((STAGES, 4), T.int32)
            # A stage of the ring of pages: full, its page and note are there; empty, the warps that score have read them.
            full = T.alloc_barrier([32] * STAGES)
            empty = T.alloc_barrier([scoring // 32] * STAGES)
            # A place of the ring of segments: announced, its note is there; ready, so are its queries, gates and lengths; free, all
            # that score have read them.
            announced = T.alloc_barrier([32] * depth)
            ready = T.alloc_barrier([32] * depth)
            free = T.alloc_barrier([scoring] * depth)
            acc = T.alloc_fragment((PAGE_SIZE, columns), T.float32)
            gate = T.alloc_local((heads,), T.float32)
            scale = T.alloc_local((2,), T.float32)
            score = T.alloc_local((2,), T.float32)
            scheduler = T.alloc_local((SCHEDULER_INTS,), T.int32)
            note = T.alloc_local((3,), T.int32)
            sequence = T.alloc_local((3,), T.int32)
            now = T.alloc_var(T.int32)
            page = T.alloc_var(T.int32)
            row = T.alloc_var(T.int32)
            length = T.alloc_var(T.int32)
            most = T.alloc_var(T.int32)
            tx = T.get_thread_binding()
            lane = tx % 32
            token = row_of(tx % 128)
            mine = row_of_sequence(tx)

            if routed == 0:
                T.pdl_sync()
            # The next kernel does little before it waits for this one, but it takes a while to start.
            T.pdl_trigger()
            most = batch * max_pages + 1
            with T.ws(len(scorers)):
                if lends_registers:
                    T.set_max_nreg(40, 0)
                # One warp streams. Every key is read once: the cache is better used for what is read again.
                T.call_extern(
                    "handle",
                    "misa::scheduler_begin",
                    scheduler.data,
                    lengths.data,
                    batch,
                    rows_per_seq,
                    topk,
                    cta,
                    blocks,
                )
                now = 0
                for i in T.serial(T.if_then_else(tx < scoring + 32, most, 0)):
                    page = T.call_extern(
                        "int32",
                        "misa::next_page",
                        scheduler.data,
                        lengths.data,
                        batch,
                        rows_per_seq,
                        topk,
                        page_table.data,
                        stride,
                        T.address_of(dealt[0]),
                    )
                    if page < 0 or scheduler[LEFT] == scheduler[SEGMENT] - 1:
                        T.mbarrier_wait_parity(
                            free[now % depth], ((now // depth) % 2) ^ 1
                        )
                        T.call_extern(
                            "handle",
                            "misa::write_note",
                            T.address_of(segments[now % depth, 0]),
                            T.if_then_else(page < 0, -1, scheduler[SEQUENCE]),
                            0,
                            0,
                        )
                        T.mbarrier_arrive(announced[now % depth])
                        now += 1
                    T.mbarrier_wait_parity(empty[i % STAGES], ((i // STAGES) % 2) ^ 1)
                    T.call_extern(
                        "handle",
                        "misa::write_note",
                        T.address_of(notes[i % STAGES, 0]),
                        now - 1,
                        T.if_then_else(page < 0, -1, scheduler[PAGE]),
                        scheduler[LEFT],
                    )
                    if page < 0:
                        T.mbarrier_arrive(full[i % STAGES])
                        T.loop_break()
                    T.tma_copy(
                        keys[page, 0:PAGE_SIZE, 0:HEAD_DIM],
                        k_shared[i % STAGES, :, :],
                        barrier=full[i % STAGES],
                        leader_scope_threads=32,
                        eviction_policy="evict_first",
                    )
                    T.tma_copy(
                        scales[page, 0:PAGE_SIZE],
                        s_shared[i % STAGES, :],
                        barrier=full[i % STAGES],
                        leader_scope_threads=32,
                        eviction_policy="evict_first",
                    )
                    T.mbarrier_arrive(full[i % STAGES])

                # One gets what else it takes to score a sequence. It waits as well if there is none: whoever waits for this kernel
                # relies on all before it.
                if tx >= scoring + 32 and tx < scoring + 64:
                    T.pdl_sync()
                for i in T.serial(
                    T.if_then_else(tx >= scoring + 32 and tx < scoring + 64, most, 0)
                ):
                    T.mbarrier_wait_parity(announced[i % depth], (i // depth) % 2)
                    T.call_extern(
                        "handle",
                        "misa::read_note",
                        T.address_of(segments[i % depth, 0]),
                        sequence.data,
                    )
                    if sequence[NOTED_SEQUENCE] < 0:
                        T.loop_break()
                    T.call_extern(
                        "handle",
                        f"misa::load_sequence<{heads}, {most_rows}>",
                        q.data,
                        weights.data,
                        active.data,
                        shared_q.data,
                        shared_scale.data,
                        lengths.data,
                        sequence[NOTED_SEQUENCE],
                        rows_per_seq,
                        num_heads,
                        active_heads,
                        shared,
                        q_shared.data,
                        i % depth,
                        T.address_of(gates[i % depth, 0]),
                        T.address_of(seen[i % depth, 0]),
                    )
                    T.mbarrier_arrive(ready[i % depth])
            with T.ws(*scorers):
                if lends_registers:
                    T.set_max_nreg(232, 1)
                now = -1
                row = 0
                length = 0
                for i in T.serial(most):
                    T.mbarrier_wait_parity(full[i % STAGES], (i // STAGES) % 2)
                    T.call_extern(
                        "handle",
                        "misa::read_note",
                        T.address_of(notes[i % STAGES, 0]),
                        note.data,
                    )
                    if note[NOTED_PAGE] < 0:
                        T.loop_break()
                    if note[SEGMENTS_BEFORE] != now:
                        now = note[SEGMENTS_BEFORE]
                        T.mbarrier_wait_parity(ready[now % depth], (now // depth) % 2)
                        T.call_extern(
                            "handle",
                            "misa::read_note",
                            T.address_of(segments[now % depth, 0]),
                            sequence.data,
                        )
                        # Lanes without a row of their own score something and store nothing.
                        row = sequence[NOTED_SEQUENCE] * rows_per_seq + T.min(
                            mine, rows_per_seq - 1
                        )
                        length = T.call_extern(
                            "int32",
                            "misa::load_length",
                            T.address_of(seen[now % depth, mine]),
                        )
                        if mine >= rows_per_seq:
                            length = 0
                        T.call_extern(
                            "handle",
                            f"misa::load_gates<{heads}>",
                            T.address_of(gates[now % depth, mine * heads]),
                            gate.data,
                        )
                    multiply(k_shared, i % STAGES, q_shared, now % depth, acc)
                    for rr in T.unroll(2):
                        scale[rr] = T.call_extern(
                            "float32",
                            "misa::load_scale",
                            T.address_of(s_shared[i % STAGES, token + rr * 8]),
                        )
                    T.sync_warp()
                    if lane == 0:
                        T.mbarrier_arrive(empty[i % STAGES])
                    if note[PAGES_LEFT] == 0:
                        T.mbarrier_arrive(free[now % depth])
                    T.call_extern(
                        "handle",
                        f"misa::sum_heads<{heads}, 1>",
                        acc.data,
                        gate.data,
                        scale.data,
                        T.cast(1 - shared, T.float32),
                        score.data,
                    )
                    T.call_extern(
                        "handle",
                        "misa::store_scores",
                        score.data,
                        note[NOTED_PAGE] * PAGE_SIZE + token,
                        length,
                        init_tokens,
                        local_tokens,
                        T.address_of(scores[row, 0]),
                    )

    return decode_score
