"""Selection for decode and speculative verify: score all tokens, then select among the scores.

Here the fp32 scores of rows x context are written: they are small beside the keys, which are read once. The kernels overlap:
keys begin to stream while the router still works, and each kernel starts before the one ahead of it has finished. That is
safe because the kernel that comes first in an operation waits for everything before it; what the others need of each other
they wait for themselves, and none ends before those ahead of it.
"""

from typing import Optional, Tuple

import torch
from sgl_kernel_misa import checks
from sgl_kernel_misa.constants import (
    DECODE_CANDIDATES,
    DECODE_SELECT_RANKS,
    DECODE_SLOTS,
    FORMS,
    MAX_ROWS,
    PAGE_SIZE,
    SCORE_CTAS_PER_SM,
)
from sgl_kernel_misa.device import cluster_ranks, num_sms
from sgl_kernel_misa.library import launch
from sgl_kernel_misa.registration import launching, operation
from sgl_kernel_misa.routing import checked_heads, launch_decode_route
from sgl_kernel_misa.sampled_routing import checked_slots, launch_route_sampled
from sgl_kernel_misa.tensors import (
    compiled_rows,
    keys_and_scales,
    no_offsets,
    slots,
)


@operation()
def topk_decode(
    q: torch.Tensor,
    weights: torch.Tensor,
    heads: Optional[torch.Tensor],
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    rows_per_seq: int,
    lengths: torch.Tensor,
    topk: int,
    *,
    shared_q: Optional[torch.Tensor] = None,
    shared_scale: Optional[torch.Tensor] = None,
    init_tokens: int = 0,
    local_tokens: int = 0,
    output: str = "positions",
    offsets: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """As `topk_prefill`, for decode and speculative verify: few rows a sequence, whose keys are read once for all of them.

    Args:
        rows_per_seq: rows of every sequence, 1 to MAX_ROWS; row t belongs to sequence t // rows_per_seq.
        lengths: may be 0 for padding rows, which get -1 only.

    Returns:
        int32 [T, topk].

    Raises:
        ValueError: a dtype, a shape or a number is wrong.
    """
    checks.queries(q, weights, lengths)
    checks.heads(heads, q, shared_q, shared_scale)
    _check_cache(q, index_k, page_table, rows_per_seq)
    out = checks.selection(lengths, topk, output, offsets)
    if launching(q):
        _launch_select(
            q,
            weights,
            heads,
            shared_q,
            shared_scale,
            index_k,
            page_table,
            rows_per_seq,
            lengths,
            out,
            dealt=lengths.new_zeros(1),  # there is no router to clear it
            routed=False,
            init_tokens=init_tokens,
            local_tokens=local_tokens,
            output=output,
            offsets=offsets,
        )
    return out


@operation()
def route_topk_decode(
    q: torch.Tensor,
    weights: torch.Tensor,
    pooled_keys: torch.Tensor,
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    rows_per_seq: int,
    lengths: torch.Tensor,
    active_heads: int,
    block_size: int,
    topk: int,
    *,
    init_tokens: int = 0,
    local_tokens: int = 0,
    output: str = "positions",
    offsets: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """`route`, then `topk_decode` with its heads, faster than the two: the keys begin to stream while the router works.

    Returns:
        the heads, int32 [T, active_heads], and the selection, int32 [T, topk].

    Raises:
        ValueError: a dtype, a shape or a number is wrong.
    """
    heads = checked_heads(q, weights, pooled_keys, lengths, active_heads, block_size)
    _check_cache(q, index_k, page_table, rows_per_seq)
    out = checks.selection(lengths, topk, output, offsets)
    if launching(q):
        dealt = lengths.new_empty(1)
        launch_decode_route(
            q,
            weights,
            pooled_keys,
            page_table,
            rows_per_seq,
            lengths,
            block_size,
            heads,
            dealt,
        )
        _launch_select(
            q,
            weights,
            heads,
            None,
            None,
            index_k,
            page_table,
            rows_per_seq,
            lengths,
            out,
            dealt=dealt,
            routed=True,
            init_tokens=init_tokens,
            local_tokens=local_tokens,
            output=output,
            offsets=offsets,
        )
    return heads, out


@operation()
def route_sampled_topk_decode(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    rows_per_seq: int,
    lengths: torch.Tensor,
    active_heads: int,
    topk: int,
    *,
    init_tokens: int = 0,
    local_tokens: int = 0,
    output: str = "positions",
    offsets: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`route_sampled`, then `topk_decode` with its heads, faster than the two: the keys begin to stream while the router works.

    Returns:
        heads, shared_q and shared_scale as of `route_sampled`, bit for bit, and the selection, int32 [T, topk].

    Raises:
        ValueError: a dtype, a shape or a number is wrong.
    """
    routed = checked_slots(q, weights, lengths, active_heads)
    _check_cache(q, index_k, page_table, rows_per_seq)
    out = checks.selection(lengths, topk, output, offsets)
    if launching(q):
        dealt = lengths.new_empty(1)
        launch_route_sampled(
            q, weights, index_k, page_table, rows_per_seq, lengths, *routed, dealt
        )
        _launch_select(
            q,
            weights,
            *routed,
            index_k,
            page_table,
            rows_per_seq,
            lengths,
            out,
            dealt=dealt,
            routed=True,
            init_tokens=init_tokens,
            local_tokens=local_tokens,
            output=output,
            offsets=offsets,
        )
    return *routed, out


def score_ctas(heads: int, sms: int) -> int:
    """CTAs that score with kernels of so many `heads`: those that fit on a device with `sms` SMs at once."""
    return SCORE_CTAS_PER_SM[heads] * sms


def select_ranks(rows: int, topk: int, sms: int) -> int:
    """CTAs that share a row: few if there are many rows, but each lists its part of about 1.5 topk candidates."""
    least = next(
        ranks for ranks in DECODE_SELECT_RANKS if 2 * topk <= ranks * DECODE_CANDIDATES
    )
    return max(least, cluster_ranks(rows, ctas_per_sm=1, sms=sms))


def _check_cache(
    q: torch.Tensor,
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    rows_per_seq: int,
) -> None:
    checks.cache(index_k)
    checks.pages(page_table)
    checks.require(
        1 <= rows_per_seq <= MAX_ROWS,
        f"rows_per_seq must be 1 to {MAX_ROWS}, not {rows_per_seq}",
    )
    checks.require(
        q.shape[0] == page_table.shape[0] * rows_per_seq,
        f"q must have {page_table.shape[0]} * {rows_per_seq} rows, not {q.shape[0]}",
    )
    checks.context(page_table.shape[1] * PAGE_SIZE)


def _launch_select(
    q: torch.Tensor,
    weights: torch.Tensor,
    heads: Optional[torch.Tensor],
    shared_q: Optional[torch.Tensor],
    shared_scale: Optional[torch.Tensor],
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    rows_per_seq: int,
    lengths: torch.Tensor,
    out: torch.Tensor,
    *,
    dealt: torch.Tensor,
    routed: bool,
    init_tokens: int,
    local_tokens: int,
    output: str,
    offsets: Optional[torch.Tensor],
) -> None:
    """Write the selections to `out`.

    Args:
        dealt: int32 [1], a counter that is 0, or that the router clears.
        routed: `heads` come from the router, launched right before.
    """
    rows, topk = out.shape
    batch, max_pages = page_table.shape
    width = max_pages * PAGE_SIZE
    sms = num_sms(q.device)
    keys, scales = keys_and_scales(index_k)
    table = dict(
        page_table=page_table,
        batch=batch,
        max_pages=max_pages,
        table_stride=page_table.stride(0),
    )
    scores = weights.new_empty(rows, width)
    compiled, slots_of = slots(q, weights, heads, shared_q, shared_scale, DECODE_SLOTS)
    launch(
        f"decode_score_{compiled}_{compiled_rows(rows_per_seq)}",
        q=q,
        weights=weights,
        **slots_of,
        keys=keys,
        scales=scales,
        **table,
        lengths=lengths,
        scores=scores,
        dealt=dealt,
        rows_per_seq=rows_per_seq,
        blocks=score_ctas(compiled, sms),
        routed=int(routed),
        topk=topk,
        init_tokens=init_tokens,
        local_tokens=local_tokens,
        rows=rows,
        pages=index_k.shape[0],
        width=width,
    )
    launch(
        f"decode_select_{select_ranks(rows, topk, sms)}",
        scores=scores,
        **table,
        lengths=lengths,
        offsets=no_offsets(lengths) if offsets is None else offsets,
        out=out,
        rows_per_seq=rows_per_seq,
        form=FORMS[output],
        rows=rows,
        width=width,
        topk=topk,
    )
