"""The operations in torch, on the paged cache, for whole batches: the functions of sgl-kernel-misa, for a CPU.

Written to be exact: their results are those of `reference`, bit for bit. They read lengths on the host. They are as
strict about dtypes and shapes as the kernels, so that what a kernel would refuse on a GPU fails on a CPU too.

Tensors used throughout:

    q            [T, H, 128]       float8_e4m3fn   rows of all sequences, one sequence after the other
    weights      [T, H]            float32         head gates, with q's scale folded in
    index_k      [pages, 64*132]   uint8           SGLang's index-K cache
    pooled_keys  [pages, 128]      bfloat16        mean dequantized key of each complete page
    page_table   [B, P]            int32           pages of each sequence
    cu_rows      [B + 1]           int32           the rows of sequence b are cu_rows[b] .. cu_rows[b + 1]
    lengths      [T]               int32           tokens visible to each row
    heads        [T, h]            int32           heads that score a row's tokens, ascending; None for all
    shared_q     [T, 128]          float8_e4m3fn   the query of a row's shared head; None where there is none
    shared_scale [T]               float32         its scale

Selections are int32 [T, topk], ascending, -1 padded, in the form `output`: "positions" in the sequence, "slots" of the
cache, or "ragged", positions plus the row's entry of `offsets` (int32 [T]). Equal scores are broken in favour of the
lower position, and NaN ranks below every number. All raise ValueError for a tensor of another dtype, shape or layout.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch

from sglang.srt.layers.misa import router, sampled_router
from sglang.srt.layers.misa.index_k_cache import HEAD_DIM, PAGE_SIZE, read_pages
from sglang.srt.layers.misa.reference import (
    force,
    members,
    of_heads,
    page_means,
    token_scores,
    visible,
)
from sglang.srt.layers.misa.selection import positions, to_output, topk_mask

MAX_ROWS = 8  # of a sequence in decode, as of the kernels

# Rows are taken in chunks whose temporaries fit in this much memory.
WORKSPACE_BYTES = 256 << 20
_BYTES_PER_SCORE = 48  # float64 and float32 scores, masks, int64 ranks
# Keys that are scored at a time, whose products stay in a core's cache.
_KEYS_AT_ONCE = 1024


def update_pooled_keys(
    index_k: torch.Tensor, slots: torch.Tensor, pooled_keys: torch.Tensor
) -> None:
    """Write the means of the pages whose last token is among `slots` (int [N]), the slots of the tokens just stored."""
    pages = slots[slots % PAGE_SIZE == PAGE_SIZE - 1] // PAGE_SIZE
    pooled_keys[pages.long()] = page_means(*read_pages(index_k, pages))


def route(
    q: torch.Tensor,
    weights: torch.Tensor,
    pooled_keys: torch.Tensor,
    page_table: torch.Tensor,
    cu_rows: torch.Tensor,
    lengths: torch.Tensor,
    active_heads: int,
    block_size: int,
) -> torch.Tensor:
    """The heads with the largest estimated contribution to each row -> int32 [T, active_heads], ascending."""
    _check(q, weights, page_table, cu_rows, lengths)
    heads = q.new_zeros(len(q), active_heads, dtype=torch.int32)
    for sequence, rows, tokens in _chunks(q.shape[1], cu_rows, lengths):
        pages = page_table[sequence, : max(1, -(-tokens // PAGE_SIZE))]
        means = pooled_keys[pages.long()]
        heads[rows] = router.route(
            q[rows], weights[rows], means, lengths[rows], active_heads, block_size
        ).int()
    return heads


def route_sampled(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    cu_rows: torch.Tensor,
    lengths: torch.Tensor,
    active_heads: int,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The routed heads of each row, int32 [T, active_heads - 1], ascending, and its shared head: shared_q, shared_scale.

    `active_heads` is from 1, the shared head alone, to H - 1; all heads leave nothing to share.
    """
    _check(q, weights, page_table, cu_rows, lengths)
    rows, num_heads, head_dim = q.shape
    if not 1 <= active_heads < num_heads:
        raise ValueError(
            f"active_heads={active_heads} is not from 1 to {num_heads - 1}"
        )
    heads = lengths.new_zeros(rows, active_heads - 1)
    shared_q, shared_scale = q.new_zeros(rows, head_dim), weights.new_ones(rows)
    bounds = cu_rows.tolist()
    for sequence, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        part = slice(start, stop)
        if start < stop:
            routed, shared_q[part], shared_scale[part] = sampled_router.route_sampled(
                q[part],
                weights[part],
                index_k,
                page_table[sequence],
                lengths[part],
                active_heads,
            )
            heads[part] = routed.int()
    return heads, shared_q, shared_scale


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
    """The `topk` visible positions of highest score by the `heads` and the shared one; `max_context` bounds the lengths."""
    if max_context is not None and lengths.numel() and lengths.max() > max_context:
        raise ValueError(f"a row sees more than max_context={max_context} tokens")
    shared = _shared(q, heads, shared_q, shared_scale)
    scored = q, weights
    if heads is not None:
        scored = of_heads(q, weights, heads.long())
    return _select(
        *scored,
        shared,
        lambda rows, tokens: visible(lengths[rows], tokens),
        index_k,
        page_table,
        cu_rows,
        lengths,
        topk,
        {"init_tokens": init_tokens, "local_tokens": local_tokens},
        output,
        offsets,
    )


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
    """The same where every sequence has `rows_per_seq` rows, 1 to MAX_ROWS, and the host need not know the lengths."""
    return topk_prefill(
        q,
        weights,
        heads,
        index_k,
        page_table,
        _as_many(q, page_table, rows_per_seq),
        lengths,
        topk,
        shared_q=shared_q,
        shared_scale=shared_scale,
        init_tokens=init_tokens,
        local_tokens=local_tokens,
        output=output,
        offsets=offsets,
    )


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
    """`route`, then `topk_decode` with its heads -> heads, selection."""
    active = active_heads, block_size
    cu_rows = _as_many(q, page_table, rows_per_seq)
    heads = route(q, weights, pooled_keys, page_table, cu_rows, lengths, *active)
    selected = topk_decode(
        q,
        weights,
        heads,
        index_k,
        page_table,
        rows_per_seq,
        lengths,
        topk,
        init_tokens=init_tokens,
        local_tokens=local_tokens,
        output=output,
        offsets=offsets,
    )
    return heads, selected


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
    """`route_sampled`, then `topk_decode` with its heads -> heads, shared_q, shared_scale, selection."""
    return route_sampled_topk_prefill(
        q,
        weights,
        index_k,
        page_table,
        _as_many(q, page_table, rows_per_seq),
        lengths,
        active_heads,
        topk,
        init_tokens=init_tokens,
        local_tokens=local_tokens,
        output=output,
        offsets=offsets,
    )


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
    """`route_sampled`, then `topk_prefill` with its heads -> heads, shared_q, shared_scale, selection.

    Args:
        rerank_candidates: if not 0, so many tokens are selected first, and `rerank` selects among them.
    """
    heads, shared_q, shared_scale = route_sampled(
        q, weights, index_k, page_table, cu_rows, lengths, active_heads
    )
    forced: Dict[str, Any] = {"init_tokens": init_tokens, "local_tokens": local_tokens}
    form: Dict[str, Any] = {"output": output, "offsets": offsets}
    selected = topk_prefill(
        q,
        weights,
        heads,
        index_k,
        page_table,
        cu_rows,
        lengths,
        rerank_candidates or topk,
        max_context=max_context,
        shared_q=shared_q,
        shared_scale=shared_scale,
        **forced,
        **({} if rerank_candidates else form),
    )
    if rerank_candidates:
        selected = rerank(
            q,
            weights,
            selected,
            index_k,
            page_table,
            cu_rows,
            lengths,
            topk,
            **forced,
            **form,
        )
    return heads, shared_q, shared_scale, selected


