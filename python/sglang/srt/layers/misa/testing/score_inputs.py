"""Scores of one's choosing: inputs on which every arithmetic gives exactly the scores asked for.

A selection that guesses a threshold from a sample, or sorts into coarse buckets, goes wrong on these first.
"""

import torch

from sglang.srt.layers.misa.index_k_cache import HEAD_DIM, PAGE_SIZE
from sglang.srt.layers.misa.testing.inputs import Inputs


def inputs_with_scores(scores: torch.Tensor, rows: int, heads: int) -> Inputs:
    """Rows at the end of a sequence whose tokens score as `scores`, up to a power of two; every other row their negative.

    Two heads have a weight: head 0 meets the keys of positive scores and head 1 those of negative ones. All products
    are 1 or -1 and the weights powers of two, so nothing is ever rounded.
    """
    tokens = len(scores)
    sign = torch.ones(heads)
    sign[1] = -1
    q = sign[None, :, None].expand(rows, heads, HEAD_DIM)
    row = torch.arange(rows)
    weights = torch.zeros(rows, heads)
    weights[:, 0] = 2.0 ** (row % 5 - 2) * (1 - row % 2 * 2)
    weights[:, 1] = -weights[:, 0]
    return Inputs(
        q.to(torch.float8_e4m3fn).contiguous(),
        weights,
        scores.sign()[:, None]
        .expand(-1, HEAD_DIM)
        .to(torch.float8_e4m3fn)
        .contiguous(),
        scores.abs().float().masked_fill(scores == 0, 1),
        torch.arange(tokens - rows + 1, tokens + 1),
    )


def every(stride: int, offset: int, of_these: float, others: float):
    """Random scores of one size at every `stride`-th position, of another size elsewhere: what a strided sample sees."""

    def scores(tokens, topk, rng):
        position = torch.arange(tokens)
        scale = torch.where(position % stride == offset, of_these, others)
        return scale * (torch.rand(tokens, generator=rng) + 1)

    return scores


def crammed(tokens, topk, rng):
    """The best scores all lie side by side."""
    scores = torch.rand(tokens, generator=rng)
    first = tokens // 3 + 5
    scores[first : first + topk + topk // 2] += 100
    return scores


def one_page_in_sixteen(tokens, topk, rng):
    page = torch.arange(tokens) // PAGE_SIZE
    return torch.where(page % 16 == 3, 1000.0, 1.0) * (
        torch.rand(tokens, generator=rng) + 1
    )


def half_zeros(tokens, topk, rng):
    return torch.randn(tokens, generator=rng).relu()


def kth_is_zero(tokens, topk, rng):
    """Fewer positive scores than topk, fewer negative ones too, and zeros between."""
    scores = torch.zeros(tokens)
    some = torch.randperm(tokens, generator=rng)[: max(2, min(topk, tokens // 2))]
    scores[some] = torch.randn(len(some), generator=rng)
    return scores


def two_values(extra: int):
    """Two scores only, the higher one at topk + extra positions."""

    def scores(tokens, topk, rng):
        scores = torch.ones(tokens)
        scores[torch.randperm(tokens, generator=rng)[: max(0, topk + extra)]] = 2
        return scores

    return scores


def few_values(tokens, topk, rng):
    return torch.randint(-3, 4, (tokens,), generator=rng).float()


def neighbours(tokens, topk, rng):
    """Scores a float32 apart: a bucket of any coarser kind holds all of them."""
    return 1 + torch.randperm(tokens, generator=rng) * 2.0**-23


def neighbours_far_below_one(tokens, topk, rng):
    """The same, with one score that stretches the range."""
    scores = neighbours(tokens, topk, rng)
    scores[tokens // 2] = 2.0**60
    return scores


def wide(tokens, topk, rng):
    """Scores of every size and sign."""
    exponent = torch.randint(-90, 90, (tokens,), generator=rng)
    return torch.randn(tokens, generator=rng) * 2.0**exponent


def stairs(tokens, topk, rng):
    """Rising in steps of 100 equal scores."""
    return (torch.arange(tokens) // 100 - tokens // 200).float()


DISTRIBUTIONS = {
    "every 16th is huge": every(16, 0, 1000.0, 1.0),
    "every 16th but the first is huge": every(16, 15, 1000.0, 1.0),
    "every 16th is tiny": every(16, 0, 0.001, 1.0),
    "every 16th from 7 is tiny": every(16, 7, 0.001, 1.0),
    "every 64th is huge": every(64, 0, 1000.0, 1.0),
    "every 8th is huge": every(8, 0, 1000.0, 1.0),
    "crammed": crammed,
    "one page in sixteen": one_page_in_sixteen,
    "half zeros": half_zeros,
    "k-th is zero": kth_is_zero,
    "two values, as many as topk": two_values(0),
    "two values, one fewer": two_values(-1),
    "two values, one more": two_values(1),
    "two values, all the higher": two_values(10**9),
    "few values": few_values,
    "neighbours": neighbours,
    "neighbours and one huge": neighbours_far_below_one,
    "wide": wide,
    "stairs": stairs,
}


def distributed(
    name: str, rows: int, heads: int, tokens: int, topk: int, seed: int = 0
):
    """Inputs whose scores are distributed as `name` says."""
    rng = torch.Generator().manual_seed(seed)
    scores = DISTRIBUTIONS[name](tokens, topk, rng)
    return inputs_with_scores(scores, rows, heads)
