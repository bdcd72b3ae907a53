"""The operations, as `torch.ops.sgl_kernel_misa.*` and as functions.

They run on the current stream, never wait for the device, give the same bits in every run and may be captured in CUDA
graphs. Shapes used throughout, T rows of queries of B sequences:

    q            float8_e4m3fn [T, H, 128], H 32 or 64
    weights      float32 [T, H], the gates of the heads, q's scale folded in
    index_k      uint8 [num_pages, 8448], SGLang's index-K cache: a page holds 64 keys of 128 bytes, then 64 scales
    pooled_keys  bfloat16 [num_pages, 128], the mean dequantized key of every complete page
    page_table   int32 [B, P], the pages of every sequence; may hold more columns than a sequence has pages
    cu_rows      int32 [B + 1], rows cu_rows[b] .. cu_rows[b + 1] belong to sequence b; later rows are padding
    lengths      int32 [T], tokens that each row sees, not descending within a sequence
    heads        int32 [T, h], the heads that score a row, ascending; None for all of them

Source of the method: MISA, arXiv 2605.07363.
"""

from typing import Optional, Tuple

import torch
from sgl_kernel_misa import checks, decode, prefill, reranking, routing
from sgl_kernel_misa.library import launch
from sgl_kernel_misa.tensors import keys_and_scales

_LIBRARY = torch.library.Library("sgl_kernel_misa", "DEF")


def _register(schema: str):
    """Define an operation by its schema; the function is its implementation on CUDA."""
    _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    name = schema.partition("(")[0]

    def register(function):
        _LIBRARY.impl(name, function, "CUDA")
        return function

    return register


def _fake(name: str):
    return torch.library.register_fake(f"sgl_kernel_misa::{name}", lib=_LIBRARY)


# Pooled keys


@_register(
    "update_pooled_keys(Tensor index_k, Tensor slots, Tensor(a!) pooled_keys) -> ()"
)
def _update_pooled_keys(index_k, slots, pooled_keys):
    _check_pooled_keys(index_k, slots, pooled_keys)
    if slots.numel() == 0:
        return
    keys, scales = keys_and_scales(index_k)
    kind = "int64" if slots.dtype == torch.int64 else "int32"
    launch(
        f"update_pooled_keys_{kind}",
        keys=keys,
        scales=scales,
        slots=slots,
        pooled_keys=pooled_keys,
        pages=index_k.shape[0],
        tokens=slots.shape[0],
    )


@_fake("update_pooled_keys")
def _(index_k, slots, pooled_keys):
    _check_pooled_keys(index_k, slots, pooled_keys)


def _check_pooled_keys(index_k, slots, pooled_keys):
    checks.cache(index_k)
    checks.require(
        slots.dtype in (torch.int32, torch.int64),
        f"slots must be torch.int32 or torch.int64, not {slots.dtype}",
    )
    checks.tensor("slots", slots, slots.dtype, (None,))
    checks.tensor(
        "pooled_keys", pooled_keys, torch.bfloat16, (index_k.shape[0], checks.HEAD_DIM)
    )


def update_pooled_keys(
    index_k: torch.Tensor, slots: torch.Tensor, pooled_keys: torch.Tensor
) -> None:
    """Write the means of the pages that the tokens just stored have completed.

    Args:
        index_k: the cache, the new tokens included.
        slots: int32 or int64 [N], the slot of every new token; a page is complete when slot % 64 == 63 is among them.
        pooled_keys: written in place.

    Raises:
        ValueError: a dtype or shape is wrong.
    """
    torch.ops.sgl_kernel_misa.update_pooled_keys(index_k, slots, pooled_keys)


# Routing


@_register(
    "route(Tensor q, Tensor weights, Tensor pooled_keys, Tensor page_table, Tensor cu_rows, Tensor lengths, "
    "int active_heads, int block_size) -> Tensor"
)
def _route(
    q, weights, pooled_keys, page_table, cu_rows, lengths, active_heads, block_size
):
    heads = _route_output(
        q, weights, pooled_keys, page_table, cu_rows, lengths, active_heads, block_size
    )
    if q.shape[0] > 0:
        routing.route(
            q, weights, pooled_keys, page_table, cu_rows, lengths, block_size, heads
        )
    return heads


@_fake("route")
def _route_output(
    q, weights, pooled_keys, page_table, cu_rows, lengths, active_heads, block_size
):
    checks.sequences(page_table, cu_rows)
    return _heads_output(q, weights, pooled_keys, lengths, active_heads, block_size)


