"""The judge accepts what the reference selects, up to rounding, and nothing that is wrong."""

import pytest
import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.testing import judge
from sglang.srt.layers.misa.testing.batches import (
    DEVICE,
    WRONG,
    make_batch,
    positions_from_ragged,
    positions_from_slots,
    random_heads,
    random_inputs,
    write_batch,
)
from sglang.srt.layers.misa.testing.inputs import (
    DATA_KINDS,
    KINDS,
    Inputs,
    fp8,
    make_inputs,
    pick,
)
from sglang.srt.layers.misa.testing.judge import (
    ERROR,
    SharedHead,
    WrongSelection,
    check_batch,
    check_heads,
    check_selection,
    possible_candidates,
)

TOPK = 64
SPECS = [(5, 700), (3, 66), (20, 20), (1, 64)]


def scores_of(sequence, heads=None, shared=None, **forced):
    q, weights = judge.routed(sequence.q, sequence.weights, heads)
    scores = reference.token_scores(
        q, weights, sequence.k, sequence.k_scale, *(shared or ())
    )
    return reference.force(scores, sequence.lengths, **forced)


def select(batch, heads, topk=TOPK, candidates=None, shared=None, **forced):
    """What the reference selects for a batch -> int32 [T, topk]."""
    out = torch.full((len(batch.q), topk), -1, dtype=torch.int32, device=DEVICE)
    for sequence, rows in batch.rows():
        own = None if heads is None else heads[rows]
        extra = None if shared is None else shared.of_rows(rows)
        scores = scores_of(sequence, own, extra, **forced)
        allowed = reference.visible(sequence.lengths, len(sequence.k))
        if candidates is not None:
            allowed &= reference.members(candidates[rows].long(), len(sequence.k))
        out[rows] = reference.top_positions(scores, allowed, topk).int()
    return out


def best_heads(batch, active_heads, block_size):
    out = torch.arange(active_heads, dtype=torch.int32, device=DEVICE)
    out = out.repeat(len(batch.q), 1)
    for sequence, rows in batch.rows():
        q, weights, k, k_scale, lengths = sequence
        means = reference.page_means(k, k_scale)
        heads = reference.route(q, weights, means, lengths, active_heads, block_size)
        out[rows] = heads.int()
    return out


def random_shared(rows, seed=0):
    """A shared head of every row, with scales that are powers of two."""
    rng = torch.Generator(DEVICE).manual_seed(seed)
    query = torch.randn(rows, 128, generator=rng, device=DEVICE) * 100
    scale = 2.0 ** torch.randint(-3, 3, (rows,), generator=rng, device=DEVICE)
    return SharedHead(fp8(query), scale)


def exchange(out, row, leave, enter):
    """Another position in a row of a selection, in place."""
    kept = [p for p in out[row].tolist() if p not in (leave, -1)]
    new = sorted(kept + [enter])
    out[row] = torch.tensor(new + [-1] * (out.shape[1] - len(new)))


@pytest.mark.parametrize("kind", dict.fromkeys(KINDS + DATA_KINDS))
@pytest.mark.parametrize("active_heads", [1, 8, None])
@pytest.mark.parametrize("forced", [{}, dict(init_tokens=3, local_tokens=70)], ids=str)
def test_the_reference_passes(kind, active_heads, forced):
    batch = make_batch(kind, SPECS, 32, padded_rows=2)
    heads = random_heads(batch, active_heads)
    out = select(batch, heads, **forced)
    assert check_batch(out, batch, heads, TOPK, **forced) <= 4 * ERROR
    check_batch(out, batch, heads, TOPK, exact=True, **forced)
    if active_heads is not None:
        heads = best_heads(batch, active_heads, 128)
        assert check_heads(heads, batch, active_heads, 128) <= 4 * ERROR


