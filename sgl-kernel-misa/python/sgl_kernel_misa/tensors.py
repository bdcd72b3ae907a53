"""Views and constants that the launches share."""

from typing import Tuple

import torch

FORMS = {"positions": 0, "slots": 1, "ragged": 2}
KEY_BYTES = 64 * 128  # of a page, before its scales
NUM_SMS = 132  # of an H100 or H200: what the grids are laid out for


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


def cluster_ranks(count: int, blocks: int, least: int = 1) -> int:
    """Blocks of each of `count` clusters: 1, 2, 4 or 8.

    The most with which there are at most `blocks` in all; more where fewer than `least` would be left.
    """
    return next(
        ranks
        for ranks in (8, 4, 2, 1)
        if ranks == 1 or ranks * count <= blocks or ranks // 2 < least
    )


def padded_heads(count: int) -> int:
    """Heads that the scoring kernels are compiled for, at least `count`."""
    return next(size for size in (8, 16, 32, 64) if size >= count)