def _heads_output(q, weights, pooled_keys, lengths, active_heads, block_size):
    checks.queries(q, weights, lengths)
    checks.tensor("pooled_keys", pooled_keys, torch.bfloat16, (None, checks.HEAD_DIM))
    checks.require(
        1 <= active_heads <= q.shape[1],
        f"active_heads must be 1 to {q.shape[1]}, not {active_heads}",
    )
    checks.require(
        block_size > 0 and block_size % checks.PAGE_SIZE == 0,
        f"block_size must be a multiple of {checks.PAGE_SIZE}, not {block_size}",
    )
    return lengths.new_empty(q.shape[0], active_heads)


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
    """The heads with the largest estimated contribution to each row.

    E[t,j] = mean over the pooled blocks b that t sees of | weights[t,j] * relu(q[t,j] . kbar[b]) |; equal estimates are
    broken in favour of the lower head. Rows that see no complete page get heads 0 .. active_heads - 1.

    Args:
        active_heads: heads to choose.
        block_size: tokens in a pooled block, a multiple of 64.

    Returns:
        int32 [T, active_heads], ascending.

    Raises:
        ValueError: a dtype, a shape or a number is wrong.
    """
    return torch.ops.sgl_kernel_misa.route(
        q, weights, pooled_keys, page_table, cu_rows, lengths, active_heads, block_size
    )


# Selection


@_register(
    "topk_prefill(Tensor q, Tensor weights, Tensor? heads, Tensor index_k, Tensor page_table, Tensor cu_rows, "
    "Tensor lengths, int topk, *, int? max_context=None, int init_tokens=0, int local_tokens=0, "
    'str output="positions", Tensor? offsets=None) -> Tensor'
)
def _topk_prefill(q, weights, heads, index_k, page_table, cu_rows, lengths, topk, **options):  # fmt: skip
    out = _topk_prefill_output(
        q, weights, heads, index_k, page_table, cu_rows, lengths, topk, **options
    )
    if q.shape[0] > 0:
        prefill.select(
            q, weights, heads, index_k, page_table, cu_rows, lengths, out, **options
        )
    return out