@pytest.mark.parametrize("active_heads", [1, 7])
@pytest.mark.parametrize("kind", ["random", "equal", "few", "zeros"])
def test_the_reference_with_a_shared_head_passes(kind, active_heads):
    batch = make_batch(kind, SPECS, 32)
    heads = random_heads(batch, active_heads)
    shared = random_shared(len(batch.q))
    out = select(batch, heads, shared=shared)
    options = dict(shared=shared)
    assert check_batch(out, batch, heads, TOPK, **options) <= 4 * ERROR
    check_batch(out, batch, heads, TOPK, exact=True, **options)
    if kind != "equal":  # the shared head chooses
        with pytest.raises(WrongSelection):
            check_batch(select(batch, heads), batch, heads, TOPK, **options)


def test_the_shared_head_has_no_relu():
    """Its negative products count: of two tokens that no head fires on, the less negative one is selected."""
    k = fp8(torch.tensor([-4.0, -1.0, -2.0])[:, None].expand(-1, 128))
    one = fp8(torch.ones(1, 128))
    sequence = Inputs(
        one[:, None].contiguous(),
        torch.ones(1, 1),
        k,
        torch.ones(3),
        torch.tensor([3]),
    )
    shared = SharedHead(one, torch.tensor([0.5]))
    assert scores_of(sequence, None, shared).tolist() == [[-256, -64, -128]]
    check_selection(torch.tensor([[1, 2]]), sequence, None, 2, shared=shared)
    with pytest.raises(WrongSelection, match="a lower score"):
        check_selection(torch.tensor([[0, 1]]), sequence, None, 2, shared=shared)
    # Without it all three score 0, and the first two win.
    check_selection(torch.tensor([[0, 1]]), sequence, None, 2)


def worst_for_best(out, batch):
    """The position that scores worst in row 0 instead of the one that scores best."""
    sequence = batch.sequences[0]
    scores = scores_of(sequence)[0, : int(sequence.lengths[0])]
    exchange(out, 0, int(scores.argmax()), int(scores.argmin()))


def swapped(out, batch):
    out[0, :2] = out[0, :2].flip(0)


def reversed_row(out, batch):
    out[0] = out[0].flip(0)


def twice(out, batch):
    out[0, 1] = out[0, 0]


def twice_instead_of_the_last(out, batch):
    """The one that is missing then is the worst of all that were due, and none is better that was left out."""
    sequence = batch.sequences[0]
    scores = scores_of(sequence)[0, out[0].long()]
    worst = int(scores.argmin())
    out[0, worst] = out[0, worst - 1] if worst else out[0, 1]


def missing(out, batch):
    out[0, -1] = -1


def hole(out, batch):
    out[0, 5] = -1


def hole_in_a_short_row(out, batch):
    """-1 in the middle, and the last position behind it."""
    out[25, 6:19] = out[25, 5:18].clone()
    out[25, 5] = -1


def short_row(out, batch):
    """A row that sees fewer tokens than topk, and selected all but one of them."""
    last = int((out[12] >= 0).sum()) - 1
    out[12, last] = -1


def empty_row(out, batch):
    out[2] = -1


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


def behind_the_sequence(out, batch):
    out[0, -1] = 5000


def negative(out, batch):
    out[0, 0] = -7


def unwritten(out, batch):
    out[3] = 2**31 - 1


def of_another_row(out, batch):
    """Two rows have each other's selection."""
    out[[0, 4]] = out[[4, 0]]


def of_another_sequence(out, batch):
    """Right positions, of another sequence."""
    out[5:8] = out[0:3]


def in_a_padded_row(out, batch):
    out[-1, 0] = 0


FAULTS = (
    worst_for_best,
    swapped,
    reversed_row,
    twice,
    twice_instead_of_the_last,
    missing,
    hole,
    hole_in_a_short_row,
    short_row,
    empty_row,
    padding_first,
    padding_of_another_value,
    one_too_many,
    behind_the_row,
    behind_the_sequence,
    negative,
    unwritten,
    of_another_row,
    of_another_sequence,
    in_a_padded_row,
)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("exact", [True, False])
def test_faults_are_found(fault, exact):
    batch = make_batch("random", SPECS, 32, padded_rows=2)
    out = select(batch, None)
    right = out.clone()
    fault(out, batch)
    assert not torch.equal(out, right)
    with pytest.raises(WrongSelection):
        check_batch(out, batch, None, TOPK, exact=exact)


