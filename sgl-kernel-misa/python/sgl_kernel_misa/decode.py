"""Selection for decode and speculative verify: score with a histogram, then select in one pass over the scores.

Here the fp32 scores of rows x context are written: they are small beside the keys, which are read once.
"""

from typing import Optional

import torch
from sgl_kernel_misa.checks import PAGE_SIZE
from sgl_kernel_misa.library import launch
from sgl_kernel_misa.tensors import (
    FORMS,
    all_heads,
    keys_and_scales,
    no_offsets,
    padded_heads,
)

MAX_ROWS = 4  # of a sequence
BINS = 2048
COUNTERS = 2  # behind a row's histogram: candidates, blocks done
LIST_CAPACITY = 4096  # as in kernels/decode_select.py
SCORE_BLOCKS = 132 * 2  # all resident at once
SELECT_BLOCKS = 132 * 2


def select(
    q: torch.Tensor,
    weights: torch.Tensor,
    heads: Optional[torch.Tensor],
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    rows_per_seq: int,
    lengths: torch.Tensor,
    out: torch.Tensor,
    *,
    init_tokens: int = 0,
    local_tokens: int = 0,
    output: str = "positions",
    offsets: Optional[torch.Tensor] = None,
) -> None:
    """Write the selections of `ops.topk_decode` to `out`, int32 [T, topk]."""
    active = all_heads(q) if heads is None else heads
    rows, topk = out.shape
    batch, max_pages = page_table.shape
    width = max_pages * PAGE_SIZE
    keys, scales = keys_and_scales(index_k)
    table = dict(
        page_table=page_table,
        batch=batch,
        max_pages=max_pages,
        table_stride=page_table.stride(0),
    )
    scores = weights.new_empty(rows, width)
    bins = lengths.new_zeros(rows, BINS + COUNTERS)
    launch(
        f"decode_score_{padded_heads(active.shape[1])}",
        q=q,
        weights=weights,
        active=active,
        keys=keys,
        scales=scales,
        **table,
        lengths=lengths,
        scores=scores,
        bins=bins,
        rows_per_seq=rows_per_seq,
        splits=max(1, min(max_pages, SCORE_BLOCKS // batch)),
        topk=topk,
        init_tokens=init_tokens,
        local_tokens=local_tokens,
        rows=rows,
        num_heads=q.shape[1],
        pages=index_k.shape[0],
        active_heads=active.shape[1],
        width=width,
        entries=BINS + COUNTERS,
    )
    launch(
        "decode_select",
        scores=scores,
        bins=bins,
        lists=lengths.new_empty(rows, LIST_CAPACITY, 2),
        planes=lengths.new_empty(rows, width // 32),
        **table,
        lengths=lengths,
        offsets=no_offsets(lengths) if offsets is None else offsets,
        out=out,
        rows_per_seq=rows_per_seq,
        splits=max(1, min(16, SELECT_BLOCKS // rows)),
        form=FORMS[output],
        rows=rows,
        width=width,
        words=width // 32,
        entries=BINS + COUNTERS,
        topk=topk,
    )
