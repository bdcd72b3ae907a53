"""Is a selection the reference's? The one judge of tests and benchmarks.

A kernel adds in another order than `reference.py` and in float32, so no score of its is known to the last bit. The judge
therefore gives every score a lower and an upper bound (`score_bounds`), and a selection is right if no token was left out whose
score is surely above that of one selected. Where arithmetic leaves no doubt it is exact: equal keys have equal scores, and so have
tokens on which no head fires and tokens that are forced, and among equals the lower positions win.

A check raises `WrongSelection`. If all is right it returns by how much the selection strays from the one that the middles of the
bounds give: the error, see `check_best`.
"""

from typing import NamedTuple, Optional, Tuple

import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE
from sglang.srt.layers.misa.testing.batches import Batch
from sglang.srt.layers.misa.testing.inputs import Inputs

# How far the tensor cores may be off: a dot product by this share of |q| |k|, a sum over heads by this share of the sum of
# its terms' sizes. Hopper adds FP8 products with about 14 bits behind the largest one, in DeepGEMM as here; 2e-5 was
# seen on an H100.
ERROR = 2.0**-14
# Entries of [rows, tokens] that are judged at a time.
CHUNK = 1 << 24
INF = float("inf")


class WrongSelection(AssertionError):
    """A selection that is not the reference's.

    Attributes:
        error: by how much it strays, see `check_best`; infinite if it is no selection at all.
    """

    def __init__(self, message: str, error: float = INF):
        super().__init__(message)
        self.error = error


class SharedHead(NamedTuple):
    """A head that scores without a ReLU after those that have one, for the rows of one sequence.

    query  float8_e4m3fn [T, 128]
    scale  float32 [T]
    """

    query: torch.Tensor
    scale: torch.Tensor

    def of_rows(self, rows) -> "SharedHead":
        query = self.query.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
        return SharedHead(query, self.scale[rows])


def require(wrong: torch.Tensor, message: str) -> None:
    """Raise if a row (bool [T]) is wrong."""
    if wrong.any():
        rows = wrong.nonzero()[:, 0].tolist()
        raise WrongSelection(f"{message} in rows {rows[:5]} ({len(rows)} in all)")


def routed(q, weights, heads):
    """The queries and weights of the heads that score, all of them if `heads` is None."""
    if heads is None:
        return q, weights
    return reference.of_heads(q, weights, heads.long())


def dot_bounds(q, keys):
    """The lowest and the highest q . k that float32 arithmetic may give: float64 [..., 128] x [S, 128] -> two [..., S]."""
    dot = q @ keys.T
    slack = ERROR * q.norm(dim=-1)[..., None] * keys.norm(dim=1)
    return dot - slack, dot + slack


def relu_bounds(q, keys):
    """The same of relu(q . k)."""
    low, high = dot_bounds(q, keys)
    return low.relu(), high.relu()


def score_bounds(q, weights, k, k_scale, shared: Optional[SharedHead] = None):
    """The lowest and the highest score of every token that float32 arithmetic may give -> two float64 [T, S].

    Without a shared head they are equal only where every head's product is surely negative: such a score is exactly zero.
    """
    low = torch.zeros(len(q), len(k), dtype=torch.float64, device=q.device)
    high, size = low.clone(), low.clone()
    keys, weights = k.double(), weights.double()
    # As many heads at once as make no more entries than are judged at a time: a GPU waits for the host otherwise.
    step = max(1, CHUNK // low.numel())
    for first in range(0, q.shape[1], step):
        heads = slice(first, first + step)
        least, most = relu_bounds(q[:, heads].double(), keys)
        weight = weights[:, heads, None]
        low += torch.where(weight > 0, weight * least, weight * most).sum(1)
        high += torch.where(weight > 0, weight * most, weight * least).sum(1)
        size += (weight.abs() * most).sum(1)
    if shared is not None:
        least, most = dot_bounds(shared.query.double(), keys)
        gate = shared.scale.double()[:, None]
        low += gate * least
        high += gate * most
        size += gate * torch.maximum(-least, most)
    scale = k_scale.double()
    return (low - ERROR * size) * scale, (high + ERROR * size) * scale


def key_classes(k, k_scale) -> Tuple[torch.Tensor, int]:
    """int64 [S], the same for tokens of the same key and scale, and how many of these there are."""
    content = torch.cat(
        [k.view(torch.uint8), k_scale.float().view(torch.uint8).view(-1, 4)], dim=1
    )
    # Two keys in 2^64 share a hash. Sorting the keys themselves takes a GPU seconds.
    rng = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (content.shape[1],), generator=rng)
    hashes = (content.long() * factors.to(k.device)).sum(1)
    distinct, classes = hashes.unique(return_inverse=True)
    return classes, len(distinct)


