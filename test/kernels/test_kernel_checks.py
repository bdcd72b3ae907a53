"""The checkers accept what the reference selects, and nothing that is wrong."""

import kernel_batches
import pytest
import torch
from kernel_batches import (
    make_batch,
    make_inputs,
    random_heads,
    random_inputs,
    write_batch,
)
from kernel_checks import check_batch, check_heads, routed

from sglang.srt.layers.misa import reference

TOPK = 64
SPECS = [(5, 700), (3, 66), (20, 20), (1, 64)]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(kernel_batches, "DEVICE", "cpu")


def select(batch, heads, topk=TOPK, candidates=None, **forced):
    out = torch.full((len(batch.q), topk), -1, dtype=torch.int32)
    for sequence, rows in batch.rows():
        own = None if heads is None else heads[rows]
        q, weights = routed(sequence.q, sequence.weights, own)
        scores = reference.token_scores(q, weights, sequence.k, sequence.k_scale)
        scores = reference.force(scores, sequence.lengths, **forced)
        allowed = reference.visible(sequence.lengths, len(sequence.k))
        if candidates is not None:
            allowed &= reference.members(candidates[rows].long(), len(sequence.k))
        out[rows] = reference.top_positions(scores, allowed, topk).int()
    return out


def best_heads(batch, active_heads, block_size):
    out = torch.arange(active_heads, dtype=torch.int32).repeat(len(batch.q), 1)
    for sequence, rows in batch.rows():
        q, weights, k, k_scale, lengths = sequence
        means = reference.page_means(k, k_scale)
        heads = reference.route(q, weights, means, lengths, active_heads, block_size)
        out[rows] = heads.int()
    return out


@pytest.mark.parametrize("kind", kernel_batches.KINDS)
@pytest.mark.parametrize("active_heads", [1, 8, None])
@pytest.mark.parametrize("forced", [{}, dict(init_tokens=3, local_tokens=70)], ids=str)
def test_the_reference_passes(kind, active_heads, forced):
    batch = make_batch(kind, SPECS, 32, padded_rows=2)
    heads = random_heads(batch, active_heads)
    out = select(batch, heads, **forced)
    check_batch(out, batch, heads, TOPK, **forced)
    check_batch(out, batch, heads, TOPK, exact=True, **forced)
    if active_heads is not None:
        heads = best_heads(batch, active_heads, 128)
        check_heads(heads, batch, active_heads, 128)


def worst_for_best(out, batch):
    """The position that scores worst in row 0 instead of the one that scores best."""
    sequence = batch.sequences[0]
    scores = reference.token_scores(
        sequence.q[:1], sequence.weights[:1], sequence.k, sequence.k_scale
    )[0, : int(sequence.lengths[0])]
    row = out[0].tolist()
    row.remove(int(scores.argmax()))
    out[0] = torch.tensor(sorted(row + [int(scores.argmin())]))


def swapped(out, batch):
    out[0, :2] = out[0, :2].flip(0)


def twice(out, batch):
    out[0, 1] = out[0, 0]


def missing(out, batch):
    out[0, -1] = -1


def hole(out, batch):
    out[0, 5] = -1


def padding_first(out, batch):
    """In a row that has fewer positions than topk."""
    out[12] = out[12].roll(1)


def padding_of_another_value(out, batch):
    out[12, -1] = -2


def one_too_many(out, batch):
    """A position that its row does not see yet."""
    length = int(batch.lengths[12])
    out[12, length] = length


def behind_the_row(out, batch):
    out[0, -1] = int(batch.lengths[0])


def unwritten(out, batch):
    out[3] = 2**31 - 1


def in_a_padded_row(out, batch):
    out[-1, 0] = 0


FAULTS = (
    worst_for_best,
    swapped,
    twice,
    missing,
    hole,
    padding_first,
    padding_of_another_value,
    one_too_many,
    behind_the_row,
    unwritten,
    in_a_padded_row,
)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("exact", [True, False])
def test_faults_are_found(fault, exact):
    batch = make_batch("random", SPECS, 32, padded_rows=2)
    out = select(batch, None)
    fault(out, batch)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        check_batch(out, batch, None, TOPK, exact=exact)


def test_a_neighbour_in_rank_is_found():
    """The (k+1)-th position instead of the k-th: their scores differ little, but more than rounding explains."""
    batch = write_batch([random_inputs(8, 32, 300, seed=1)])
    sequence = batch.sequences[0]
    scores = reference.token_scores(
        sequence.q, sequence.weights, sequence.k, sequence.k_scale
    )
    out = select(batch, None)
    order = scores[0, : int(sequence.lengths[0])].argsort(descending=True)
    row = out[0].tolist()
    row.remove(int(order[TOPK - 1]))
    out[0] = torch.tensor(sorted(row + [int(order[TOPK])]))
    with pytest.raises(AssertionError, match="times the tolerance"):
        check_batch(out, batch, None, TOPK)


def equal_in_turns():
    """200 tokens that hold two keys in turns."""
    inputs = random_inputs(1, 32, 200, seed=1)
    classes = torch.arange(200) % 2
    keys = inputs.k.view(torch.uint8)[classes].view(torch.float8_e4m3fn)
    return inputs._replace(k=keys, k_scale=inputs.k_scale[classes]), classes


@pytest.mark.parametrize("kind", ["zeros", "two keys", "forced", "exact"])
def test_a_tie_for_the_higher_position_is_found(kind):
    inputs, classes = equal_in_turns()
    if kind == "zeros":
        inputs = make_inputs("zeros", 1, 32, 200)
    options = {
        "zeros": {},
        "two keys": dict(classes=classes),
        "forced": dict(init_tokens=100),
        "exact": dict(exact=True),
    }[kind]
    batch = write_batch([inputs])
    forced = options if kind == "forced" else {}
    out = select(batch, None, **forced)
    check_batch(out, batch, None, TOPK, **options)
    # The last one that was chosen gives way to an equal one behind it.
    out[0, -1] += 2
    with pytest.raises(AssertionError):
        check_batch(out, batch, None, TOPK, **options)


def test_candidates_bound_the_selection():
    batch = make_batch("random", SPECS, 32)
    candidates = select(batch, random_heads(batch, 4), 128)
    out = select(batch, None, candidates=candidates)
    check_batch(out, batch, None, TOPK, candidates=candidates)
    with pytest.raises(AssertionError):
        check_batch(select(batch, None), batch, None, TOPK, candidates=candidates)


@pytest.mark.parametrize("fault", ["another", "order", "twice", "none", "too high"])
def test_faults_in_heads_are_found(fault):
    batch = make_batch("random", [(4, 700)], 32)
    heads = best_heads(batch, 8, 128)
    if fault == "another":
        other = next(j for j in range(32) if j not in heads[0].tolist())
        heads[0] = torch.tensor(sorted(heads[0].tolist()[1:] + [other]))
    elif fault == "order":
        heads[0] = heads[0].flip(0)
    elif fault == "twice":
        heads[0, 1] = heads[0, 0]
    elif fault == "none":
        heads[0, 0] = -1
    else:
        heads[0, -1] = 32
    with pytest.raises((AssertionError, RuntimeError)):
        check_heads(heads, batch, 8, 128)


def test_heads_that_contribute_nothing_are_taken_from_the_front():
    batch = make_batch("zeros", [(1, 200)], 32)
    heads = torch.arange(8, dtype=torch.int32)[None]
    check_heads(heads, batch, 8, 64)
    with pytest.raises(AssertionError):
        check_heads(heads + 1, batch, 8, 64)
