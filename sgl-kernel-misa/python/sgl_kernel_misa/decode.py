"""Selection for decode and speculative verify: score all tokens, then select among the scores.

Here the fp32 scores of rows x context are written: they are small beside the keys, which are read once. The kernels overlap:
keys begin to stream while the router still works, and each kernel starts before the one ahead of it has finished. That is
safe because the kernel that comes first in an operation waits for everything before it; what the others need of each other
they wait for themselves, and none ends before those ahead of it.
"""

from typing import Optional

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
MANY_SEQUENCES = 8


def score_blocks(heads: int, sequences: int) -> int:
    """Blocks that score with kernels of so many `heads`, all resident at once beside those of `decode_route`.

    A single long sequence is done sooner by two on an SM; one keeps up with the memory as long as its heads are few, and many
    sequences stream faster to half as many blocks.
    """
    two = heads <= 8 and sequences < MANY_SEQUENCES or heads == 16
    return 2 * NUM_SMS if two else NUM_SMS


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
    routed: bool = False,
    init_tokens: int = 0,
    local_tokens: int = 0,
    output: str = "positions",
    offsets: Optional[torch.Tensor] = None,
) -> None:
    """Write the selections of `ops.topk_decode` to `out`, int32 [T, topk].

    Args:
        routed: `heads` come from `routing.route_decode`, launched right before.
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
    compiled = padded_heads(active.shape[1])
    launch(
        f"decode_score_{compiled}",
        q=q,
        weights=weights,
        active=active,
        keys=keys,
        scales=scales,
        **table,
        lengths=lengths,
        scores=scores,
        rows_per_seq=rows_per_seq,
        blocks=score_blocks(compiled, batch),
        routed=int(routed),
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
        f"decode_select_{cluster_ranks(rows, blocks_per_sm=2)}",
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
