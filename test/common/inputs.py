"""Inputs of the indexer for tests: random ones, and those on which a selection goes wrong first."""

from typing import NamedTuple

import torch

from sglang.srt.layers.misa.index_k_cache import HEAD_DIM, PAGE_SIZE

FP8_MAX = 448.0


class Inputs(NamedTuple):
    """One sequence as `reference` takes it."""

    q: torch.Tensor
    weights: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    lengths: torch.Tensor

    def to(self, device: str) -> "Inputs":
        return Inputs(*(tensor.to(device) for tensor in self))


def make_inputs(kind: str, rows: int, heads: int, tokens: int, seed: int = 0) -> Inputs:
    """`rows` queries at the end of a sequence of `tokens` tokens.

    Kinds: random; ties (all keys equal); zeros (no query meets a key); rising, falling (scores monotonic in the
    position); huge (one score dwarfs the rest); extremes (FP8's largest and smallest values, scales of 1e-30 to 1e30);
    twins (pairs of equal heads).
    """
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, heads, HEAD_DIM, generator=rng) * 100
    weights = torch.randn(rows, heads, generator=rng)
    k = torch.randn(tokens, HEAD_DIM, generator=rng) * 100
    k_scale = torch.rand(tokens, generator=rng) + 0.5
    if kind == "ties":
        k[:] = k[0]
        k_scale[:] = 1
    elif kind == "zeros":
        q, k = q.abs(), -k.abs()
    elif kind in ("rising", "falling"):
        q, weights, k = q.abs(), weights.abs(), k[:1].abs().expand(tokens, -1).clone()
        k_scale = torch.linspace(0.5, 1.5, tokens)
        k_scale = k_scale if kind == "rising" else k_scale.flip(0)
    elif kind == "huge":
        k_scale[tokens // 3] = 1e20
    elif kind == "extremes":
        values = torch.tensor([FP8_MAX, -FP8_MAX, 2.0**-9, -(2.0**-9), 0.0])
        k = values[torch.randint(5, k.shape, generator=rng)]
        q = values[torch.randint(5, q.shape, generator=rng)]
        k_scale = 10.0 ** torch.randint(-30, 30, (tokens,), generator=rng)
    elif kind == "twins":
        q[:, 1::2], weights[:, 1::2] = q[:, ::2], weights[:, ::2]
    else:
        assert kind == "random", kind
    q, k = (x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn) for x in (q, k))
    lengths = torch.arange(tokens - rows + 1, tokens + 1)
    return Inputs(q, weights, k, k_scale.float(), lengths)


KINDS = (
    "random",
    "ties",
    "zeros",
    "rising",
    "falling",
    "huge",
    "extremes",
    "twins",
)


def write_cache(inputs: Inputs, spare_pages: int = 5, seed: int = 0):
    """The keys as SGLang caches them, in pages in random order.

    Returns:
        index_k uint8 [num_pages, 64 * 132] with rubbish wherever no key is, and page_table int32 [P].
    """
    rng = torch.Generator().manual_seed(seed)
    pages = -(-len(inputs.k) // PAGE_SIZE)
    num_pages = pages + spare_pages
    page_table = 1 + torch.randperm(num_pages - 1, generator=rng)[:pages]
    index_k = torch.randint(
        0, 120, (num_pages, PAGE_SIZE * 132), generator=rng, dtype=torch.uint8
    )
    for i, page in enumerate(page_table):
        tokens = slice(i * PAGE_SIZE, (i + 1) * PAGE_SIZE)
        store_page(index_k[page], inputs.k[tokens], inputs.k_scale[tokens])
    return index_k, page_table.int()


def store_page(page: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor) -> None:
    """Write up to 64 keys and scales at the front of one page: uint8 [64 * 132]."""
    page[: k.numel()] = k.view(torch.uint8).flatten()
    scales = page[PAGE_SIZE * HEAD_DIM :]
    scales[: 4 * len(k_scale)] = k_scale.view(torch.uint8)
