# SPDX-License-Identifier: Apache-2.0
"""Multi-query latent attention over the selected slots (FlashMLA's sparse forward)."""

from typing import Optional

import torch

CHUNK_ROWS = 64


def forward_flashmla_sparse(
    self,
    q_all: torch.Tensor,
    kv_cache: torch.Tensor,
    v_head_dim: int,
    page_table_1: torch.Tensor,
    sm_scale: float,
    topk_length: Optional[torch.Tensor] = None,
    attn_sink: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """q_all: bfloat16 [rows, heads, 576]; kv_cache: bfloat16 [slots, 1, 576]; page_table_1: int32 [rows, topk], -1 pads.

    Returns bfloat16 [rows, heads, v_head_dim], zeros for a row without a slot. A chunk of rows attends to the union of
    its slots, each weighted by how often the row selected it. Neighbouring queries select much the same slots, so this
    is one small matrix product instead of a gather for every row. float64 keeps the result, once rounded, independent of
    the chunk and of the order of the indices.
    """
    assert attn_sink is None, "neither family has one"
    kv_cache = kv_cache.view(-1, q_all.shape[-1])
    out = torch.zeros(*q_all.shape[:2], v_head_dim, dtype=q_all.dtype)
    for start in range(0, len(q_all), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        indices = page_table_1[rows].long()
        valid, indices = indices >= 0, indices.clamp(min=0)
        used = torch.zeros(len(kv_cache), dtype=torch.bool)
        used[indices] = True
        column = (used.cumsum(0) - 1)[indices]
        kv = kv_cache[used].double()
        count = torch.zeros(len(indices), len(kv), dtype=torch.float64)
        count.scatter_add_(1, column, valid.double())
        scores = (q_all[rows].double() * sm_scale) @ kv.t()
        # The logarithm of a count weighs by it, and is -inf for a slot of other rows.
        weights = scores.add_(count.log_().unsqueeze(1)).softmax(-1)
        chunk = (weights @ kv[:, :v_head_dim]).to(out.dtype)
        out[rows] = chunk.where(valid.any(1)[:, None, None], 0)
    return out
