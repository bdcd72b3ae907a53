# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding for any rank of query and key."""

from typing import Optional

import torch


def rotate(x: torch.Tensor, cos_sin: torch.Tensor, is_neox_style: bool) -> torch.Tensor:
    """Rotates in float32. x: [tokens, ..., d]; cos_sin: [tokens, d], the cosines first."""
    shape = (len(x),) + (1,) * (x.dim() - 2) + (-1,)
    cos, sin = (part.float().view(shape) for part in cos_sin.chunk(2, dim=-1))
    if is_neox_style:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def rotary_forward(
    self,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`RotaryEmbedding.forward`. positions: int64 [tokens]; query: [tokens, heads, d]; key: [tokens, (heads,) d]."""
    assert self.rotary_dim == self.head_size == query.shape[-1] == key.shape[-1]
    cos_sin = self.cos_sin_cache[positions if offsets is None else positions + offsets]
    return tuple(
        rotate(x, cos_sin, self.is_neox_style).to(x.dtype) for x in (query, key)
    )
