# SPDX-License-Identifier: Apache-2.0
"""From the positions that the indexer selects to slots of the KV pool (Triton: transform_index_page_table_*)."""

from typing import Optional

import torch


def transform_prefill(
    page_table: torch.Tensor,
    topk_indices: torch.Tensor,
    extend_lens_cpu: list[int],
    page_size: int = 1,
    output_num_tokens: Optional[int] = None,
    page_table_is_expanded: bool = False,
    cu_seqlens_q: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """page_table: int32 [requests, context], or [rows, context] where expanded; topk_indices: int32 [rows, topk], -1 pads;
    extend_lens_cpu: the rows of each request. Returns int32 [output_num_tokens, topk], -1 where nothing is selected.
    """
    assert page_size == 1
    rows = sum(extend_lens_cpu)
    request = torch.arange(rows if page_table_is_expanded else len(extend_lens_cpu))
    if not page_table_is_expanded:
        request = request.repeat_interleave(torch.tensor(extend_lens_cpu))
    out_rows = len(topk_indices) if output_num_tokens is None else output_num_tokens
    out = torch.full((out_rows, topk_indices.shape[1]), -1, dtype=torch.int32)
    selected = topk_indices[:rows]
    slots = page_table[request[:, None], selected.clamp(min=0).long()]
    out[:rows] = slots.where(selected >= 0, -1)
    return out


def transform_decode(
    page_table: torch.Tensor, topk_indices: torch.Tensor, page_size: int = 1
) -> torch.Tensor:
    """One row a request: page_table int32 [rows, context], topk_indices int32 [rows, topk] -> int32 [rows, topk]."""
    return transform_prefill(page_table, topk_indices, [1] * len(topk_indices))