@pytest.mark.parametrize("what", ["columns", "rows", "int64"])
def test_another_shape_or_type_is_refused(what):
    batch = make_batch("random", SPECS, 32)
    out = select(batch, None)
    wrong = {"columns": out[:, :-1], "rows": out[1:], "int64": out.long()}[what]
    with pytest.raises(WrongSelection, match="no selection"):
        check_batch(wrong, batch, None, TOPK)


@pytest.mark.parametrize("active_heads, shared", [(None, False), (7, False), (7, True)])
def test_a_neighbour_in_rank_is_found(active_heads, shared):
    """The (k+1)-th position instead of the k-th: their scores differ little, but more than rounding explains."""
    batch = write_batch([random_inputs(8, 32, 300, seed=1)])
    heads = random_heads(batch, active_heads)
    shared = random_shared(8) if shared else None
    out = select(batch, heads, shared=shared)
    (sequence,) = batch.sequences
    scores = scores_of(sequence, heads, shared)[0, : int(sequence.lengths[0])]
    order = scores.argsort(descending=True)
    exchange(out, 0, int(order[TOPK - 1]), int(order[TOPK]))
    with pytest.raises(WrongSelection, match="times the tolerance") as failure:
        check_batch(out, batch, heads, TOPK, shared=shared)
    gap = scores[order[TOPK - 1]] - scores[order[TOPK]]
    assert failure.value.error == pytest.approx(float(gap / scores.abs().max()), 0.01)


def test_rounding_passes_and_more_does_not():
    """Scores that are off by as much as the tensor cores may be change places; by 50 times that, they must not."""
    inputs = make_inputs("random", rows=40, heads=16, tokens=3000, device=DEVICE)
    torch.manual_seed(0)
    noise = 2 * torch.rand(3000, device=DEVICE) - 1

    def selected(size):
        noisy = inputs._replace(k_scale=inputs.k_scale * (1 + size * noise))
        return reference.dsa(*noisy, TOPK)

    exact = selected(0)
    assert not torch.equal(selected(ERROR), exact)
    assert 0 < check_selection(selected(ERROR), inputs, None, TOPK) < 2 * ERROR
    with pytest.raises(WrongSelection, match="not the reference's"):
        check_selection(selected(ERROR), inputs, None, TOPK, exact=True)
    with pytest.raises(WrongSelection, match="a lower score"):
        check_selection(selected(50 * ERROR), inputs, None, TOPK)


def in_turns():
    """200 tokens that hold two keys in turns."""
    inputs = random_inputs(1, 32, 200, seed=1)
    classes = torch.arange(200, device=DEVICE) % 2
    return inputs._replace(k=pick(inputs.k, classes), k_scale=inputs.k_scale[classes])


@pytest.mark.parametrize("kind", ["zeros", "two keys", "forced", "exact"])
def test_a_tie_for_the_higher_position_is_found(kind):
    inputs = in_turns()
    if kind == "zeros":
        inputs = make_inputs("zeros", 1, 32, 200, device=DEVICE)
    forced = dict(init_tokens=100) if kind == "forced" else {}
    options = dict(exact=kind == "exact", **forced)
    batch = write_batch([inputs])
    out = select(batch, None, **forced)
    check_batch(out, batch, None, TOPK, **options)
    # The last one that was chosen gives way to an equal one behind it.
    out[0, -1] += 2
    with pytest.raises(WrongSelection, match="tie" if kind != "exact" else None):
        check_batch(out, batch, None, TOPK, **options)
    if kind in ("zeros", "two keys"):  # a selection that breaks ties as it likes
        assert check_batch(out, batch, None, TOPK, ties=False) < ERROR


