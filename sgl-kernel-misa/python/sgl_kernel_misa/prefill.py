"""Selection for extend batches: sample, threshold, score, select, and re-rank.

The fp32 scores of rows x context are never written. A strided sample of the keys gives three thresholds a row, two of which
bracket its k-th score; scoring leaves two bits a token; selection scores what lies between these two once more and is exact
whatever the thresholds were.
"""

import functools
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from sgl_kernel_misa import checks
from sgl_kernel_misa.constants import (
    FORMS,
    MANY_SAMPLES,
    PAGE_BYTES,
    PAGE_KEY_BYTES,
    PAGE_SIZE,
    PREFILL_SLOTS,
    SELECT_CAPACITIES,
    SPAN,
    THRESHOLD_THREADS,
    rows_per_tile,
)
from sgl_kernel_misa.device import num_sms
from sgl_kernel_misa.library import SHAPES, Chain, Step
from sgl_kernel_misa.registration import launching, operation
from sgl_kernel_misa.reranking import step as reranking_step
from sgl_kernel_misa.sampled_routing import checked_slots
from sgl_kernel_misa.sampled_routing import step as routing_step
from sgl_kernel_misa.tensors import (
    KEYS_AND_SCALES,
    no_offsets,
    slots,
)

# Rows are taken in chunks, so that the workspace does not grow with the batch. A constant: nothing may depend on how much
# memory happens to be free.
WORKSPACE_BYTES = 160 << 20
SAMPLE_SHIFT, SHORT_SAMPLE_SHIFT, SHORT_CONTEXT = 4, 3, 16 << 10


def sample_shift(context: int) -> int:
    """How many tokens one sampled key stands for, as a power of two: 16, or 8 in short contexts.

    There the candidates that closer thresholds spare `select` are more than the samples cost.
    """
    return SHORT_SAMPLE_SHIFT if context <= SHORT_CONTEXT else SAMPLE_SHIFT


