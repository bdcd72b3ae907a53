"""The router on a CPU: which heads score the tokens of a query, for `torch_operations`.

On a GPU kernels decide. `reference.route` defines it, a row at a time; here all rows of a sequence are taken together.
"""

import torch

from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE
from sglang.srt.layers.misa.reference import dot


def running_block_means(means: torch.Tensor, block_size: int) -> torch.Tensor:
    """For every page, the mean of the pages of its block up to and including it.

    The last page of a block gives the block's pooled key; the last complete page of a prefix gives that of the prefix's
    partial block.

    Args:
        means: bfloat16 [P, 128], page means in the order of the sequence, P a multiple of the pages in a block.
        block_size: tokens in a block, a multiple of 64.

    Returns:
        bfloat16 [P, 128].
    """
    pages = block_size // PAGE_SIZE
    sums = means.double().view(-1, pages, means.shape[1]).cumsum(1)
    counts = torch.arange(1, pages + 1, device=means.device, dtype=torch.float64)
    return (sums / counts[:, None]).float().bfloat16().view_as(means)


def route(
    q: torch.Tensor,
    weights: torch.Tensor,
    means: torch.Tensor,
    lengths: torch.Tensor,
    active_heads: int,
    block_size: int,
) -> torch.Tensor:
    """The heads with the largest estimated contribution to each query of one sequence.

    Args:
        q: float8_e4m3fn [T, H, 128].
        weights: float32 [T, H].
        means: bfloat16 [P, 128], page means in the order of the sequence; rows of pages that no query sees complete may
            hold anything.
        lengths: int [T], tokens visible to each query.
        active_heads: heads to choose.
        block_size: tokens in a block.

    Returns:
        int64 [T, active_heads], ascending; equal estimates are broken in favour of the lower head.
    """
    rows, num_heads, _ = q.shape
    per_block = block_size // PAGE_SIZE
    blocks = -(-len(means) // per_block)
    padding = blocks * per_block - len(means)
    means = running_block_means(
        torch.nn.functional.pad(means, (0, 0, 0, padding)), block_size
    )
    pages = lengths // PAGE_SIZE
    full = pages // per_block
    last = means[(pages - 1).clamp(min=0)]
    gate = weights.abs()

    # Full blocks are shared by all rows; the partial block at the end of a prefix is each row's own.
    whole = dot(q.flatten(0, 1), means[per_block - 1 :: per_block]).relu()
    whole = gate[:, :, None] * whole.view(rows, num_heads, blocks)
    seen = torch.arange(blocks, device=q.device) < full[:, None]
    estimate = whole.masked_fill(~seen[:, None], 0).double().sum(2)
    partial = (q.double() @ last.double()[:, :, None]).squeeze(2).float().relu()
    partial = (gate * partial).masked_fill((pages == full * per_block)[:, None], 0)
    count = (pages + per_block - 1) // per_block
    estimate = ((estimate + partial) / count.clamp(min=1)[:, None]).float()

    best = estimate.sort(dim=1, descending=True, stable=True).indices
    return best[:, :active_heads].sort(dim=1).values