def check_form(positions, counts) -> None:
    """As many positions (int [T, k]) as are due (int [T]), in ascending order without a repeat, then -1."""
    column = torch.arange(positions.shape[1], device=positions.device)
    filled = column < counts[:, None]
    require(
        (torch.where(filled, positions, 0) < 0).any(1),
        "fewer positions than there are to select",
    )
    require(
        (torch.where(filled, -1, positions) != -1).any(1),
        "no -1 after the last position",
    )
    disorder = (positions.diff(dim=1) <= 0) & filled[:, 1:]
    require(disorder.any(1), "not ascending, or one twice,")


def numbers(low, high, allowed, nan_rows: bool):
    """The rows (bool [T]) whose allowed scores all are finite, or forced; the others are refused if `nan_rows` is false."""
    finite = low.isfinite() & high.isfinite() | (low == INF)
    clear = (finite | ~allowed).all(1)
    if not nan_rows:
        require(~clear, "the reference is not a number")
    return clear


def check_best(chosen, rest, low, high) -> float:
    """No score that was left out is surely above one that was chosen. All [T, S]; a row may have chosen nothing.

    Returns:
        The error: by how much the highest score left out is above the lowest one chosen if all are in the middle of their
        bounds, as a share of the row's largest score, in the worst row. 0 for a perfect selection.
    """
    middle = low / 2 + high / 2
    worst = middle.masked_fill(~chosen, INF).amin(1)
    best = middle.masked_fill(~rest, -INF).amax(1)
    sizes = middle.abs().masked_fill(~(chosen | rest) | middle.isinf(), 0).amax(1)
    gap = best - worst
    gap = gap.masked_fill(gap.isnan(), 0)  # inf - inf: both are forced
    error = float((gap.clamp(min=0) / sizes.clamp(min=1e-300)).amax())
    surely = high.masked_fill(~chosen, INF).min(1)
    possibly = low.masked_fill(~rest, -INF).max(1)
    wrong = possibly.values > surely.values
    if not wrong.any():
        return error
    row = int(wrong.nonzero()[0])
    inside, outside = int(surely.indices[row]), int(possibly.indices[row])
    half = (high[row] - low[row]) / 2
    gap = float(middle[row, outside] - middle[row, inside])
    allowed = float(half[outside] + half[inside])
    raise WrongSelection(
        f"a lower score was chosen in {int(wrong.sum())} rows: in row {row} {inside} ({float(middle[row, inside])}) instead "
        f"of {outside} ({float(middle[row, outside])}), {gap / allowed if allowed else INF:.3g} times the tolerance",
        error,
    )


def check_ties(chosen, rest, classes, count: int) -> None:
    """Among the positions of one class (int64 [T, S], below `count`), whose scores are equal, the lower ones were chosen."""
    position = torch.arange(chosen.shape[1], device=chosen.device).expand_as(classes)
    end = chosen.shape[1]
    empty = position.new_zeros(len(chosen), count)
    last = (empty - 1).scatter_reduce(
        1, classes, position.where(chosen, -1), "amax", include_self=True
    )
    first = (empty + end).scatter_reduce(
        1, classes, position.where(rest, end), "amin", include_self=True
    )
    require((last >= first).any(1), "a tie went to the higher position")


