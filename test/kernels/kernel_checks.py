"""What every result of the kernels must satisfy, with the reference as the judge."""

import kernel_batches
import kernel_ops
import pytest
import torch
from kernel_batches import PAGE_SIZE, Batch

from sglang.srt.layers.misa import reference

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs an NVIDIA Hopper GPU",
)

# How far the tensor cores may be off: a dot product by this share of |q| |k|, a sum over heads by this share of the sum of
# its terms' sizes. Hopper adds FP8 products with about 14 bits behind the largest one, in DeepGEMM as here; 2e-5 was
# seen on an H100.
ERROR = 2.0**-14
# Entries of [rows, tokens] that are judged at a time.
CHUNK = 1 << 24
INF = float("inf")


def poison() -> None:
    """Fill the memory that the next allocations get with NaN, as an integer INT_MAX: what is not written shows."""
    if kernel_batches.DEVICE != "cuda":
        return
    torch.cuda.empty_cache()
    sizes = [1 << 19] * 8 + [1 << 24] * 2 + [1 << 29]
    blocks = [
        torch.full((size // 4,), 2**31 - 1, dtype=torch.int32, device="cuda")
        for size in sizes
    ]
    del blocks


def poisoned(op):
    """The op on a GPU whose free memory is poisoned."""

    def run(*args, **options):
        poison()
        return op(*args, **options)

    return run


route = poisoned(kernel_ops.route)
prefill = poisoned(kernel_ops.topk_prefill)
decode = poisoned(kernel_ops.topk_decode)
routed_decode = poisoned(kernel_ops.route_topk_decode)
rerank = poisoned(kernel_ops.rerank)


def routed(q, weights, heads):
    """The queries and weights of the heads that score."""
    if heads is None:
        return q, weights
    return reference.of_heads(q, weights, heads.long())


def relu_bounds(q, keys):
    """The lowest and the highest relu(q . k) that float32 arithmetic may give: float64 [..., 128] x [S, 128] -> [..., S]."""
    dot = q @ keys.T
    slack = ERROR * q.norm(dim=-1)[..., None] * keys.norm(dim=1)
    return (dot - slack).relu(), (dot + slack).relu()


def score_bounds(q, weights, k, k_scale):
    """The lowest and the highest score of every token that float32 arithmetic may give -> two float64 [T, S].

    They are equal only where every head's product is surely negative: such a score is exactly zero.
    """
    low = torch.zeros(len(q), len(k), dtype=torch.float64, device=q.device)
    high, size = low.clone(), low.clone()
    keys, weights = k.double(), weights.double()
    # As many heads at once as make no more entries than are judged at a time: a GPU waits for the host otherwise.
    for heads in torch.arange(q.shape[1]).split(max(1, CHUNK // low.numel())):
        heads = slice(int(heads[0]), int(heads[-1]) + 1)
        least, most = relu_bounds(q[:, heads].double(), keys)
        weight = weights[:, heads, None]
        low += torch.where(weight > 0, weight * least, weight * most).sum(1)
        high += torch.where(weight > 0, weight * most, weight * least).sum(1)
        size += (weight.abs() * most).sum(1)
    scale = k_scale.double()
    return (low - ERROR * size) * scale, (high + ERROR * size) * scale


def check_form(positions, counts) -> None:
    """As many positions as are due, in ascending order without a repeat, then -1."""
    column = torch.arange(positions.shape[1], device=positions.device)
    filled = column < counts[:, None]
    wrong = (torch.where(filled, positions, 0) < 0).any(1)
    assert not wrong.any(), f"positions are missing in rows {where(wrong)}"
    wrong = (torch.where(filled, -1, positions) != -1).any(1)
    assert not wrong.any(), f"no -1 after the last position in rows {where(wrong)}"
    wrong = ((positions.diff(dim=1) <= 0) & filled[:, 1:]).any(1)
    assert not wrong.any(), f"not ascending, or twice, in rows {where(wrong)}"


def check_best(chosen, rest, low, high) -> None:
    """No score that was left out is surely above one that was chosen. All [T, S]; a row may have chosen nothing."""
    assert not (low.isnan() | high.isnan()).any(), "the reference is not a number"
    worst = high.masked_fill(~chosen, INF).min(1)
    best = low.masked_fill(~rest, -INF).max(1)
    wrong = best.values > worst.values
    if not wrong.any():
        return
    row = int(wrong.nonzero()[0])
    inside, outside = int(worst.indices[row]), int(best.indices[row])
    middle, half = (low[row] + high[row]) / 2, (high[row] - low[row]) / 2
    gap = float(middle[outside] - middle[inside])
    allowed = float(half[outside] + half[inside])
    raise AssertionError(
        f"{int(wrong.sum())} rows; in row {row} {inside} was chosen ({float(middle[inside])}) and {outside} was not "
        f"({float(middle[outside])}): {gap / allowed if allowed else INF:.3g} times the tolerance"
    )


def check_ties(chosen, rest, equal) -> None:
    """Among the positions whose scores are equal (bool [T, S]), the lower ones were chosen."""
    position = torch.arange(chosen.shape[1], device=chosen.device)
    last = position.where(chosen & equal, -1).amax(1)
    first = position.where(rest & equal, len(position)).amin(1)
    wrong = last >= first
    assert not wrong.any(), f"a tie went to the higher position in rows {where(wrong)}"


def check_selection(
    positions,
    sequence,
    heads,
    topk: int,
    *,
    candidates=None,
    exact: bool = False,
    classes=None,
    init_tokens: int = 0,
    local_tokens: int = 0,
) -> None:
    """The rows of one sequence hold the `topk` visible positions, or candidates, of highest score.

    Args:
        positions: int [T, topk], what was selected.
        heads: int [T, h], or None for all heads.
        exact: the reference's scores are those of every arithmetic, so the selection has to be the reference's.
        classes: int [S]: tokens of one class have the same key and scale, so their scores are equal.
    """
    assert positions.shape == (len(sequence.q), topk)
    forced = dict(init_tokens=init_tokens, local_tokens=local_tokens)
    tokens = len(sequence.k)
    for rows in torch.arange(len(positions)).split(max(1, CHUNK // tokens)):
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
        q, weights, lengths = (
            tensor[rows] for tensor in (sequence.q, sequence.weights, sequence.lengths)
        )
        q, weights = routed(q, weights, None if heads is None else heads[rows])
        selected = positions[rows].long()
        allowed = reference.visible(lengths, tokens)
        if candidates is not None:
            allowed &= reference.members(candidates[rows].long(), tokens)
        check_form(selected, allowed.sum(1).clamp(max=topk))
        assert (selected < tokens).all(), "a position behind the last token"
        chosen = reference.members(selected, tokens)
        assert not (chosen & ~allowed).any(), "a position that must not be selected"
        rest = allowed & ~chosen
        if exact:
            scores = reference.token_scores(q, weights, sequence.k, sequence.k_scale)
            scores = reference.force(scores, lengths, **forced)
            expected = reference.top_positions(scores, allowed, topk)
            wrong = (selected != expected).any(1)
            assert not wrong.any(), f"not the reference's in rows {where(wrong)}"
            continue
        low, high = score_bounds(q, weights, sequence.k, sequence.k_scale)
        low = reference.force(low, lengths, **forced)
        high = reference.force(high, lengths, **forced)
        check_best(chosen, rest, low, high)
        check_ties(chosen, rest, (low == 0) & (high == 0))  # exactly zero
        check_ties(chosen, rest, low == INF)  # forced
        for label in () if classes is None else classes.unique():
            check_ties(chosen, rest, (classes == label) & (low != INF))


def check_batch(
    positions, batch: Batch, heads, topk: int, *, candidates=None, **options
):
    """Every row of a batch, and -1 in the padded ones."""
    assert positions.dtype == torch.int32
    assert positions.shape == (len(batch.q), topk)
    end = 0
    for sequence, rows in batch.rows():
        check_selection(
            positions[rows],
            sequence,
            None if heads is None else heads[rows],
            topk,
            candidates=None if candidates is None else candidates[rows],
            **options,
        )
        end = rows.stop
    assert (positions[end:] == -1).all(), "a padded row selected something"


def estimate_bounds(q, weights, means, lengths, block_size: int):
    """The lowest and the highest estimate of every head that float32 arithmetic may give -> two float64 [T, H]."""
    low = torch.zeros(weights.shape, dtype=torch.float64, device=q.device)
    high = low.clone()
    complete = lengths // PAGE_SIZE
    for pages in complete.unique().tolist():
        if pages == 0:
            continue
        rows = (complete == pages).nonzero()[:, 0]
        blocks = reference.block_means(means[:pages], block_size).double()
        for some in rows.split(64):
            queries = q.double()[some]
            least, most = relu_bounds(queries.flatten(0, 1), blocks)
            shape = queries.shape[:2]
            weight = weights[some].double().abs()
            low[some] = weight * least.mean(1).view(shape) * (1 - ERROR)
            high[some] = weight * most.mean(1).view(shape) * (1 + ERROR)
    return low, high


def check_heads(heads, batch: Batch, active_heads: int, block_size: int) -> None:
    """Every row has the heads of highest estimate, in ascending order."""
    assert heads.dtype == torch.int32 and heads.shape == (len(batch.q), active_heads)
    for sequence, rows in batch.rows():
        q, weights, k, k_scale, lengths = sequence
        means = reference.page_means(k, k_scale)
        low, high = estimate_bounds(q, weights, means, lengths, block_size)
        chosen_heads = heads[rows].long()
        check_form(chosen_heads, torch.full_like(lengths, active_heads))
        assert (chosen_heads < q.shape[1]).all(), "a head that does not exist"
        chosen = reference.members(chosen_heads, q.shape[1])
        check_best(chosen, ~chosen, low, high)
        check_ties(chosen, ~chosen, high == 0)  # exactly zero


def where(rows) -> str:
    """The first few of a bool [T]."""
    found = rows.nonzero()[:, 0].tolist()
    return f"{found[:5]} ({len(found)} in all)"
