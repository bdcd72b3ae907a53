"""topk_prefill selects what the reference selects, up to ties of the float32 scores."""

import pytest
import torch
from hopper import needs_hopper, prefill
from kernel_ops import topk_prefill

from sglang.srt.layers.misa.testing.batches import (
    DEVICE,
    integer_inputs,
    make_batch,
    random_heads,
    random_inputs,
    write_batch,
)
from sglang.srt.layers.misa.testing.inputs import KINDS, pick
from sglang.srt.layers.misa.testing.judge import check_batch, check_selection

pytestmark = needs_hopper

# On these all tokens' scores are one value times their scale, so no rounding can reorder them.
EXACT_KINDS = ("equal", "zeros", "rising", "falling")
RAGGED = [(1, 1), (31, 31), (33, 3000), (32, 2048), (1, 5000), (70, 2100), (3, 130)]


def check(batch, active_heads, topk, exact=False, **options):
    heads = random_heads(batch, active_heads)
    out = prefill(batch, heads, topk, **options)
    check_batch(out, batch, heads, topk, exact=exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_heads", [32, 64])
@pytest.mark.parametrize("active_heads", [1, 8, None])
@pytest.mark.parametrize("topk", [64, 2048])
def test_kinds(kind, num_heads, active_heads, topk):
    batch = make_batch(kind, [(33, 4500), (5, 2100)], num_heads)
    check(batch, active_heads, topk, kind in EXACT_KINDS)


@pytest.mark.parametrize("active_heads", [1, 2, 3, 4, 5, 8, 16, 32, None])
@pytest.mark.parametrize("num_heads", [32, 64])
def test_head_counts(active_heads, num_heads):
    if active_heads == num_heads:
        pytest.skip("all heads are None")
    batch = make_batch("random", [(40, 6000), (9, 2500)], num_heads)
    check(batch, active_heads, 2048)


def around(*counts):
    return sorted({n + i for n in counts for i in (-1, 0, 1)})


@pytest.mark.parametrize(
    "topk, tokens",
    [(64, n) for n in [1, 2, 127, 128, 129, *around(64), *around(4096)]]
    + [(2048, n) for n in [1, *around(64, 2048, 4096, 8192), 20_000]]
    + [(8192, n) for n in [1, 2048, *around(8192), 16_384, 20_000]]
    + [(16_384, n) for n in [*around(16_384), 20_000]],
)
def test_contexts(topk, tokens):
    batch = make_batch("random", [(min(tokens, 33), tokens)], 64)
    check(batch, 8, topk)
    check(batch, None, topk)


@pytest.mark.parametrize("tokens", [65_536, 200_000])
@pytest.mark.parametrize("num_heads, active_heads", [(64, 8), (32, 8), (64, None)])
@pytest.mark.parametrize("topk", [2048, 8192])
def test_long_contexts(tokens, num_heads, active_heads, topk):
    batch = write_batch([random_inputs(33, num_heads, tokens, seed=1)])
    check(batch, active_heads, topk)


@pytest.mark.parametrize("kind", ["rising", "falling", "equal", "zeros", "huge"])
def test_kinds_at_long_contexts(kind):
    batch = make_batch(kind, [(17, 131_072)], 64)
    check(batch, 8, 2048, kind in EXACT_KINDS)


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 63, 64, 65, 100])
def test_row_counts(rows):
    check(make_batch("random", [(rows, 3000)], 64), 8, 2048)


@pytest.mark.parametrize("padded_rows", [0, 1, 45])
@pytest.mark.parametrize("active_heads", [8, None])
@pytest.mark.parametrize("topk", [64, 2048])
def test_ragged(padded_rows, active_heads, topk):
    layout = dict(padded_rows=padded_rows, spare_columns=40)
    batch = make_batch("random", RAGGED, 64, **layout)
    check(batch, active_heads, topk, max_context=5000)
    check(batch, active_heads, topk)


def test_many_sequences():
    specs = [(1 + b % 5, 70 + b * 37 % 900) for b in range(150)]
    check(make_batch("random", specs, 32), 8, 64)


def test_a_whole_prompt():
    """Rows of every length from 1, so lengths below and above topk share tiles."""
    check(write_batch([random_inputs(3000, 64, 3000, seed=2)]), 8, 2048)


def test_lengths_that_jump():
    """Rows need not be neighbours: the selected rows of a prompt, say."""
    lengths = torch.tensor([1, 1, 64, 2047, 2048, 2049, 2049, 7000, 30_000, 30_000])
    inputs = random_inputs(len(lengths), 64, 30_000, seed=3)
    batch = write_batch([inputs._replace(lengths=lengths.to(DEVICE))] * 2)
    check(batch, 8, 2048)


@pytest.mark.parametrize(
    "forced",
    [
        dict(init_tokens=4, local_tokens=0),
        dict(init_tokens=0, local_tokens=100),
        dict(init_tokens=65, local_tokens=129),
        dict(init_tokens=60, local_tokens=60),  # more than the smaller topk
    ],
    ids=str,
)
@pytest.mark.parametrize("topk", [64, 2048])
@pytest.mark.parametrize("active_heads", [8, None])
def test_forced_tokens(forced, topk, active_heads):
    batch = make_batch("random", [(40, 5000), (70, 100), (3, 2050)], 64)
    heads = random_heads(batch, active_heads)
    out = prefill(batch, heads, topk, **forced)
    check_batch(out, batch, heads, topk, **forced)


@pytest.mark.parametrize("forced", [{}, dict(init_tokens=3, local_tokens=5)], ids=str)
def test_exact_scores(forced):
    """Thousands of equal scores, every one of them the reference's to the last bit."""
    sequences = [integer_inputs(40, 64, tokens, seed=tokens) for tokens in (100, 9000)]
    batch = write_batch(sequences)
    for active_heads in (2, 8, None):
        heads = random_heads(batch, active_heads)
        out = prefill(batch, heads, 2048, **forced)
        check_batch(out, batch, heads, 2048, exact=True, **forced)


def test_copies_of_a_key():
    """The k-th score belongs to a key that the context holds many times."""
    inputs = random_inputs(40, 64, 20_000, seed=4)
    classes = torch.randint(40, (20_000,), device=DEVICE)
    keys = pick(inputs.k, classes)
    inputs = inputs._replace(k=keys, k_scale=inputs.k_scale[classes])
    batch = write_batch([inputs])
    for active_heads in (1, 8, None):
        heads = random_heads(batch, active_heads)
        out = prefill(batch, heads, 2048)
        check_selection(out, batch.sequences[0], heads, 2048)


def test_no_buffer_of_rows_by_context():
    """8192 rows at 128K take at most a tenth of the 4.3 GB of their logits; rows all over the chunks are right."""
    inputs = random_inputs(8192, 64, 131_072, seed=5)
    batch = write_batch([inputs])
    heads = random_heads(batch, 8)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = topk_prefill(batch, heads, 2048)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 8192 * 131_072 * 4 / 10
    rows = torch.randperm(8192, device=DEVICE)[:300].sort().values
    check_selection(out[rows], inputs.of_rows(rows), heads[rows], 2048)