def possible_candidates(low, high, allowed, count: int):
    """Which positions may be among the `count` best allowed ones, and which must be -> two bool [T, S]."""
    if low.shape[1] <= count:
        return allowed, allowed

    def largest(values, n):
        return values.masked_fill(~allowed, -INF).topk(n, dim=1).values[:, -1:]

    may = allowed & (high >= largest(low, count))
    must = allowed & (low > largest(high, count + 1))
    few = allowed.sum(1, keepdim=True) <= count
    return may, must | (allowed & few)


def check_selection(
    positions,
    sequence: Inputs,
    heads,
    topk: int,
    *,
    shared: Optional[SharedHead] = None,
    candidates=None,
    rerank_candidates: int = 0,
    exact: bool = False,
    ties: bool = True,
    nan_rows: bool = False,
    init_tokens: int = 0,
    local_tokens: int = 0,
) -> float:
    """The rows of one sequence hold the `topk` visible positions, or candidates, of highest score, in ascending order.

    Args:
        positions: int [T, topk], what was selected; -1 behind the last one.
        heads: int [T, h], or None for all heads.
        shared: one more head, without a ReLU.
        candidates: int [T, m], -1 padded. All heads choose among them where `heads` is None.
        rerank_candidates: m, where candidates were chosen by `heads` and `shared` and are not known, and all heads chose
            among these.
        exact: the reference's scores are those of every arithmetic, so the selection has to be the reference's.
        ties: equal scores have to be broken in favour of the lower position.
        nan_rows: rows with scores that are not finite are held to their form alone; otherwise they are refused. What such a score
            is worth is decided in `reference`, but a kernel's may be a number where the reference's is none.

    Returns:
        The error, see `check_best`.

    Raises:
        WrongSelection: it is not that selection.
    """
    if positions.shape != (len(sequence.q), topk):
        raise WrongSelection(f"{tuple(positions.shape)} is no selection's shape")
    forced = dict(init_tokens=init_tokens, local_tokens=local_tokens)
    tokens = len(sequence.k)
    classes, count = key_classes(sequence.k, sequence.k_scale)
    error = 0.0
    for rows in torch.arange(len(positions)).split(max(1, CHUNK // max(1, tokens))):
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
        some = sequence.of_rows(rows)
        scorers = None if heads is None else heads[rows]
        own = None if shared is None else shared.of_rows(rows)

        allowed = reference.visible(some.lengths, tokens)
        if candidates is not None:
            allowed &= members(candidates[rows].long(), tokens)
        selected = positions[rows].long()
        if exact:
            require_same(selected, some, scorers, own, allowed, forced)
            continue
        low, high = forced_bounds(some, scorers, own, forced)
        contenders = allowed
        due = allowed.sum(1).clamp(max=min(topk, rerank_candidates or topk))
        if rerank_candidates:
            allowed, contenders = possible_candidates(
                low, high, allowed, rerank_candidates
            )
            low, high = forced_bounds(some, None, None, forced)
        check_form(selected, due)
        require((selected >= tokens).any(1), "a position that is not allowed")
        chosen = reference.members(selected, tokens)
        require((chosen & ~allowed).any(1), "a position that is not allowed")
        clear = numbers(low, high, allowed, nan_rows)
        if not clear.any():
            continue
        low, high, chosen = low[clear], high[clear], chosen[clear]
        rest = contenders[clear] & ~chosen
        error = max(error, check_best(chosen, rest, low, high))
        if ties:
            # Forced tokens, and tokens that surely score 0, are equal whatever their keys are.
            same = classes.expand_as(low)
            same = same.masked_fill((low == 0) & (high == 0), count)
            same = same.masked_fill(low == INF, count + 1)
            check_ties(chosen, rest, same, count + 2)
    return error


def forced_bounds(sequence: Inputs, heads, shared, forced: dict):
    """`score_bounds` of a sequence by some of its heads, infinite for forced tokens."""
    q, weights = routed(sequence.q, sequence.weights, heads)
    bounds = score_bounds(q, weights, sequence.k, sequence.k_scale, shared)
    return [reference.force(b, sequence.lengths, **forced) for b in bounds]


def require_same(selected, sequence: Inputs, heads, shared, allowed, forced) -> None:
    """The selection is the reference's to the last position."""
    q, weights = routed(sequence.q, sequence.weights, heads)
    scores = reference.token_scores(
        q, weights, sequence.k, sequence.k_scale, *(shared or ())
    )
    scores = reference.force(scores, sequence.lengths, **forced)
    expected = reference.top_positions(scores, allowed, selected.shape[1])
    require((selected != expected).any(1), "not the reference's positions")


def members(positions, tokens: int) -> torch.Tensor:
    """`reference.members` of int64 [T, k] whose entries may be anything -> bool [T, tokens]."""
    inside = (positions >= 0) & (positions < tokens)
    return reference.members(positions.masked_fill(~inside, -1), tokens)


def check_batch(
    positions,
    batch: Batch,
    heads,
    topk: int,
    *,
    shared: Optional[SharedHead] = None,
    candidates=None,
    **options,
) -> float:
    """`check_selection` of every row of a batch, and -1 in the padded ones; `heads`, `shared` and `candidates` are the batch's."""
    if positions.dtype != torch.int32 or positions.shape != (len(batch.q), topk):
        raise WrongSelection(
            f"{positions.dtype} {tuple(positions.shape)} is no selection"
        )
    error, end = 0.0, 0
    for sequence, rows in batch.rows():
        own = check_selection(
            positions[rows],
            sequence,
            None if heads is None else heads[rows],
            topk,
            shared=None if shared is None else shared.of_rows(rows),
            candidates=None if candidates is None else candidates[rows],
            **options,
        )
        error, end = max(error, own), rows.stop
    require((positions[end:] != -1).any(1), "a padded row selected something")
    return error


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


def check_routing(
    heads, sequence: Inputs, means, block_size: int, *, nan_rows: bool = False
) -> float:
    """The rows of one sequence have the heads (int [T, h]) of highest estimate, in ascending order -> the error.

    Args:
        means: bfloat16 [P, 128], the page means that the router saw.
        nan_rows: as in `check_selection`, of estimates.
    """
    q, weights, _, _, lengths = sequence
    chosen_heads = heads.long()
    check_form(chosen_heads, torch.full_like(lengths, heads.shape[1]))
    require((chosen_heads >= q.shape[1]).any(1), "a head that does not exist")
    low, high = estimate_bounds(q, weights, means, lengths, block_size)
    chosen = reference.members(chosen_heads, q.shape[1])
    clear = numbers(low, high, torch.ones_like(chosen), nan_rows)
    if not clear.any():
        return 0.0
    low, high, chosen = low[clear], high[clear], chosen[clear]
    error = check_best(chosen, ~chosen, low, high)
    # Heads that contribute exactly nothing are one class, each of the others is one of its own.
    own = 1 + torch.arange(q.shape[1], device=q.device)
    check_ties(chosen, ~chosen, (high != 0).long() * own, q.shape[1] + 1)
    return error


def check_heads(heads, batch: Batch, active_heads: int, block_size: int) -> float:
    """`check_routing` of every row of a batch that is no padding."""
    if heads.dtype != torch.int32 or heads.shape != (len(batch.q), active_heads):
        raise WrongSelection(f"{heads.dtype} {tuple(heads.shape)} are no heads")
    error = 0.0
    for sequence, rows in batch.rows():
        means = reference.page_means(sequence.k, sequence.k_scale)
        error = max(error, check_routing(heads[rows], sequence, means, block_size))
    return error


def line_slack(sequence: Inputs):
    """How well float32 arithmetic knows each head's samples x_j and its slope -> two float64 [T, H].

    The first is by how much a sample may be off, the second that over the deviation of the samples, four times; 0 where all
    samples are surely on one side of 0.
    """
    q, _, k, k_scale, lengths = sequence
    slack = torch.zeros(q.shape[:2], dtype=torch.float64, device=q.device)
    unsure = slack.clone()
    for t, length in enumerate(lengths.tolist()):
        if length > 0:
            samples = reference.sample_positions(length).to(k.device)
            keys = k[samples].double() * k_scale[samples].double()[:, None]
            query = q[t].double()
            slack[t] = ERROR * query.norm(dim=1) * keys.norm(dim=1).amax()
            x = query @ keys.T
            unsure[t] = (
                (4 * slack[t] / x.std(1, correction=0)).nan_to_num(0).clamp(max=1)
            )
            one_side = (x.amin(1) > slack[t]) | (x.amax(1) < -slack[t])
            unsure[t] = unsure[t].masked_fill(one_side, 0)
    return slack, unsure


def check_sampled_routing(routed, sequence: Inputs) -> float:
    """The rows of one sequence have the heads of highest estimate, and the shared head that goes with these -> the error.

    A standard deviation moves by no more than what it is of, so an estimate is known up to the slack of a head's samples. A slope
    is known up to that slack over the deviation of the samples, and the shared query up to the slopes and to one step of FP8.

    Args:
        routed: heads int32 [T, h - 1], shared_q float8_e4m3fn [T, 128], shared_scale float32 [T].
    """
    heads, shared_q, shared_scale = routed
    q, weights, k, k_scale, lengths = sequence
    chosen_heads = heads.long()
    check_form(chosen_heads, torch.full_like(lengths, heads.shape[1]))
    require((chosen_heads >= q.shape[1]).any(1), "a head that does not exist")
    slopes, estimates = reference.slopes_and_estimates(q, weights, k, k_scale, lengths)
    slack, unsure = line_slack(sequence)
    size = weights.double().abs()
    low, high = (estimates.double() + sign * 2 * size * slack for sign in (-1, 1))
    chosen = reference.members(chosen_heads, q.shape[1])
    error = check_best(chosen, ~chosen, low, high) if heads.shape[1] else 0.0

    scale = shared_scale.double()[:, None]
    mantissa = torch.frexp(shared_scale).mantissa
    require(mantissa != 0.5, "a scale that is no power of two")
    factors = (slopes * weights).double().masked_fill(chosen, 0)
    u = (factors[:, :, None] * q.double()).sum(1)
    unsure = size * unsure.masked_fill(chosen, 0) + factors.abs() * ERROR
    unsure = (unsure[:, :, None] * q.double().abs()).sum(1)
    # The values of e4m3 around u are 2 ** (exponent - 3) apart, the smallest ones 2 ** -9.
    step = torch.ldexp(torch.ones_like(u), torch.frexp(u / scale).exponent - 1 - 3)
    step = scale * step.clamp(min=2.0**-9)
    far = (shared_q.double() * scale - u).abs() > step + unsure
    require(far.any(1), "a shared query that is not the lines of the other heads")
    largest, room = u.abs().amax(1), unsure.amax(1)
    bound = reference.FP8_MAX * shared_scale.double()
    require(largest - room > bound, "a scale that is too small")
    coarse = (largest + room <= bound / 2) & (shared_scale.double() > 2.0**-126)
    require(
        coarse & ~((largest == 0) & (shared_scale == 1)), "a scale that is too large"
    )
    return error


def check_slots(routed, batch: Batch, active_heads: int) -> float:
    """`check_sampled_routing` of every row of a batch; padded rows have the first heads and nothing to share."""
    heads, shared_q, shared_scale = routed
    if heads.dtype != torch.int32 or heads.shape != (len(batch.q), active_heads - 1):
        raise WrongSelection(f"{heads.dtype} {tuple(heads.shape)} are no heads")
    error, end = 0.0, 0
    for sequence, rows in batch.rows():
        own = heads[rows], *SharedHead(shared_q, shared_scale).of_rows(rows)
        error, end = max(error, check_sampled_routing(own, sequence)), rows.stop
    first = torch.arange(active_heads - 1, device=heads.device)
    require((heads[end:] != first).any(1), "a padded row has heads of its own")
    nothing = (shared_q[end:].view(torch.uint8) == 0).all(1) & (shared_scale[end:] == 1)
    require(~nothing, "a padded row has something to share")
    return error
