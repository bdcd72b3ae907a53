"""Routing: pool the complete blocks of every sequence, then choose every row's heads; in decode one kernel does both."""

import torch
from sgl_kernel_misa.checks import HEAD_DIM, PAGE_SIZE
from sgl_kernel_misa.library import launch
from sgl_kernel_misa.tensors import cluster_ranks, keys_and_scales


def route(
    q: torch.Tensor,
    weights: torch.Tensor,
    pooled_keys: torch.Tensor,
    page_table: torch.Tensor,
    cu_rows: torch.Tensor,
    lengths: torch.Tensor,
    block_size: int,
    out: torch.Tensor,
) -> None:
    """Write the heads of `ops.route` to `out`, int32 [T, active_heads]."""
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
        out=out,
        active_heads=out.shape[1],
        **common,
    )


def route_decode(
    q: torch.Tensor,
    weights: torch.Tensor,
    pooled_keys: torch.Tensor,
    page_table: torch.Tensor,
    rows_per_seq: int,
    lengths: torch.Tensor,
    block_size: int,
    out: torch.Tensor,
    dealt: torch.Tensor,
) -> None:
    """The same for 1 to 4 rows a sequence; `decode.select` may begin while it works. Clears `dealt`, int32 [1], for it."""
    batch, max_pages = page_table.shape
    launch(
        f"decode_route_{q.shape[1]}_{cluster_ranks(batch, blocks_per_sm=2)}",
        q=q,
        weights=weights,
        pooled_keys=pooled_keys,
        page_table=page_table,
        lengths=lengths,
        out=out,
        dealt=dealt,
        rows_per_seq=rows_per_seq,
        block_pages=block_size // PAGE_SIZE,
        rows=q.shape[0],
        pages=pooled_keys.shape[0],
        batch=batch,
        max_pages=max_pages,
        table_stride=page_table.stride(0),
        active_heads=out.shape[1],
    )


ROUTED_TILE_ROWS = 8


def route_sampled(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    rows_of: "torch.Tensor | int",
    lengths: torch.Tensor,
    heads: torch.Tensor,
    shared_q: torch.Tensor,
    shared_scale: torch.Tensor,
    dealt: torch.Tensor,
) -> None:
    """The sampled router: writes heads int32 [T, h - 1], shared_q float8_e4m3fn [T, 128], shared_scale float32 [T].

    Args:
        rows_of: cu_rows of an extend batch, or the rows of every sequence in decode.
    """
    batch, max_pages = page_table.shape
    keys, scales = keys_and_scales(index_k)
    decode = isinstance(rows_of, int)
    cu_rows = lengths if decode else rows_of
    launch(
        f"route_sampled_{q.shape[1]}",
        q=q,
        weights=weights,
        keys=keys,
        scales=scales,
        page_table=page_table,
        cu_rows=cu_rows,
        lengths=lengths,
        heads=heads,
        shared_q=shared_q,
        shared_scale=shared_scale,
        dealt=dealt,
        rows_per_seq=rows_of if decode else 0,
        tiles=batch if decode else q.shape[0] // ROUTED_TILE_ROWS + batch + 1,
        rows=q.shape[0],
        pages=index_k.shape[0],
        batch=batch,
        max_pages=max_pages,
        table_stride=page_table.stride(0),
        routed=heads.shape[1],
        bounds=cu_rows.shape[0],
    )
