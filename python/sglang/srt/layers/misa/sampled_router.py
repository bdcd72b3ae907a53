"""The sampled router: which heads score the tokens of a query, and the shared head that stands for all others.

It reads a few keys of the index-K cache and keeps nothing. `reference.route_sampled` defines it.
"""

from typing import Tuple

import numpy as np
import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE, read_tokens
from sglang.srt.layers.misa.reference import (
    MAX_SAMPLES,
    best_heads,
    dot,
    sample_positions,
    shared_query,
)

ROWS_AT_ONCE = 16  # their samples are 2 MiB in float64, with 64 heads


def sample_strides(lengths: torch.Tensor) -> torch.Tensor:
    """How far apart the sampled keys of each query are: int [T] -> int64 [T], powers of two."""
    above = (lengths.long().clamp(min=1) - 1) // MAX_SAMPLES
    bits = torch.frexp(above.double()).exponent  # the length of a whole number in bits
    return torch.ones_like(above) << bits.long()


def sequential_sum(samples: torch.Tensor) -> torch.Tensor:
    """`reference.sequential_sum`, which numpy computes on a CPU."""
    total = samples.new_zeros(samples.shape[1:])
    if not samples.is_cpu or total.numel() <= 1:
        return reference.sequential_sum(samples)
    # numpy adds one by one too, but in pairs where the elements of a sum lie side by side.
    samples = samples.contiguous()
    np.add.reduce(samples.numpy(), axis=0, out=total.numpy(), initial=0.0)
    return total


def lines(x: torch.Tensor, counts: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """`reference.lines` for rows with different numbers of samples.

    Args:
        x: float32 [n, T, H], what lies behind a row's samples is not looked at.
        counts: int64 [T], the samples of each row, at most n; a row without any gets zeros.

    Returns:
        float64 [T, H], slopes; float64 [T, H], standard deviations of the rest.
    """
    place = torch.arange(len(x), device=x.device)[:, None]
    unseen = (place >= counts)[:, :, None]
    divisor = counts.clamp(min=1)[:, None]

    def mean(samples: torch.Tensor) -> torch.Tensor:
        # A zero behind a row's samples changes no bit of its sum.
        return sequential_sum(samples) / divisor

    def from_mean(samples: torch.Tensor) -> torch.Tensor:
        return (samples - mean(samples)).masked_fill_(unseen, 0)

    positive = x > 0
    always = (positive | unseen).all(0)
    never = ~(positive & ~unseen).any(0)
    x = x.double().masked_fill_(unseen, 0)
    y = x.relu()
    x_from_mean = from_mean(x)
    slope = mean((y - mean(y)) * x_from_mean) / mean(x_from_mean.square())
    slope = slope.masked_fill(always, 1).masked_fill(never, 0)
    rest = y - slope * x
    return slope, mean(from_mean(rest).square()).sqrt()


def slopes_and_estimates(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_k: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """`reference.slopes_and_estimates` on the paged cache, for the rows of one sequence; see `route_sampled`."""
    slopes, estimates = torch.zeros_like(weights), torch.zeros_like(weights)
    strides = sample_strides(lengths)
    for stride in strides.unique().tolist():
        # The samples of a row are the first ones of the row that sees most.
        of_stride = (strides == stride).nonzero()[:, 0]
        positions = sample_positions(int(lengths[of_stride].max())).to(q.device)
        slots = pages[positions // PAGE_SIZE].long() * PAGE_SIZE
        keys, scales = read_tokens(index_k, slots + positions % PAGE_SIZE)
        for rows in of_stride.split(ROWS_AT_ONCE):
            counts = lengths[rows].long() // stride
            n = int(counts.max())
            x = scales[:n] * dot(q[rows].flatten(0, 1), keys[:n])
            x = x.T.contiguous().view(n, len(rows), q.shape[1])
            slope, rest = lines(x, counts)
            slopes[rows] = slope.float()
            estimates[rows] = (weights[rows].abs() * rest).float()
    return slopes, estimates


def route_sampled(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_k: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    active_heads: int,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The routed heads and the shared head of each query of one sequence.

    Args:
        q: float8_e4m3fn [T, H, 128].
        weights: float32 [T, H].
        index_k: uint8 [num_pages, 64 * 132], the index-K cache.
        pages: int [P], the pages of the sequence.
        lengths: int [T], tokens visible to each query.
        active_heads: slots: one less of routed heads, and the shared head.

    Returns:
        heads int64 [T, active_heads - 1], ascending, equal estimates being broken in favour of the lower head;
        shared_q float8_e4m3fn [T, 128]; shared_scale float32 [T], powers of two.
    """
    slopes, estimates = slopes_and_estimates(q, weights, index_k, pages, lengths)
    heads = best_heads(estimates, active_heads - 1)
    return heads, *shared_query(q, weights, slopes, heads)
