"""The second stage of hierarchical MISA: candidates scored by all heads."""

from typing import Optional

import torch
from sgl_kernel_misa.checks import MAX_TOPK
from sgl_kernel_misa.library import launch
from sgl_kernel_misa.tensors import FORMS, keys_and_scales, no_offsets

SMALL_CAPACITY = 8192  # candidates a row; the larger kernel takes MAX_TOPK
FEW_ROWS = 256  # of a decode batch: then a cluster of blocks shares a row, for it takes one block long
CLUSTER = 8


def select(
    q: torch.Tensor,
    weights: torch.Tensor,
    candidates: torch.Tensor,
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    cu_rows: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    *,
    init_tokens: int = 0,
    local_tokens: int = 0,
    output: str = "positions",
    offsets: Optional[torch.Tensor] = None,
) -> None:
    """Write the selections of `ops.rerank` to `out`, int32 [T, topk]."""
    keys, scales = keys_and_scales(index_k)
    capacity = SMALL_CAPACITY if candidates.shape[1] <= SMALL_CAPACITY else MAX_TOPK
    blocks = CLUSTER if q.shape[0] <= FEW_ROWS else 1
    launch(
        f"rerank_{q.shape[1]}_{capacity}_{blocks}",
        q=q,
        weights=weights,
        candidates=candidates,
        keys=keys,
        scales=scales,
        page_table=page_table,
        cu_rows=cu_rows,
        lengths=lengths,
        offsets=no_offsets(lengths) if offsets is None else offsets,
        out=out,
        init_tokens=init_tokens,
        local_tokens=local_tokens,
        form=FORMS[output],
        rows=q.shape[0],
        pages=index_k.shape[0],
        batch=page_table.shape[0],
        max_pages=page_table.shape[1],
        table_stride=page_table.stride(0),
        num_candidates=candidates.shape[1],
        topk=out.shape[1],
    )