@pytest.mark.parametrize("kind", ["equal", "few", "runs", "zeros"])
def test_a_plateau_is_taken_from_its_front(kind):
    """Many rows whose k-th score is shared; any of a plateau's positions do for a judge of sets, the first for ours."""
    batch = make_batch(kind, [(6, 3000)], 32)
    out = select(batch, None)
    check_batch(out, batch, None, TOPK)
    (sequence,) = batch.sequences
    scores = scores_of(sequence)
    kth = scores[0, out[0].long()].min()
    plateau = (scores[0, : int(sequence.lengths[0])] == kth).nonzero()[:, 0].tolist()
    chosen = out[0].tolist()
    last = max(p for p in plateau if p in chosen)
    behind = [p for p in plateau if p not in chosen]
    assert behind
    exchange(out, 0, last, behind[-1])
    with pytest.raises(WrongSelection, match="tie"):
        check_batch(out, batch, None, TOPK)
    assert check_batch(out, batch, None, TOPK, ties=False) <= 4 * ERROR


def test_candidates_bound_the_selection():
    batch = make_batch("random", SPECS, 32)
    candidates = select(batch, random_heads(batch, 4), 128)
    out = select(batch, None, candidates=candidates)
    check_batch(out, batch, None, TOPK, candidates=candidates)
    with pytest.raises(WrongSelection):
        check_batch(select(batch, None), batch, None, TOPK, candidates=candidates)


def test_candidates_that_nobody_wrote_down():
    """Re-ranked: the heads and the result are known, what was between them is not."""
    batch = make_batch("random", SPECS, 32)
    heads = random_heads(batch, 4)
    candidates = select(batch, heads, 128)
    out = select(batch, None, candidates=candidates)
    check_batch(out, batch, heads, TOPK, rerank_candidates=128)
    for wrong in (select(batch, None), select(batch, heads)):
        with pytest.raises(WrongSelection):
            check_batch(wrong, batch, heads, TOPK, rerank_candidates=128)


def test_possible_candidates():
    scores = torch.tensor([[9.0, 7.0, 5.0, 4.9, 1.0, 0.0]])
    allowed = torch.tensor([[True, True, True, True, True, False]])
    bounds = scores - 0.1, scores + 0.1
    may, must = possible_candidates(*bounds, allowed, 3)
    assert may.tolist() == [[True, True, True, True, False, False]]
    assert must.tolist() == [[True, True, False, False, False, False]]
    # Where there are no more than that, all are candidates.
    may, must = possible_candidates(*bounds, allowed, 5)
    assert torch.equal(may, allowed) and torch.equal(must, allowed)


class TestNan:
    """A key that is NaN: the rows that see it have no order, the others have."""

    def make(self):
        inputs = random_inputs(6, 32, 300, seed=1)
        k = inputs.k.clone()
        k.view(torch.uint8)[297, 5] = 127  # e4m3's NaN, seen by the last three rows
        inputs = inputs._replace(k=k)
        out = reference.dsa(*random_inputs(6, 32, 300, seed=1), TOPK)
        return inputs, out

    def test_any_visible_positions_in_the_right_form_will_do(self):
        inputs, out = self.make()
        check_selection(out, inputs, None, TOPK, nan_rows=True)
        out[5] = torch.arange(TOPK)
        check_selection(out, inputs, None, TOPK, nan_rows=True)

    def test_they_are_refused_where_nobody_expects_them(self):
        inputs, out = self.make()
        with pytest.raises(WrongSelection, match="not a number.*3 in all"):
            check_selection(out, inputs, None, TOPK)
        check_selection(out[:3], inputs.of_rows(slice(0, 3)), None, TOPK)

    @pytest.mark.parametrize("value", ["twice", 300, 299, -2, -1])
    def test_faults(self, value):
        inputs, out = self.make()
        row = 4 if value == 299 else 5
        out[row, -1] = out[row, -2] if value == "twice" else value
        with pytest.raises(WrongSelection):
            check_selection(out, inputs, None, TOPK, nan_rows=True)

    def test_the_other_rows_are_judged(self):
        inputs, out = self.make()
        out[0, 0] += 1
        with pytest.raises(WrongSelection):
            check_selection(out, inputs, None, TOPK, nan_rows=True)

    def test_a_query(self):
        inputs = random_inputs(2, 32, 300, seed=1)
        out = reference.dsa(*inputs, TOPK)
        inputs.q.view(torch.uint8)[0, 3, 7] = 255
        with pytest.raises(WrongSelection, match="not a number"):
            check_selection(out, inputs, None, TOPK)
        check_selection(out, inputs, None, TOPK, nan_rows=True)


