"""Batches as the kernels take them: several sequences, their keys in pages in random order in one cache."""

import sys
from pathlib import Path
from typing import List, NamedTuple, Sequence, Tuple

import torch

# The generator of inputs is the one of the layer's own tests.
sys.path.append(str(Path(__file__).resolve().parents[1] / "common"))

from inputs import KINDS, Inputs, make_inputs  # noqa: F401

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.index_k_cache import HEAD_DIM, PAGE_SIZE

DEVICE = "cuda"
PAGE_BYTES = PAGE_SIZE * (HEAD_DIM + 4)
FREE_PAGES = 5
# What the mean of a page still being filled may be: whatever its last owner left.
STALE_MEAN = 1e4


class Batch(NamedTuple):
    """The tensors of the kernels, and the same sequences as the reference takes them."""

    sequences: List[Inputs]
    q: torch.Tensor
    weights: torch.Tensor
    index_k: torch.Tensor
    pooled_keys: torch.Tensor
    page_table: torch.Tensor
    cu_rows: torch.Tensor
    lengths: torch.Tensor

    def rows(self):
        """(sequence, slice of its rows) of every sequence."""
        first = 0
        for sequence in self.sequences:
            yield sequence, slice(first, first + len(sequence.q))
            first += len(sequence.q)


def make_batch(
    kind: str, specs: Sequence[Tuple[int, int]], heads: int, seed: int = 0, **layout
) -> Batch:
    """A batch of `make_inputs`: (rows, tokens) of every sequence. A row before the first token sees nothing."""
    sequences = []
    for i, (rows, tokens) in enumerate(specs):
        inputs = make_inputs(kind, rows, heads, tokens, seed=seed + i)
        sequences.append(inputs._replace(lengths=inputs.lengths.clamp(min=0)))
    return write_batch(sequences, seed=seed, **layout)


def write_batch(
    sequences: List[Inputs],
    *,
    padded_rows: int = 0,
    spare_columns: int = 3,
    seed: int = 0,
) -> Batch:
    """Lay sequences out in a paged cache.

    Whatever belongs to nobody holds what a kernel must not be misled by: rubbish in free pages and behind the last
    token, pages of others in the unused columns of the page table, stale lengths in padded rows.
    """
    sequences = [sequence.to(DEVICE) for sequence in sequences]
    rng = torch.Generator(DEVICE).manual_seed(seed)
    counts = [-(-len(sequence.k) // PAGE_SIZE) for sequence in sequences]
    columns = max(counts) + spare_columns
    num_pages = 1 + sum(counts) + FREE_PAGES
    # Page 0 is the page of padding.
    free = 1 + torch.randperm(num_pages - 1, generator=rng, device=DEVICE)
    index_k = torch.randint(
        120, (num_pages, PAGE_BYTES), generator=rng, device=DEVICE, dtype=torch.uint8
    )
    pooled_keys = torch.full(
        (num_pages, HEAD_DIM), STALE_MEAN, dtype=torch.bfloat16, device=DEVICE
    )
    page_table = torch.randint(
        1, num_pages, (len(sequences), columns), generator=rng, device=DEVICE
    )
    for b, (sequence, pages) in enumerate(
        zip(sequences, free.split(counts + [FREE_PAGES])[:-1])
    ):
        page_table[b, : len(pages)] = pages
        write_pages(index_k, pages, sequence.k, sequence.k_scale)
        means = reference.page_means(sequence.k, sequence.k_scale)
        pooled_keys[pages[: len(means)]] = means
    # Joined as bytes: not every operation of torch takes FP8.
    q = torch.cat([sequence.q.view(torch.uint8) for sequence in sequences])
    q = torch.cat([q, q.new_zeros(padded_rows, *q.shape[1:])])
    weights = torch.cat([sequence.weights for sequence in sequences])
    lengths = torch.cat([sequence.lengths for sequence in sequences])
    cu_rows = torch.tensor([0] + [len(sequence.q) for sequence in sequences])
    return Batch(
        sequences,
        q.view(torch.float8_e4m3fn),
        torch.cat([weights, weights.new_ones(padded_rows, weights.shape[1])]),
        index_k,
        pooled_keys,
        page_table.int(),
        cu_rows.cumsum(0).int().to(DEVICE),
        torch.cat([lengths, lengths.new_full((padded_rows,), 77)]).int(),
    )


def write_pages(index_k, pages, k, k_scale) -> None:
    """Write the keys and scales of a sequence into its pages, in place."""
    content = index_k[pages]
    keys = content[:, : PAGE_SIZE * HEAD_DIM].reshape(-1, HEAD_DIM)
    scales = content[:, PAGE_SIZE * HEAD_DIM :].reshape(-1, 4)
    keys[: len(k)] = k.view(torch.uint8)
    scales[: len(k)] = k_scale.float().view(torch.uint8).view(-1, 4)
    keys, scales = keys.view(len(pages), -1), scales.view(len(pages), -1)
    index_k[pages] = torch.cat([keys, scales], dim=1)


def random_heads(batch: Batch, active_heads, seed: int = 0):
    """Ascending head ids at random for every row, or None for all heads."""
    if active_heads is None:
        return None
    rng = torch.Generator(DEVICE).manual_seed(seed)
    order = torch.rand(batch.weights.shape, generator=rng, device=DEVICE).argsort(1)
    return order[:, :active_heads].sort(1).values.int()


def integer_inputs(rows: int, heads: int, tokens: int, seed: int) -> Inputs:
    """Queries and keys of small integers, with scales and weights such that every float32 sum is exact.

    So every arithmetic gives the reference's scores to the last bit, and many of them are equal.
    """
    rng = torch.Generator(DEVICE).manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=rng, device=DEVICE).float()

    return Inputs(
        integers(-2, 2, rows, heads, HEAD_DIM).to(torch.float8_e4m3fn),
        integers(-512, 512, rows, heads) / 512,
        integers(-2, 2, tokens, HEAD_DIM).to(torch.float8_e4m3fn),
        2 ** integers(-1, 1, tokens),
        torch.arange(tokens - rows + 1, tokens + 1, device=DEVICE),
    )


def random_inputs(rows: int, heads: int, tokens: int, seed: int) -> Inputs:
    """As `make_inputs` of kind random, made on the GPU: for sizes that would take the CPU seconds."""
    rng = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=rng, device=DEVICE)

    return Inputs(
        (normal(rows, heads, HEAD_DIM) * 100).clamp(-448, 448).to(torch.float8_e4m3fn),
        normal(rows, heads),
        (normal(tokens, HEAD_DIM) * 100).clamp(-448, 448).to(torch.float8_e4m3fn),
        torch.rand(tokens, generator=rng, device=DEVICE) + 0.5,
        torch.arange(tokens - rows + 1, tokens + 1, device=DEVICE),
    )
