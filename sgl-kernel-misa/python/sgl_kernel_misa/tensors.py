"""Tensors as the kernels take them."""

from typing import Any, Dict, Optional, Sequence, Tuple

import torch
from sgl_kernel_misa.constants import DECODE_ROWS, PAGE_KEY_BYTES


def keys_and_scales(index_k: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """The first key and the first scale of a paged cache; the kernels know the strides."""
    return index_k, index_k.flatten()[PAGE_KEY_BYTES:]


# The same, for a chain that has the cache as "index_k".
KEYS_AND_SCALES = {"keys": ("index_k", 0), "scales": ("index_k", PAGE_KEY_BYTES)}


def no_offsets(lengths: torch.Tensor) -> torch.Tensor:
    """Stands for offsets that are not read."""
    return lengths


def all_heads(q: torch.Tensor) -> torch.Tensor:
    """int32 [T, H]: every head of every row."""
    heads = torch.arange(q.shape[1], dtype=torch.int32, device=q.device)
    return heads.expand(q.shape[0], -1).contiguous()


def slots(
    q: torch.Tensor,
    weights: torch.Tensor,
    heads: Optional[torch.Tensor],
    shared_q: Optional[torch.Tensor],
    shared_scale: Optional[torch.Tensor],
    compiled: Sequence[int],
) -> Tuple[int, Dict[str, Any]]:
    """The slots that a scoring kernel is compiled for, one of `compiled`, and what it takes to fill those of every row."""
    active = all_heads(q) if heads is None else heads
    shared = shared_q is not None
    # Where there is no shared head, tensors of the same types stand for it, and are not read.
    filled = dict(
        active=active,
        shared_q=shared_q if shared else q,
        shared_scale=shared_scale if shared else weights,
        shared=int(shared),
        num_heads=q.shape[1],
        active_heads=active.shape[1],
    )
    count = active.shape[1] + shared
    return next(size for size in compiled if size >= count), filled


def compiled_rows(count: int) -> int:
    """Rows of a sequence that the kernels of decode are compiled for, at least `count`."""
    return next(rows for rows in DECODE_ROWS if rows >= count)