@operation()
def topk_prefill(
    q: torch.Tensor,
    weights: torch.Tensor,
    heads: Optional[torch.Tensor],
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    cu_rows: torch.Tensor,
    lengths: torch.Tensor,
    topk: int,
    *,
    max_context: Optional[int] = None,
    shared_q: Optional[torch.Tensor] = None,
    shared_scale: Optional[torch.Tensor] = None,
    init_tokens: int = 0,
    local_tokens: int = 0,
    output: str = "positions",
    offsets: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The `topk` tokens of highest score of every row of an extend batch.

    I[t,s] = k_scale[s] * (sum over the row's heads of weights[t,j] * relu(q[t,j] . k[s]) + shared_scale[t] * (shared_q[t] . k[s]))
    Equal scores are broken in favour of the lower position. Rows that see at most `topk` tokens select all of them.

    Args:
        topk: a multiple of 64 up to 16384.
        max_context: bound on `lengths` that the host knows, which bounds the workspace; P * 64 by default.
        shared_q, shared_scale: the shared head, as `route_sampled` makes it; both or neither.
        init_tokens, local_tokens: so many tokens at the start and at the end of what a row sees score +inf.
        output: "positions"; "slots" of the cache, page_table[b, p // 64] * 64 + p % 64; "ragged", p + offsets[t].
        offsets: int32 [T], for "ragged".

    Returns:
        int32 [T, topk], ascending by position, padded with -1; padding rows hold -1 only.

    Raises:
        ValueError: a dtype, a shape or a number is wrong.
    """
    checks.queries(q, weights, lengths)
    checks.heads(heads, q, shared_q, shared_scale)
    checks.cache(index_k)
    checks.sequences(page_table, cu_rows)
    context = _checked_context(page_table, max_context)
    out = checks.selection(lengths, topk, output, offsets)
    if launching(q):
        _launch(
            *slots(q, weights, heads, shared_q, shared_scale, PREFILL_SLOTS),
            *(q, weights, index_k, page_table, cu_rows, lengths, offsets, out),
            routes=False,
            rerank_candidates=0,
            context=context,
            init_tokens=init_tokens,
            local_tokens=local_tokens,
            form=FORMS[output],
        )
    return out


@operation()
def route_sampled_topk_prefill(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    cu_rows: torch.Tensor,
    lengths: torch.Tensor,
    active_heads: int,
    topk: int,
    *,
    rerank_candidates: int = 0,
    max_context: Optional[int] = None,
    init_tokens: int = 0,
    local_tokens: int = 0,
    output: str = "positions",
    offsets: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`route_sampled`, then `topk_prefill` with its heads, in less of the host's time than the two.

    Args:
        rerank_candidates: if not 0, so many tokens are selected first, as many as `topk_prefill` can select, and `rerank` selects
            among them.

    Returns:
        heads, shared_q and shared_scale as of `route_sampled`, and the selection, as of `topk_prefill` or `rerank`, bit for bit.

    Raises:
        ValueError: a dtype, a shape or a number is wrong.
    """
    checks.cache(index_k)
    checks.sequences(page_table, cu_rows)
    routed = checked_slots(q, weights, lengths, active_heads)
    context = _checked_context(page_table, max_context)
    if rerank_candidates:
        checks.count("rerank_candidates", rerank_candidates)
    out = checks.selection(lengths, topk, output, offsets)
    if launching(q):
        _launch(
            *slots(q, weights, *routed, PREFILL_SLOTS),
            *(q, weights, index_k, page_table, cu_rows, lengths, offsets, out),
            routes=True,
            rerank_candidates=rerank_candidates,
            context=context,
            init_tokens=init_tokens,
            local_tokens=local_tokens,
            form=FORMS[output],
        )
    return *routed, out


def _checked_context(page_table: torch.Tensor, max_context: Optional[int]) -> int:
    """A bound on the lengths."""
    room = page_table.shape[1] * PAGE_SIZE
    context = room if max_context is None else max_context
    checks.context(context)
    checks.require(
        context <= room,
        f"max_context must be at most the {room} tokens of page_table, not {context}",
    )
    return context


def _launch(
    scoring: int,
    slots_of: Dict[str, Any],
    q: torch.Tensor,
    weights: torch.Tensor,
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    cu_rows: torch.Tensor,
    lengths: torch.Tensor,
    offsets: Optional[torch.Tensor],
    out: torch.Tensor,
    **numbers: int,
) -> None:
    """Write the selections to `out`, and what fills the slots if `routes`.

    Args:
        scoring, slots_of: as of `slots`.
        numbers: those of `_chain` that no tensor's shape says.
    """
    batch, max_pages = page_table.shape
    chain = _chain(
        scoring,
        num_sms(q.device),
        shared=slots_of["shared"],
        num_heads=slots_of["num_heads"],
        active_heads=slots_of["active_heads"],
        rows=lengths.shape[0],
        batch=batch,
        max_pages=max_pages,
        table_stride=page_table.stride(0),
        pages=index_k.shape[0],
        topk=out.shape[1],
        **numbers,
    )
    chain.launch(
        *(q, weights, slots_of["active"]),
        *(slots_of["shared_q"], slots_of["shared_scale"]),
        *(index_k, page_table, cu_rows, lengths),
        no_offsets(lengths) if offsets is None else offsets,
        index_k.new_empty(chain.workspace_bytes),
        out,
    )


TENSORS = (
    *("q", "weights", "active", "shared_q", "shared_scale"),
    *("index_k", "page_table", "cu_rows", "lengths", "offsets", "workspace", "out"),
)
ALIGNMENT = 256  # bytes, of what lies in the workspace: as torch's own allocations for whoever copies from it


class _Chain(NamedTuple):
    """The launches for a batch's shapes, and what they leave for one another."""

    launch: Chain
    workspace_bytes: int


@functools.lru_cache(maxsize=SHAPES)
def _chain(
    scoring: int,
    sms: int,
    *,
    routes: bool,
    rerank_candidates: int,
    rows: int,
    batch: int,
    context: int,
    max_pages: int,
    table_stride: int,
    pages: int,
    shared: int,
    num_heads: int,
    active_heads: int,
    topk: int,
    init_tokens: int,
    local_tokens: int,
    form: int,
) -> _Chain:
    spans = max(1, -(-context // SPAN))
    words = spans * SPAN // 32
    tile_rows = rows_per_tile(scoring)
    shift = sample_shift(context)
    sample_pages = max(1, -(-context // (PAGE_SIZE << shift)))
    width = sample_pages * PAGE_SIZE
    few, many = THRESHOLD_THREADS
    threads = few if width <= MANY_SAMPLES else many

    # Sequences begin new tiles, padding rows form one more sequence.
    tiles = rows // tile_rows + batch + 1
    slot_bytes = width * 4 + 2 * words * 4
    chunk = max(1, WORKSPACE_BYTES // (slot_bytes * tile_rows))
    chunk = min(chunk, tiles)
    row_slots = chunk * tile_rows

    # A CTA begins by collecting its queries, which takes as long as several pages: two waves of CTAs, one for samples.
    span_pages = SPAN // PAGE_SIZE
    split_pages = -(-spans // max(1, 2 * sms // chunk)) * span_pages
    split_sample_pages = -(-sample_pages // max(1, sms // chunk))
    small, large = SELECT_CAPACITIES
    # What the kernels up to `select` keep of a row, and where.
    kept = rerank_candidates or topk
    selected = {"out": "candidates"} if rerank_candidates else {}
    capacity = small if kept <= 8192 else large

    table = dict(rows=rows, batch=batch, table_stride=table_stride)
    scored = dict(
        **table,
        shared=shared,
        num_heads=num_heads,
        active_heads=active_heads,
        topk=kept,
    )
    forced = dict(init_tokens=init_tokens, local_tokens=local_tokens)

    def part(first: int) -> List[Step]:
        """The launches for a chunk of the tiles, in their order."""
        count = min(chunk, tiles - first)
        scoring_of = dict(
            **scored,
            slots=row_slots,
            first_tile=first,
            tiles=count,
            sample_shift=shift,
        )
        score_samples = dict(
            **scoring_of,
            pages=batch * sample_pages,
            max_pages=sample_pages,
            width=width,
            splits=-(-sample_pages // split_sample_pages),
            split_pages=split_sample_pages,
            init_tokens=0,
            local_tokens=0,
        )
        threshold = dict(
            batch=batch,
            first_tile=first,
            tile_rows=tile_rows,
            topk=kept,
            sample_shift=shift,
            room=capacity >> shift,
            # Too many above the high threshold all become candidates: little is lost while they fit.
            deviations=2 if kept + kept // 4 <= capacity else 3,
            rows=rows,
            bounds=batch + 1,
            slots=count * tile_rows,
            width=width,
        )
        score_planes = dict(
            **scoring_of,
            **forced,
            pages=pages,
            max_pages=max_pages,
            width=words,
            splits=-(-spans * span_pages // split_pages),
            split_pages=split_pages,
        )
        select = dict(
            **scored,
            **forced,
            pages=pages,
            max_pages=max_pages,
            first_tile=first,
            form=FORMS["positions"] if rerank_candidates else form,
            slots=count * tile_rows,
            width=words,
        )
        return [
            Step(
                f"score_samples_{scoring}",
                score_samples,
                {"keys": "samples", "scales": "sample_scales", "out": "sampled"},
            ),
            Step(
                f"threshold_{threads}",
                threshold,
                {"samples": "sampled", "out": "thresholds"},
            ),
            Step(f"score_planes_{scoring}", score_planes, {"out": "planes"}),
            Step(f"select_{scoring}_{capacity}", select, selected),
        ]

    sample = dict(
        **table,
        pages=pages,
        max_pages=max_pages,
        sample_pages=sample_pages,
        sample_shift=shift,
    )
    steps = [Step("sample", sample, {"out": "samples"})]
    if routes:
        router = routing_step(
            num_heads,
            sms,
            **table,
            rows_per_seq=0,
            pages=pages,
            max_pages=max_pages,
            routed=active_heads,
            bounds=batch + 1,
        )
        steps.insert(0, router._replace(renamed={"heads": "active"}))
    for first in range(0, tiles, chunk):
        steps += part(first)
    if rerank_candidates:
        reranking = reranking_step(
            num_heads,
            **table,
            **forced,
            pages=pages,
            max_pages=max_pages,
            num_candidates=rerank_candidates,
            topk=topk,
            form=form,
        )
        steps.append(reranking)
    sizes = dict(
        samples=batch * sample_pages * PAGE_BYTES,
        sampled=row_slots * width * 4,
        thresholds=row_slots * 3 * 4,
        planes=row_slots * 2 * words * 4,
    )
    if rerank_candidates:
        sizes["candidates"] = rows * rerank_candidates * 4
    if routes:
        sizes["dealt"] = 4  # cleared by the router; no kernel of a prefill reads it
    workspace, size = _laid_out(**sizes)
    _, samples = workspace["samples"]
    workspace["sample_scales"] = ("workspace", samples + PAGE_KEY_BYTES)
    launch = Chain(TENSORS, *steps, inside={**KEYS_AND_SCALES, **workspace})
    return _Chain(launch, size)


def _laid_out(**sizes: int) -> Tuple[Dict[str, Tuple[str, int]], int]:
    """Where everything lies in the workspace, given the bytes of each, and the bytes of all."""
    places, end = {}, 0
    for name, size in sizes.items():
        places[name] = ("workspace", end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return places, end
