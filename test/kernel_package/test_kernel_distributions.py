"""Distributions on which a guessed threshold is wrong: the selection is still the reference's, ties and all."""

import pytest
import torch
from hopper import decode, needs_hopper, prefill

from sglang.srt.layers.misa.testing.batches import write_batch
from sglang.srt.layers.misa.testing.judge import check_batch
from sglang.srt.layers.misa.testing.score_inputs import DISTRIBUTIONS, distributed

pytestmark = needs_hopper


def first_heads(batch, active_heads):
    """The heads that have a weight are the first two."""
    if active_heads is None:
        return None
    heads = torch.arange(active_heads, dtype=torch.int32, device=batch.q.device)
    return heads.repeat(len(batch.q), 1)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "tokens, topk", [(4100, 64), (20_000, 2048), (70_000, 2048), (20_000, 8192)]
)
def test_prefill(name, tokens, topk):
    sequences = [distributed(name, 33, 64, tokens, topk)]
    sequences.append(distributed(name, 5, 64, topk + 77, topk, seed=1))
    batch = write_batch(sequences)
    for active_heads in (1, 8, None):
        heads = first_heads(batch, active_heads)
        out = prefill(batch, heads, topk)
        check_batch(out, batch, heads, topk, exact=True)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("rows_per_seq", [1, 4, 8])
@pytest.mark.parametrize("tokens, topk", [(4100, 64), (20_000, 2048), (70_000, 2048)])
def test_decode(name, rows_per_seq, tokens, topk):
    sequences = [
        distributed(name, rows_per_seq, 32, tokens - 600 * b, topk, seed=b)
        for b in range(3)
    ]
    batch = write_batch(sequences)
    for active_heads in (1, 8, None):
        heads = first_heads(batch, active_heads)
        out = decode(batch, heads, topk)
        check_batch(out, batch, heads, topk, exact=True)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_one_sequence_fills_the_chip(name):
    batch = write_batch([distributed(name, 2, 64, 131_072, 2048)])
    heads = first_heads(batch, 8)
    check_batch(decode(batch, heads, 2048), batch, heads, 2048, exact=True)
