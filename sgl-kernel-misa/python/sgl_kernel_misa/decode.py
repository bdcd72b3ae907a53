"""Selection for decode and speculative verify: score all tokens, then select among the scores.

Here the fp32 scores of rows x context are written: they are small beside the keys, which are read once. The kernels overlap:
keys begin to stream while the router still works, and each kernel starts before the one ahead of it has finished. That is
safe because the kernel that comes first in an operation waits for everything before it; what the others need of each other
they wait for themselves, and none ends before those ahead of it.
"""

from typing import Optional, Tuple

import torch
from sgl_kernel_misa.checks import PAGE_SIZE
from sgl_kernel_misa.library import launch
from sgl_kernel_misa.tensors import (
    FORMS,
    NUM_SMS,
    all_heads,
    cluster_ranks,
    keys_and_scales,
    no_offsets,
    padded_heads,
)

MAX_ROWS = 4  # of a sequence
CANDIDATES = 6144  # that a block of `decode_select` lists


def score_blocks(heads: int) -> int:
    """Blocks that score with kernels of so many `heads`: those that fit on the chip at once."""
    return 2 * NUM_SMS if heads <= 16 else NUM_SMS


def select_ranks(rows: int, topk: int) -> int:
    """Blocks that share a row: few if there are many rows, but each lists its part of about 1.5 topk candidates."""
    least = next(ranks for ranks in (2, 4, 8) if 2 * topk <= ranks * CANDIDATES)
    return max(least, cluster_ranks(rows, blocks_per_sm=1))


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
    shared: Optional[Tuple[torch.Tensor, torch.Tensor]] = None,
    dealt: Optional[torch.Tensor] = None,
    init_tokens: int = 0,
    local_tokens: int = 0,
    output: str = "positions",
    offsets: Optional[torch.Tensor] = None,
) -> None:
    """Write the selections of `ops.topk_decode` to `out`, int32 [T, topk].

    Args:
        dealt: int32 [1], if `heads` come from `routing.route_decode`, launched right before: the counter that it clears.
    """
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
    compiled = padded_heads(active.shape[1] + (shared is not None))
    shared_q, shared_scale = (q, weights) if shared is None else shared
    launch(
        f"decode_score_{compiled}",
        q=q,
        weights=weights,
        active=active,
        shared_q=shared_q,
        shared_scale=shared_scale,
        shared=int(shared is not None),
        keys=keys,
        scales=scales,
        **table,
        lengths=lengths,
        scores=scores,
        dealt=lengths.new_zeros(1) if dealt is None else dealt,
        rows_per_seq=rows_per_seq,
        blocks=score_blocks(compiled),
        routed=int(dealt is not None),
        topk=topk,
        init_tokens=init_tokens,
        local_tokens=local_tokens,
        rows=rows,
        num_heads=q.shape[1],
        pages=index_k.shape[0],
        active_heads=active.shape[1],
        width=width,
    )
    launch(
        f"decode_select_{select_ranks(rows, topk)}",
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