@_fake("topk_prefill")
def _topk_prefill_output(
    q,
    weights,
    heads,
    index_k,
    page_table,
    cu_rows,
    lengths,
    topk,
    *,
    max_context=None,
    init_tokens=0,
    local_tokens=0,
    output="positions",
    offsets=None,
):
    checks.queries(q, weights, lengths)
    checks.heads(heads, q)
    checks.cache(index_k)
    checks.sequences(page_table, cu_rows)
    checks.topk(topk)
    capacity = page_table.shape[1] * checks.PAGE_SIZE
    checks.context(capacity if max_context is None else max_context)
    checks.require(
        max_context is None or max_context <= capacity,
        f"max_context must be at most the {capacity} tokens of page_table, not {max_context}",
    )
    checks.output(output, offsets, q.shape[0])
    return lengths.new_empty(q.shape[0], topk)


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
    init_tokens: int = 0,
    local_tokens: int = 0,
    output: str = "positions",
    offsets: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The `topk` tokens of highest score of every row of an extend batch.

    I[t,s] = k_scale[s] * sum over the row's heads of weights[t,j] * relu(q[t,j] . k[s]). Equal scores are broken in
    favour of the lower position. Rows that see at most `topk` tokens select all of them.

    Args:
        topk: a multiple of 64 up to 16384.
        max_context: bound on `lengths` that the host knows, which bounds the workspace; P * 64 by default.
        init_tokens, local_tokens: so many tokens at the start and at the end of what a row sees score +inf.
        output: "positions"; "slots" of the cache, page_table[b, p // 64] * 64 + p % 64; "ragged", p + offsets[t].
        offsets: int32 [T], for "ragged".

    Returns:
        int32 [T, topk], ascending by position, padded with -1; padding rows hold -1 only.

    Raises:
        ValueError: a dtype, a shape or a number is wrong.
    """
    return torch.ops.sgl_kernel_misa.topk_prefill(
        q,
        weights,
        heads,
        index_k,
        page_table,
        cu_rows,
        lengths,
        topk,
        max_context=max_context,
        init_tokens=init_tokens,
        local_tokens=local_tokens,
        output=output,
        offsets=offsets,
    )


@_register(
    "topk_decode(Tensor q, Tensor weights, Tensor? heads, Tensor index_k, Tensor page_table, int rows_per_seq, "
    "Tensor lengths, int topk, *, int init_tokens=0, int local_tokens=0, "
    'str output="positions", Tensor? offsets=None) -> Tensor'
)
def _topk_decode(q, weights, heads, index_k, page_table, rows_per_seq, lengths, topk, **options):  # fmt: skip
    out = _topk_decode_output(
        q, weights, heads, index_k, page_table, rows_per_seq, lengths, topk, **options
    )
    if q.shape[0] > 0:
        decode.select(
            q,
            weights,
            heads,
            index_k,
            page_table,
            rows_per_seq,
            lengths,
            out,
            **options,
        )
    return out


@_fake("topk_decode")
def _topk_decode_output(
    q,
    weights,
    heads,
    index_k,
    page_table,
    rows_per_seq,
    lengths,
    topk,
    *,
    init_tokens=0,
    local_tokens=0,
    output="positions",
    offsets=None,
):
    checks.queries(q, weights, lengths)
    checks.heads(heads, q)
    checks.cache(index_k)
    checks.pages(page_table)
    checks.require(
        1 <= rows_per_seq <= decode.MAX_ROWS,
        f"rows_per_seq must be 1 to {decode.MAX_ROWS}, not {rows_per_seq}",
    )
    checks.require(
        q.shape[0] == page_table.shape[0] * rows_per_seq,
        f"q must have {page_table.shape[0]} * {rows_per_seq} rows, not {q.shape[0]}",
    )
    checks.topk(topk)
    checks.context(page_table.shape[1] * checks.PAGE_SIZE)
    checks.output(output, offsets, q.shape[0])
    return lengths.new_empty(q.shape[0], topk)


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
    init_tokens: int = 0,
    local_tokens: int = 0,
    output: str = "positions",
    offsets: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """As `topk_prefill`, for decode and speculative verify: few rows a sequence, whose keys are read once for all of them.

    Args:
        rows_per_seq: rows of every sequence, 1 to 4; row t belongs to sequence t // rows_per_seq.
        lengths: may be 0 for padding rows, which get -1 only.

    Returns:
        int32 [T, topk].

    Raises:
        ValueError: a dtype, a shape or a number is wrong.
    """
    return torch.ops.sgl_kernel_misa.topk_decode(
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


@_register(
    "route_topk_decode(Tensor q, Tensor weights, Tensor pooled_keys, Tensor index_k, Tensor page_table, "
    "int rows_per_seq, Tensor lengths, int active_heads, int block_size, int topk, *, "
    'int init_tokens=0, int local_tokens=0, str output="positions", Tensor? offsets=None) -> (Tensor, Tensor)'
)
def _route_topk_decode(q, weights, pooled_keys, index_k, page_table, rows_per_seq, lengths, active_heads, block_size, topk, **options):  # fmt: skip
    heads, out = _route_topk_decode_output(
        q,
        weights,
        pooled_keys,
        index_k,
        page_table,
        rows_per_seq,
        lengths,
        active_heads,
        block_size,
        topk,
        **options,
    )
    if q.shape[0] > 0:
        dealt = lengths.new_empty(1)
        routing.route_decode(
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
        decode.select(
            q,
            weights,
            heads,
            index_k,
            page_table,
            rows_per_seq,
            lengths,
            out,
            dealt=dealt,
            **options,
        )
    return heads, out


@_fake("route_topk_decode")
def _route_topk_decode_output(q, weights, pooled_keys, index_k, page_table, rows_per_seq, lengths, active_heads, block_size, topk, **options):  # fmt: skip
    heads = _heads_output(q, weights, pooled_keys, lengths, active_heads, block_size)
    out = _topk_decode_output(
        q, weights, heads, index_k, page_table, rows_per_seq, lengths, topk, **options
    )
    return heads, out


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
    return torch.ops.sgl_kernel_misa.route_topk_decode(
        q,
        weights,
        pooled_keys,
        index_k,
        page_table,
        rows_per_seq,
        lengths,
        active_heads,
        block_size,
        topk,
        init_tokens=init_tokens,
        local_tokens=local_tokens,
        output=output,
        offsets=offsets,
    )


# Rerank


@_register(
    "rerank(Tensor q, Tensor weights, Tensor candidates, Tensor index_k, Tensor page_table, Tensor cu_rows, "
    "Tensor lengths, int topk, *, int init_tokens=0, int local_tokens=0, "
    'str output="positions", Tensor? offsets=None) -> Tensor'
)
def _rerank(q, weights, candidates, index_k, page_table, cu_rows, lengths, topk, **options):  # fmt: skip
    out = _rerank_output(
        q, weights, candidates, index_k, page_table, cu_rows, lengths, topk, **options
    )
    if q.shape[0] > 0:
        reranking.select(
            q,
            weights,
            candidates,
            index_k,
            page_table,
            cu_rows,
            lengths,
            out,
            **options,
        )
    return out


@_fake("rerank")
def _rerank_output(
    q,
    weights,
    candidates,
    index_k,
    page_table,
    cu_rows,
    lengths,
    topk,
    *,
    init_tokens=0,
    local_tokens=0,
    output="positions",
    offsets=None,
):
    checks.queries(q, weights, lengths)
    checks.tensor("candidates", candidates, torch.int32, (q.shape[0], None))
    checks.require(
        candidates.shape[1] <= checks.MAX_TOPK,
        f"candidates must be at most {checks.MAX_TOPK} a row, not {candidates.shape[1]}",
    )
    checks.cache(index_k)
    checks.sequences(page_table, cu_rows)
    checks.topk(topk)
    checks.output(output, offsets, q.shape[0])
    return lengths.new_empty(q.shape[0], topk)


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
    """The second stage of hierarchical MISA: scores the candidates with all heads and keeps the best `topk`.

    Args:
        candidates: int32 [T, m], positions in ascending order, padded with -1; m at most 16384.
        topk, init_tokens, local_tokens, output, offsets: as for `topk_prefill`.

    Returns:
        int32 [T, topk], ascending by position, padded with -1.

    Raises:
        ValueError: a dtype, a shape or a number is wrong.
    """
    return torch.ops.sgl_kernel_misa.rerank(
        q,
        weights,
        candidates,
        index_k,
        page_table,
        cu_rows,
        lengths,
        topk,
        init_tokens=init_tokens,
        local_tokens=local_tokens,
        output=output,
        offsets=offsets,
    )