def rerank(
    q: torch.Tensor,
    weights: torch.Tensor,
    candidates: torch.Tensor,
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    cu_rows: torch.Tensor,
    lengths: torch.Tensor,
    topk: int,
    *,
    init_tokens: int = 0,
    local_tokens: int = 0,
    output: str = "positions",
    offsets: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The `topk` best by the scores of all heads among each row's `candidates`, int32 [T, m] positions, -1 padded."""
    return _select(
        q,
        weights,
        (None, None),
        lambda rows, tokens: members(candidates[rows].long(), tokens),
        index_k,
        page_table,
        cu_rows,
        lengths,
        topk,
        {"init_tokens": init_tokens, "local_tokens": local_tokens},
        output,
        offsets,
    )


def _select(
    q: torch.Tensor,
    weights: torch.Tensor,
    shared: Tuple[Optional[torch.Tensor], Optional[torch.Tensor]],
    allowed: Callable[[slice, int], torch.Tensor],
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    cu_rows: torch.Tensor,
    lengths: torch.Tensor,
    topk: int,
    forced: dict,
    output: str,
    offsets: Optional[torch.Tensor],
) -> torch.Tensor:
    """Score with all heads of q and select among the positions `allowed(rows, tokens)`, bool [rows, tokens]."""
    _check(q, weights, page_table, cu_rows, lengths)
    shared_q, shared_scale = shared
    selected = q.new_full((len(q), topk), -1, dtype=torch.int32)
    for sequence, rows, tokens in _chunks(q.shape[1], cu_rows, lengths):
        mask = allowed(rows, tokens)
        # Otherwise all are selected, whatever they score.
        if tokens > topk:
            pages = page_table[sequence, : -(-tokens // PAGE_SIZE)]
            keys, scales = (x[:tokens] for x in read_pages(index_k, pages))
            of_rows = [None if x is None else x[rows] for x in (shared_q, shared_scale)]
            parts = zip(keys.split(_KEYS_AT_ONCE), scales.split(_KEYS_AT_ONCE))
            scores = torch.cat(
                [token_scores(q[rows], weights[rows], *x, *of_rows) for x in parts], 1
            )
            scores = force(scores, lengths[rows], **forced)
            mask = topk_mask(scores, mask, topk)
        selected[rows] = positions(mask, topk)
    return to_output(selected, output, page_table, cu_rows, offsets)


def _as_many(
    q: torch.Tensor, page_table: torch.Tensor, rows_per_seq: int
) -> torch.Tensor:
    """`cu_rows` of sequences of as many rows each."""
    if not 1 <= rows_per_seq <= MAX_ROWS:
        raise ValueError(f"rows_per_seq must be 1 to {MAX_ROWS}, not {rows_per_seq}")
    if len(q) != len(page_table) * rows_per_seq:
        raise ValueError(f"{len(q)} rows are not {rows_per_seq} rows a sequence")
    cu_rows = torch.arange(
        len(page_table) + 1, dtype=torch.int32, device=page_table.device
    )
    return cu_rows * rows_per_seq


def _chunks(
    num_heads: int, cu_rows: torch.Tensor, lengths: torch.Tensor
) -> Iterator[Tuple[int, slice, int]]:
    """The rows as (sequence, rows, tokens that the longest of them sees), a chunk of one sequence at a time."""
    bounds = cu_rows.tolist()
    for sequence, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        if start == stop:
            continue
        longest = int(lengths[start:stop].max())
        row_bytes = longest * _BYTES_PER_SCORE
        # The router holds three values a page and head at most.
        row_bytes += num_heads * (HEAD_DIM + 3 * (longest // PAGE_SIZE)) * 8
        # Where no head is routed, rows that see nothing need nothing.
        step = max(1, WORKSPACE_BYTES // max(1, row_bytes))
        for first in range(start, stop, step):
            rows = slice(first, min(first + step, stop))
            yield sequence, rows, int(lengths[rows].max())


def _shared(q, heads, shared_q, shared_scale):
    """shared_q and shared_scale, checked."""
    if (shared_q is None) != (shared_scale is None):
        raise ValueError("shared_q and shared_scale come together")
    if shared_q is not None:
        if heads is None:
            raise ValueError("all heads leave none to share")
        rows, _, head_dim = q.shape
        _check_tensor("shared_q", shared_q, torch.float8_e4m3fn, (rows, head_dim))
        _check_tensor("shared_scale", shared_scale, torch.float32, (rows,))
        for name, tensor in (("shared_q", shared_q), ("shared_scale", shared_scale)):
            _check_contiguous(name, tensor)
    return shared_q, shared_scale


def _check(q, weights, page_table, cu_rows, lengths) -> None:
    rows, num_heads, _ = q.shape
    for name, tensor, dtype, shape in (
        ("weights", weights, torch.float32, (rows, num_heads)),
        ("page_table", page_table, torch.int32, (len(cu_rows) - 1, None)),
        ("cu_rows", cu_rows, torch.int32, (None,)),
        ("lengths", lengths, torch.int32, (rows,)),
    ):
        _check_tensor(name, tensor, dtype, shape)
    for name, tensor in (
        ("q", q),
        ("weights", weights),
        ("cu_rows", cu_rows),
        ("lengths", lengths),
        # Rows of the page table may lie apart.
        ("page_table", page_table[:1]),
    ):
        _check_contiguous(name, tensor)


def _check_tensor(name, tensor, dtype, shape) -> None:
    fits = len(shape) == tensor.ndim and all(
        size in (None, actual) for size, actual in zip(shape, tensor.shape)
    )
    if tensor.dtype != dtype or not fits:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}"
        )


def _check_contiguous(name, tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous")
