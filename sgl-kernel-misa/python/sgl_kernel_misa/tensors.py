"""Views and constants that the launches share."""

from typing import Tuple

import torch

FORMS = {"positions": 0, "slots": 1, "ragged": 2}
KEY_BYTES = 64 * 128  # of a page, before its scales
NUM_SMS = 132  # of an H100 or H200: what the grids are laid out for
# Clusters by their size of which an H100 holds so many with two blocks on an SM: a cluster does not straddle two GPCs.
CLUSTERS = {8: 30, 4: 64, 2: 132}


def keys_and_scales(index_k: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """The first key and the first scale of a paged cache; the kernels know the strides."""
    return index_k, index_k.flatten()[KEY_BYTES:]


def no_offsets(lengths: torch.Tensor) -> torch.Tensor:
    """Stands for offsets that are not read."""
    return lengths


def all_heads(q: torch.Tensor) -> torch.Tensor:
    """int32 [T, H]: every head of every row."""
    heads = torch.arange(q.shape[1], dtype=torch.int32, device=q.device)
    return heads.expand(q.shape[0], -1).contiguous()


def cluster_ranks(count: int, blocks_per_sm: int) -> int:
    """Blocks of each of `count` clusters, 1, 2, 4 or 8: the most with which the chip holds all clusters at once.

    Args:
        blocks_per_sm: blocks that fit on an SM, 1 or 2.
    """
    fitting = (n for n, most in CLUSTERS.items() if count <= most * blocks_per_sm // 2)
    return next(fitting, 1)


def padded_heads(count: int) -> int:
    """Heads that the scoring kernels are compiled for, at least `count`."""
    return next(size for size in (8, 16, 32, 64) if size >= count)
