"""Routing: pool the complete blocks of every sequence, then choose every row's heads."""

from typing import Optional

import torch
from sgl_kernel_misa.checks import HEAD_DIM, PAGE_SIZE
from sgl_kernel_misa.library import launch


def route(
    q: torch.Tensor,
    weights: torch.Tensor,
    pooled_keys: torch.Tensor,
    page_table: torch.Tensor,
    cu_rows: torch.Tensor,
    lengths: torch.Tensor,
    block_size: int,
    out: torch.Tensor,
    progress: Optional[torch.Tensor] = None,
) -> None:
    """Write the heads of `ops.route` to `out`, int32 [T, active_heads]; clears `progress`, int32 [B], for `decode.select`."""
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
    if progress is None:
        progress = lengths.new_empty(batch)
    launch("pool_blocks", progress=progress, out=pooled_blocks, **common)
    launch(
        f"route_{q.shape[1]}",
        q=q,
        weights=weights,
        pooled_blocks=pooled_blocks,
        out=out,
        active_heads=out.shape[1],
        **common,
    )