class TestForms:
    """Slots and ragged indices are positions again, and what is none of the row's is wrong."""

    def make(self):
        batch = make_batch("random", [(2, 700), (2, 40), (2, 130)], 32)
        positions = select(batch, None)
        sequence = batch.row_sequence()
        pages = batch.page_table[sequence]
        pages = pages.gather(1, positions.clamp(min=0).long() // 64)
        slots = (pages * 64 + positions % 64).where(positions >= 0, -1).int()
        starts = torch.tensor([0, 700, 740], device=DEVICE)[sequence]
        ragged = (positions + starts[:, None]).where(positions >= 0, -1).int()
        return batch, positions, slots, ragged, starts

    def test_right_ones(self):
        batch, positions, slots, ragged, starts = self.make()
        assert torch.equal(positions_from_slots(batch, slots), positions.long())
        assert torch.equal(positions_from_ragged(ragged, starts), positions.long())

    @pytest.mark.parametrize(
        "fault",
        [
            "another sequence",
            "a free page",
            "behind",
            "negative",
            "positions",
            "ragged",
        ],
    )
    def test_wrong_slots(self, fault):
        batch, positions, slots, ragged, _ = self.make()
        num_slots = len(batch.index_k) * 64
        if fault == "another sequence":
            slots[0] = slots[4]
        elif fault == "a free page":
            used = {int(p) for b in range(3) for p in batch.pages(b)}
            free = next(p for p in range(len(batch.index_k)) if p not in used)
            slots[0, 0] = free * 64
        elif fault == "behind":
            slots[0, 0] = num_slots
        elif fault == "negative":
            slots[0, 0] = -3
        else:
            slots = {"positions": positions, "ragged": ragged}[fault]
        with pytest.raises(WrongSelection):
            check_batch(positions_from_slots(batch, slots).int(), batch, None, TOPK)

    def test_wrong_ragged_indices(self):
        batch, positions, slots, ragged, starts = self.make()
        for wrong in (positions, slots, ragged + 1, ragged.where(ragged >= 0, -3)):
            found = positions_from_ragged(wrong.int(), starts).int()
            with pytest.raises(WrongSelection):
                check_batch(found, batch, None, TOPK)

    def test_what_is_no_position_is_marked(self):
        batch, _, slots, ragged, starts = self.make()
        slots[0, 0] = slots[2, 0]
        assert positions_from_slots(batch, slots)[0, 0] == WRONG
        ragged[3, 0] = 699
        assert positions_from_ragged(ragged, starts)[3, 0] == WRONG


def test_estimates_that_are_not_numbers():
    """A row of such heads is refused, or held to its form; the others are judged."""
    inputs = random_inputs(3, 32, 300, seed=1)
    means = reference.page_means(inputs.k, inputs.k_scale)
    heads = reference.route(inputs.q, inputs.weights, means, inputs.lengths, 8, 64)
    inputs.weights[1, 20] = float("nan")
    with pytest.raises(WrongSelection, match="not a number.*1 in all"):
        judge.check_routing(heads, inputs, means, 64)
    judge.check_routing(heads, inputs, means, 64, nan_rows=True)
    for row, wrong in ((1, [7, *range(7)]), (0, [*range(24, 32)])):
        other = heads.clone()
        other[row] = torch.tensor(wrong)
        with pytest.raises(WrongSelection):
            judge.check_routing(other, inputs, means, 64, nan_rows=True)


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
    with pytest.raises(WrongSelection):
        check_heads(heads, batch, 8, 128)


def test_heads_that_contribute_nothing_are_taken_from_the_front():
    batch = make_batch("zeros", [(1, 200)], 32)
    heads = torch.arange(8, dtype=torch.int32, device=DEVICE)[None]
    check_heads(heads, batch, 8, 64)
    with pytest.raises(WrongSelection, match="tie"):
        check_heads(heads + 1, batch, 8, 64)
