"""topk_decode selects what the reference selects, and what topk_prefill selects for the same rows."""

import random

import pytest
import torch
from hopper import decode, needs_hopper, prefill, routed_decode

from sglang.srt.layers.misa.testing.batches import (
    integer_inputs,
    make_batch,
    random_heads,
    random_inputs,
    write_batch,
)
from sglang.srt.layers.misa.testing.inputs import KINDS
from sglang.srt.layers.misa.testing.judge import check_batch, check_heads

pytestmark = needs_hopper

EXACT_KINDS = ("equal", "zeros", "rising", "falling")
# Of a sequence: those that kernels for up to four and for up to eight rows take, full and not.
ROWS = [1, 2, 3, 4, 5, 6, 8]


def check(batch, active_heads, topk, exact=False, **options):
    heads = random_heads(batch, active_heads)
    out = decode(batch, heads, topk, **options)
    check_batch(out, batch, heads, topk, exact=exact, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_heads", [32, 64])
@pytest.mark.parametrize("active_heads", [1, 8, None])
@pytest.mark.parametrize("rows", [1, 4, 6])
def test_kinds(kind, num_heads, active_heads, rows):
    specs = [(rows, tokens) for tokens in (4500, 100, 2049)]
    batch = make_batch(kind, specs, num_heads)
    for topk in (64, 2048):
        check(batch, active_heads, topk, kind in EXACT_KINDS)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 33, 256])
@pytest.mark.parametrize("num_heads, active_heads", [(64, 8), (32, 8), (64, None)])
def test_batches(rows, batch_size, num_heads, active_heads):
    specs = [(rows, rows + b * 701 % 1500) for b in range(batch_size)]
    check(make_batch("random", specs, num_heads), active_heads, 64)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("active_heads", [1, 4, 8, 16, 32, None])
def test_mixed_lengths(rows, active_heads):
    tokens = [2047, 2048, 2049, 1, 20_000, 63, 64, 65, 8191, 2050, 129, 8192, 8193]
    sequences = [random_inputs(rows, 64, n, seed=n) for n in tokens]
    sequences = [s._replace(lengths=s.lengths.clamp(min=0)) for s in sequences]
    check(write_batch(sequences), active_heads, 2048)


@pytest.mark.parametrize("topk", [64, 2048, 8192])
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_edges_of_topk(topk, rows):
    tokens = [n + i for n in (topk, 2 * topk) for i in range(-1, 5)]
    sequences = [random_inputs(rows, 64, n, seed=n) for n in tokens]
    check(write_batch(sequences), 8, topk)


@pytest.mark.parametrize("rows", [1, 4, 5])
def test_padded_rows_see_nothing(rows):
    """A decode batch is padded with sequences of length 0, whose page table holds anything."""
    sequences = [random_inputs(rows, 64, n, seed=n) for n in (3000, 50, 4000, 2048, 70)]
    for b in (1, 4):
        nothing = torch.zeros_like(sequences[b].lengths)
        sequences[b] = sequences[b]._replace(lengths=nothing)
    batch = write_batch(sequences)
    for topk in (64, 2048):
        check(batch, 8, topk)
        check(batch, None, topk)


def test_an_empty_batch_selects_nothing():
    inputs = random_inputs(2, 64, 1000, seed=1)
    batch = write_batch([inputs._replace(lengths=torch.zeros_like(inputs.lengths))] * 3)
    assert (decode(batch, random_heads(batch, 8), 2048) == -1).all()


@pytest.mark.parametrize("tokens", [65_536, 131_072, 200_000])
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("num_heads, active_heads", [(64, 8), (32, 8), (64, None)])
def test_long_contexts(tokens, rows, num_heads, active_heads):
    sequences = [random_inputs(rows, num_heads, n, seed=n) for n in (tokens, 3000)]
    batch = write_batch(sequences)
    check(batch, active_heads, 2048)
    check(batch, active_heads, 8192)


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("topk", [64, 2048])
@pytest.mark.parametrize("forced", [(4, 0), (0, 100), (65, 129), (60, 60)], ids=str)
def test_forced_tokens(forced, topk, rows):
    init_tokens, local_tokens = forced
    batch = make_batch("random", [(rows, n) for n in (5000, 130, 2050)], 64)
    check(batch, 8, topk, init_tokens=init_tokens, local_tokens=local_tokens)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("active_heads", [2, 8, None])
def test_exact_scores_and_the_same_as_prefill(rows, active_heads):
    tokens = [300, 2048, 9000, 40_000, max(5, rows)]
    batch = write_batch([integer_inputs(rows, 64, n, seed=n) for n in tokens])
    heads = random_heads(batch, active_heads)
    out = decode(batch, heads, 2048)
    check_batch(out, batch, heads, 2048, exact=True)
    assert torch.equal(out, prefill(batch, heads, 2048))


