"""Routing: pool the complete blocks of every sequence, then choose every row's heads; in decode one kernel does both."""

import torch
from sgl_kernel_misa import checks
from sgl_kernel_misa.constants import DECODE_ROUTE_ROWS, HEAD_DIM, PAGE_SIZE
from sgl_kernel_misa.device import cluster_ranks, num_sms
from sgl_kernel_misa.library import launch
from sgl_kernel_misa.registration import launching, operation
from sgl_kernel_misa.tensors import compiled_rows


@operation()
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
    checks.sequences(page_table, cu_rows)
    heads = checked_heads(q, weights, pooled_keys, lengths, active_heads, block_size)
    if launching(q):
        batch, max_pages = page_table.shape
        block_pages = block_size // PAGE_SIZE
        blocks = max(1, max_pages // block_pages)
        pooled_blocks = pooled_keys.new_empty(batch, blocks, HEAD_DIM)
        common = dict(
            pooled_keys=pooled_keys,
            page_table=page_table,
            cu_rows=cu_rows,
            lengths=lengths,
            block_pages=block_pages,
            pages=pooled_keys.shape[0],
            batch=batch,
            max_pages=max_pages,
            table_stride=page_table.stride(0),
            blocks=blocks,
            rows=q.shape[0],
        )
        launch("pool_blocks", out=pooled_blocks, **common)
        launch(
            f"route_{q.shape[1]}",
            q=q,
            weights=weights,
            pooled_blocks=pooled_blocks,
            out=heads,
            active_heads=active_heads,
            **common,
        )
    return heads


def checked_heads(
    q: torch.Tensor,
    weights: torch.Tensor,
    pooled_keys: torch.Tensor,
    lengths: torch.Tensor,
    active_heads: int,
    block_size: int,
) -> torch.Tensor:
    """Check what both routers take; returns room for the heads, int32 [T, active_heads]."""
    checks.queries(q, weights, lengths)
    checks.tensor("pooled_keys", pooled_keys, torch.bfloat16, (None, HEAD_DIM))
    checks.require(
        1 <= active_heads <= q.shape[1],
        f"active_heads must be 1 to {q.shape[1]}, not {active_heads}",
    )
    checks.require(
        block_size > 0 and block_size % PAGE_SIZE == 0,
        f"block_size must be a multiple of {PAGE_SIZE}, not {block_size}",
    )
    return lengths.new_empty(q.shape[0], active_heads)


def launch_decode_route(
    q: torch.Tensor,
    weights: torch.Tensor,
    pooled_keys: torch.Tensor,
    page_table: torch.Tensor,
    rows_per_seq: int,
    lengths: torch.Tensor,
    block_size: int,
    heads: torch.Tensor,
    dealt: torch.Tensor,
) -> None:
    """Write the heads for few rows a sequence; scoring may begin while it works. Clears `dealt`, int32 [1], for it."""
    batch, max_pages = page_table.shape
    rows = compiled_rows(rows_per_seq)
    ranks = max(
        rows // DECODE_ROUTE_ROWS,
        cluster_ranks(batch, ctas_per_sm=2, sms=num_sms(q.device)),
    )
    launch(
        f"decode_route_{q.shape[1]}_{rows}_{ranks}",
        q=q,
        weights=weights,
        pooled_keys=pooled_keys,
        page_table=page_table,
        lengths=lengths,
        out=heads,
        dealt=dealt,
        rows_per_seq=rows_per_seq,
        block_pages=block_size // PAGE_SIZE,
        rows=q.shape[0],
        pages=pooled_keys.shape[0],
        batch=batch,
        max_pages=max_pages,
        table_stride=page_table.stride(0),
        active_heads=heads.shape[1],
    )
