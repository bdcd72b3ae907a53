"""Scores every visible token of a sequence for a tile of its rows; what becomes of a score is the kernel's mode.

One CTA takes a tile of rows of one sequence and a range of its pages. A producer warp streams the pages from the paged
cache with TMA, one page (64 keys and their scales) a stage. Two consumer warpgroups each hold the
queries of half of the rows and multiply K on the M side with (query, head) pairs on the N side: see `score.cuh` for the
order of the columns.
"""

from types import SimpleNamespace

import tilelang.language as T
from tilelang.layout import make_full_bank_swizzled_layout

from misa_kernels.accumulator import row_of
from misa_kernels.constants import (
    HEAD_DIM,
    PAGE_BYTES,
    PAGE_SIZE,
    SPAN,
    rows_per_warpgroup,
)
from misa_kernels.dimensions import dimensions
from misa_kernels.headers import include
from misa_kernels.paged_cache import PAGE_WORDS

STAGES = 8
# Pages of a round of the pipeline, in which products are in flight; a divisor of STAGES and of a span's pages.
ROUND = 4
SPAN_PAGES = SPAN // PAGE_SIZE  # whose bits a lane collects in one word


def get_score_kernel(heads: int, mode: str):
    """Scoring for prefill.

    Args:
        heads: slots of a row, one of PREFILL_SLOTS; rows of `active` may be shorter.
        mode: "planes" writes two bits a token (`mark_page` in `score.cuh`: where its score lies among three thresholds);
            "samples" scores a sequence's sampled keys and writes the float32 scores.
    """
    group_rows = rows_per_warpgroup(heads)
    tile_rows = 2 * group_rows
    groups = group_rows // 4
    columns = group_rows * heads
    planes = mode == "planes"
    pipelined = heads < 64  # else two accumulators do not fit in the registers
    rows, num_heads, pages, batch, max_pages, active_heads, stride, width, slots = (
        dimensions(
            "rows num_heads pages batch max_pages active_heads table_stride width slots"
        )
    )

    @T.macro
    def begin(cta, acc, page):
        """Begins to multiply a page, once it is there."""
        T.mbarrier_wait_parity(cta.full[page % STAGES], (page // STAGES) % 2)
        T.call_extern(
            "handle",
            f"misa::begin_page<{columns}>",
            acc.data,
            cta.k_shared.data,
            page % STAGES,
            cta.q_shared.data,
            cta.group,
        )

    @T.macro
    def wait(acc, later):
        """Waits for the products in `acc`, which `later` others were begun after."""
        T.warpgroup_wait(later)
        T.warpgroup_fence_operand(acc.data, 0, columns // 2, "float32")

    @T.macro
    def finish(cta, acc, page):
        """Sums the heads of a page's products; then stores its scores, or adds its bits to the lane's words and these every 16th page."""
        tx = T.get_thread_binding()
        scale = T.alloc_local((2,), T.float32)
        for rr in T.unroll(2):
            scale[rr] = cta.s_shared[page % STAGES, row_of(tx % 128) + rr * 8]
        T.sync_warp()
        if tx % 32 == 0:
            T.mbarrier_arrive(cta.empty[page % STAGES])
        T.call_extern(
            "handle",
            f"misa::sum_heads<{heads}, {groups}>",
            acc.data,
            cta.gate.data,
            scale.data,
            cta.rectified,
            cta.scores.data,
        )
        token = (cta.p0 + page) * PAGE_SIZE + row_of(tx % 128)
        if planes:
            if (cta.p0 + page) * PAGE_SIZE < cta.init_tokens or (
                cta.p0 + page + 1
            ) * PAGE_SIZE > cta.shortest - cta.local_tokens:
                T.call_extern(
                    "handle",
                    f"misa::mask_page<{groups}>",
                    cta.scores.data,
                    cta.length.data,
                    token,
                    cta.init_tokens,
                    cta.local_tokens,
                )
            T.call_extern(
                "handle",
                f"misa::mark_page<{groups}>",
                cta.scores.data,
                cta.high.data,
                cta.middle.data,
                cta.below.data,
                cta.words.data,
            )
            if page % SPAN_PAGES == SPAN_PAGES - 1 or page == cta.padded_pages - 1:
                word = (
                    (cta.p0 + page) // SPAN_PAGES * 32
                    + tx % 128 // 32 * 8
                    + tx % 32 // 4
                )
                for g in T.unroll(groups):
                    for plane in T.unroll(2):
                        cta.out[cta.slot + g * 4, plane, word] = T.call_extern(
                            "uint32",
                            "misa::word_of_pages",
                            cta.words[plane * groups + g],
                            page % SPAN_PAGES + 1,
                        )
        elif page < cta.num_pages:
            for g in T.unroll(groups):
                for rr in T.unroll(2):
                    cta.out[cta.slot + g * 4, 0, token + rr * 8] = T.reinterpret(
                        cta.scores[g * 2 + rr], T.uint32
                    )

    @T.macro
    def overlap(cta, acc, other, page):
        """Finishes a page, whose products are in `acc`, while the next one is multiplied."""
        begin(cta, other, page + 1)
        wait(acc, 1)
        finish(cta, acc, page)

    @T.prim_func
    def score(
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
        out: T.Tensor((slots, 2 if planes else 1, width), T.uint32),
        first_tile: T.int32,
        tiles: T.int32,
        splits: T.int32,
        split_pages: T.int32,
        sample_shift: T.int32,
        topk: T.int32,
        init_tokens: T.int32,
        local_tokens: T.int32,
        shared: T.int32,
    ):
        with T.Kernel(tiles, splits, threads=384) as (bx, by):
            T.import_source(include("queries.cuh", "score.cuh", "wgmma.cuh"))
            # The next kernel may start, and wait like this one: its launch takes as long as the last blocks here.
            T.pdl_trigger()
            T.pdl_sync()
            q_shared = T.alloc_shared((2 * columns, HEAD_DIM), T.float8_e4m3fn)
            k_shared = T.alloc_shared((STAGES, PAGE_SIZE, HEAD_DIM), T.float8_e4m3fn)
            s_shared = T.alloc_shared((STAGES, PAGE_SIZE), T.float32)
            full = T.alloc_barrier([32] * STAGES)
            empty = T.alloc_barrier([8] * STAGES)
            # What a wgmma reads: rows of 128 bytes, swizzled by 128 bytes and so aligned to 1024.
            T.annotate_layout(
                {
                    k_shared: make_full_bank_swizzled_layout(k_shared),
                    q_shared: make_full_bank_swizzled_layout(q_shared),
                }
            )
            acc = T.alloc_local((columns // 2,), T.float32)
            next_acc = T.alloc_local((columns // 2,), T.float32)
            gate = T.alloc_local((groups * heads,), T.float32)
            scores = T.alloc_local((groups * 2,), T.float32)
            length = T.alloc_local((groups,), T.int32)
            high = T.alloc_local((groups,), T.float32)
            middle = T.alloc_local((groups,), T.float32)
            below = T.alloc_local((groups,), T.float32)
            words = T.alloc_local((2 * groups,), T.uint32)
            shortest = T.alloc_var(T.int32)
            row0 = T.alloc_var(T.int32)
            row1 = T.alloc_var(T.int32)
            p0 = T.alloc_var(T.int32)
            num_pages = T.alloc_var(T.int32)
            padded_pages = T.alloc_var(T.int32)
            group = T.alloc_var(T.int32)
            tx = T.get_thread_binding()

            tile = first_tile + bx
            seq = T.call_extern(
                "int32", "misa::sequence_of_tile", cu_rows.data, batch, tile, tile_rows
            )
            row0 = T.call_extern(
                "int32", "misa::first_row_of_tile", cu_rows.data, seq, tile, tile_rows
            )
            if seq < batch and row0 < cu_rows[T.min(seq + 1, batch)]:
                row1 = T.min(cu_rows[seq + 1], row0 + tile_rows)
                # Pages of keys, or of samples.
                num_pages = (lengths[row1 - 1] + PAGE_SIZE - 1) // PAGE_SIZE
                if not planes:
                    num_pages = T.shift_right(
                        num_pages + T.shift_left(1, sample_shift) - 1, sample_shift
                    )
                p0 = by * split_pages
                num_pages = T.min(num_pages - p0, split_pages)
                # The last page may come again, to make whole rounds.
                padded_pages = (
                    T.ceildiv(num_pages, ROUND) * ROUND if pipelined else num_pages
                )
                if num_pages > 0 and lengths[row1 - 1] > topk:
                    with T.ws(2):
                        T.set_max_nreg(24, 0)
                        # One warp streams; the others of its warpgroup have nothing to do.
                        for i in T.serial(T.if_then_else(tx < 288, padded_pages, 0)):
                            source = p0 + T.min(i, num_pages - 1)
                            page = T.if_then_else(
                                planes,
                                page_table[seq, source],
                                seq * max_pages + source,
                            )
                            T.mbarrier_wait_parity(
                                empty[i % STAGES], ((i // STAGES) % 2) ^ 1
                            )
                            T.tma_copy(
                                keys[page, 0:PAGE_SIZE, 0:HEAD_DIM],
                                k_shared[i % STAGES, :, :],
                                barrier=full[i % STAGES],
                                leader_scope_threads=32,
                            )
                            T.tma_copy(
                                scales[page, 0:PAGE_SIZE],
                                s_shared[i % STAGES, :],
                                barrier=full[i % STAGES],
                                leader_scope_threads=32,
                            )
                            T.mbarrier_arrive(full[i % STAGES])
                    with T.ws(0, 1):
                        T.set_max_nreg(240, 1)
                        # Queries, 16 bytes a thread; the first pages are on their way meanwhile.
                        T.call_extern(
                            "handle",
                            f"misa::copy_queries<{heads}, {2 * columns}, 256>",
                            q.data,
                            active.data,
                            shared_q.data,
                            num_heads,
                            active_heads,
                            shared,
                            row0,
                            row1,
                            q_shared.data,
                        )
                        T.call_extern("handle", "misa::sync_some<256>")
                        group = T.call_extern("int32", "misa::warpgroup")
                        slot = bx * tile_rows + group * group_rows + tx % 4
                        rectified = T.cast(1 - shared, T.float32)
                        shortest = 2147483647
                        for g in T.unroll(groups):
                            row = row0 + group * group_rows + g * 4 + tx % 4
                            length[g] = T.if_then_else(
                                row < row1, lengths[T.min(row, row1 - 1)], 0
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
                                T.min(row, row1 - 1),
                                T.address_of(gate[g * heads]),
                            )
                            if planes:
                                high[g] = T.call_extern(
                                    "float32",
                                    "misa::as_threshold",
                                    thresholds[slot + g * 4, 0],
                                )
                                middle[g] = T.call_extern(
                                    "float32",
                                    "misa::as_threshold",
                                    thresholds[slot + g * 4, 1],
                                )
                                below[g] = T.call_extern(
                                    "float32",
                                    "misa::below_threshold",
                                    thresholds[slot + g * 4, 2],
                                )
                            shortest = T.min(shortest, length[g])
                            for plane in T.unroll(2):
                                words[plane * groups + g] = T.uint32(0)
                        cta = SimpleNamespace(
                            k_shared=k_shared,
                            s_shared=s_shared,
                            q_shared=q_shared,
                            full=full,
                            empty=empty,
                            group=group,
                            gate=gate,
                            rectified=rectified,
                            scores=scores,
                            length=length,
                            shortest=shortest,
                            high=high,
                            middle=middle,
                            below=below,
                            words=words,
                            slot=slot,
                            p0=p0,
                            num_pages=num_pages,
                            padded_pages=padded_pages,
                            init_tokens=init_tokens,
                            local_tokens=local_tokens,
                            out=out,
                        )
                        if pipelined:
                            # The tensor cores multiply the next page while the scores of one are summed. No product is left
                            # in flight around the loop: the compiler would wait for each.
                            for i in T.serial(padded_pages // ROUND):
                                begin(cta, acc, i * ROUND)
                                overlap(cta, acc, next_acc, i * ROUND)
                                overlap(cta, next_acc, acc, i * ROUND + 1)
                                overlap(cta, acc, next_acc, i * ROUND + 2)
                                wait(next_acc, 0)
                                finish(cta, next_acc, i * ROUND + 3)
                        else:
                            for page in T.serial(num_pages):
                                begin(cta, acc, page)
                                wait(acc, 0)
                                finish(cta, acc, page)

    return score