@pytest.mark.parametrize("topk", [64, 2048])
@pytest.mark.parametrize("rows", [3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("active_heads", [1, 8, 16, 32, None])
def test_rows_of_any_lengths(rows, active_heads, topk):
    """Each row has its own length, before and behind the edges of pages and of topk; the first ones may need no selection."""
    edges = [0, 1, 63, 64, 65, topk - 1, topk, topk + 1, 2 * topk, 8191, 8192, 9000]
    rng = random.Random(rows)
    sequences = []
    for b in range(9):
        inputs = integer_inputs(rows, 64, max(edges), seed=b)
        lengths = sorted(rng.choices(edges, k=rows))
        sequences.append(inputs._replace(lengths=inputs.lengths.new_tensor(lengths)))
    batch = write_batch(sequences)
    heads = random_heads(batch, active_heads)
    out = decode(batch, heads, topk)
    check_batch(out, batch, heads, topk, exact=True)
    assert torch.equal(out, prefill(batch, heads, topk))


def test_rows_alone_or_together():
    """The rows of a prompt's end, chunked in any way: the same selection. Scores are exact, so no tie hides a fault."""
    whole = integer_inputs(120, 64, 6000, seed=6)

    def part(first, last):
        rows = slice(first, last)
        q, weights, lengths = whole.q[rows], whole.weights[rows], whole.lengths[rows]
        end = int(lengths[-1])
        return type(whole)(q, weights, whole.k[:end], whole.k_scale[:end], lengths)

    heads = random_heads(write_batch([whole]), 8)
    expected = prefill(write_batch([whole]), heads, 2048)
    for rows in ROWS:
        parts = [part(first, first + rows) for first in range(0, 120, rows)]
        assert torch.equal(decode(write_batch(parts), heads, 2048), expected)
    parts = [part(0, 1), part(1, 8), part(8, 120)]
    assert torch.equal(prefill(write_batch(parts), heads, 2048), expected)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("num_heads", [32, 64])
@pytest.mark.parametrize(
    "options", [{}, {"init_tokens": 3, "output": "slots"}], ids=str
)
def test_routing_and_selection_in_one(rows, num_heads, options):
    """The reference's heads, and the selection of these, for any number of sequences of any length."""
    batches = [[131_072], [70_000] * 8, [3000 * b % 20_000 for b in range(200)]]
    for tokens in batches:
        sequences = [random_inputs(rows, num_heads, n + rows, seed=n) for n in tokens]
        batch = write_batch(sequences)
        heads, out = routed_decode(batch, 8, 1024, 2048, **options)
        check_heads(heads, batch, 8, 1024)
        assert torch.equal(out, decode(batch, heads, 2048, **options))


def check_routing(batch, active_heads, block_size):
    heads, out = routed_decode(batch, active_heads, block_size, 64)
    check_heads(heads, batch, active_heads, block_size)
    assert torch.equal(out, decode(batch, heads, 64))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("num_heads", [32, 64])
@pytest.mark.parametrize("block_size", [64, 128, 1024, 2048])
def test_routing(block_size, num_heads, rows):
    """Rows before and behind the edges of pages and blocks, in one sequence and in many."""
    lengths = [0, 1, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 2047, 2048, 2049]
    lengths += [3000, 16_384, 16_449, 131_072]
    sequences = [random_inputs(rows, num_heads, max(n, rows), seed=n) for n in lengths]
    sequences = [
        s._replace(lengths=(s.lengths - max(rows - n, 0)).clamp(min=0))
        for s, n in zip(sequences, lengths)
    ]
    check_routing(write_batch(sequences), 8, block_size)
    check_routing(write_batch(sequences[-1:]), 8, block_size)


@pytest.mark.parametrize(
    "ends",
    [
        (0, 0, 64, 5000),
        (63, 64, 1088, 1089),
        (0, 1, 70_000, 131_071),
        (0, 63, 64, 1087, 1088),
        (1, 64, 127, 128, 2047, 2048, 4999, 131_071),
    ],
    ids=str,
)
@pytest.mark.parametrize("block_size", [64, 1024, 2048])
@pytest.mark.parametrize("active_heads", [1, 8, 32])
def test_routing_of_rows_far_apart(ends, block_size, active_heads):
    """The rows of a sequence may see different complete blocks, and each a partial one of its own."""
    one = random_inputs(len(ends), 64, max(ends), seed=1)
    one = one._replace(lengths=torch.tensor(ends, device=one.q.device))
    other = random_inputs(len(ends), 64, 3000, seed=2)
    check_routing(write_batch([one, other]), active_heads, block_size)


@pytest.mark.parametrize("rows", [2, 6])
@pytest.mark.parametrize("batch_size", [1, 33, 34, 66, 67, 132, 133, 300])
def test_routing_of_any_number_of_sequences(batch_size, rows):
    specs = [(rows, rows + b * 1701 % 9000) for b in range(batch_size)]
    check_routing(make_batch("random", specs, 64), 8, 1024)


@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_routing_of_kinds(kind, rows):
    specs = [(rows, 5000), (rows, 70), (rows, 3)]
    check_routing(make_batch(kind, specs, 64), 8, 128)
