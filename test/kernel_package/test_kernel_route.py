"""route picks the reference's heads, up to ties of the estimates."""

import pytest
import torch
from hopper import needs_hopper, route, routed_decode

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.testing.batches import (
    make_batch,
    random_inputs,
    write_batch,
)
from sglang.srt.layers.misa.testing.inputs import KINDS
from sglang.srt.layers.misa.testing.judge import check_form, check_heads

pytestmark = needs_hopper

RAGGED = [(1, 1), (31, 40), (33, 2100), (64, 64), (1, 4000), (100, 1100), (5, 5000)]


def check(batch, active_heads, block_size):
    heads = route(batch, active_heads, block_size)
    check_heads(heads, batch, active_heads, block_size)
    return heads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_heads", [32, 64])
@pytest.mark.parametrize("block_size", [64, 1024])
def test_kinds(kind, num_heads, block_size):
    batch = make_batch(kind, [(130, 2500), (3, 700)], num_heads)
    heads = check(batch, 8, block_size)
    if kind == "twins":
        # Pairs of heads have the same estimate: the lower one goes first.
        chosen = reference.members(heads.long(), num_heads)
        assert not (chosen[:, 1::2] & ~chosen[:, ::2]).any()


@pytest.mark.parametrize("active_heads", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("num_heads", [32, 64])
@pytest.mark.parametrize("block_size", [64, 128, 1024, 2048])
def test_ragged(active_heads, num_heads, block_size):
    check(make_batch("random", RAGGED, num_heads), active_heads, block_size)


@pytest.mark.parametrize("block_size", [64, 128, 1024, 2048])
def test_page_and_block_edges(block_size):
    lengths = [0, 1, 63, 64, 65, 127, 128, 129]
    for blocks in (1, 2, 3):
        lengths += [blocks * block_size + i for i in (-65, -64, -1, 0, 1, 63, 64, 65)]
    lengths = sorted({max(0, length) for length in lengths})
    # The same lengths as rows of one sequence, and as sequences of one row.
    inputs = random_inputs(len(lengths), 64, max(lengths), seed=1)
    inputs = inputs._replace(lengths=torch.tensor(lengths, device=inputs.q.device))
    single = [(1, max(1, length)) for length in lengths]
    check(write_batch([inputs]), 8, block_size)
    check(make_batch("random", single, 64), 8, block_size)


@pytest.mark.parametrize("num_heads", [32, 64])
def test_rows_that_see_no_complete_page_get_the_first_heads(num_heads):
    inputs = random_inputs(63, num_heads, 63, seed=2)
    heads = check(write_batch([inputs]), 8, 1024)
    assert (heads == torch.arange(8, device=heads.device)).all()


@pytest.mark.parametrize("batch_size", [1, 7, 256])
@pytest.mark.parametrize("num_heads", [32, 64])
def test_decode(batch_size, num_heads):
    specs = [(1, 1 + b * 397 % 3000) for b in range(batch_size)]
    check(make_batch("random", specs, num_heads), 8, 1024)


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_verify(rows):
    specs = [(rows, 62 + 131 * b) for b in range(20)]
    check(make_batch("random", specs, 64), 8, 128)


@pytest.mark.parametrize("block_size", [64, 1024])
def test_long_contexts(block_size):
    long = random_inputs(33, 64, 200_000, seed=3)
    check(write_batch([long, random_inputs(7, 64, 65_536, seed=4)]), 8, block_size)


def test_padded_rows_disturb_nobody():
    batch = make_batch("random", RAGGED, 64, padded_rows=37)
    heads = route(batch, 8, 1024)
    check_heads(heads, batch, 8, 1024)


def test_a_row_does_not_see_later_pages():
    """The heads of a row are those of a sequence that ends with it."""
    whole = random_inputs(700, 64, 700, seed=5)
    routed = route(write_batch([whole]), 8, 128)
    for row in (63, 64, 127, 400, 699):
        alone = whole._replace(
            q=whole.q[row : row + 1],
            weights=whole.weights[row : row + 1],
            k=whole.k[: row + 1],
            k_scale=whole.k_scale[: row + 1],
            lengths=whole.lengths[row : row + 1],
        )
        check_heads(routed[row : row + 1], write_batch([alone]), 8, 128)


def route_of_decode(batch, active_heads, block_size):
    """The heads of `route_topk_decode`; what it selects by them has to be whole too."""
    heads, out = routed_decode(batch, active_heads, block_size, 64)
    check_form(out, batch.lengths.clamp(max=64))
    assert (out < batch.lengths[:, None]).all()
    return heads


@pytest.mark.parametrize("op", [route, route_of_decode])
@pytest.mark.parametrize("num_heads", [32, 64])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("first, step", [(0, 1), (1, 2), (20, 40)])
def test_gates_that_are_not_finite(op, num_heads, value, first, step):
    """Exactly as many heads as asked for, and the rows around these get their own."""
    batch = make_batch("random", [(4, 2100), (4, 700), (4, 1000), (4, 30)], num_heads)
    weights = batch.weights.clone()
    weights[::3, first::step] = float(value)
    heads = op(batch._replace(weights=weights), 8, 128)
    check_form(heads, torch.full_like(batch.lengths, 8))
    assert (heads < num_heads).all()
    finite = torch.arange(len(heads), device=heads.device) % 3 > 0
    assert torch.equal(heads[finite], op(batch, 8, 128)[finite])
    if value == "nan" and len(range(first, num_heads, step)) >= 8:
        # An estimate that is no number is above all numbers; without a complete page all estimates are zero.
        best = torch.arange(first, num_heads, step, device=heads.device)[:8]
        sees_a_page = batch.lengths >= 64
        assert (heads[~finite & sees_a_page] == best).all()
        assert (heads[~sees_a_page] == torch.arange(8, device=heads.device)).all()
