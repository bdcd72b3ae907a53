"""What every record of the indexer must satisfy: bit for bit on a CPU, up to ties on a GPU."""

from collections import defaultdict
from typing import Dict, List, Optional, Set

import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.config import MisaConfig

# The kernels sum dot products of FP8 values on tensor cores, which align the products of a step to the largest of them and
# cut off what is some 13 bits below it. So the error of a score is in proportion not to the score, where terms of both
# signs cancel, but to the sum of their magnitudes, sum_j |w_j| (|q_j| . |k|) k_scale. Two scores are tied when each may be
# off by this much of that sum and they then change places. On random inputs this is 0.6% of the k-th score with 8 heads.
TIE = 2.0**-12


def check_record(
    record: Dict, config: MisaConfig, topk: int, *, exact: bool = True, **forced
) -> None:
    """Page means, heads and positions are the reference's on the recorded inputs.

    Page means always are bit for bit. Without `exact`, the heads may be any that the estimates allow up to ties, and the
    positions any that the scores by the recorded heads allow.

    Args:
        record: as `capture.Recorder` writes it.
        forced: arguments of `reference.force`.
    """
    q, weights, k, k_scale, lengths, heads = (
        record[name] for name in ("q", "weights", "k", "k_scale", "lengths", "heads")
    )
    means = reference.page_means(k, k_scale)
    cached = record["page_means"][: len(means)]
    assert torch.equal(cached.view(torch.int16), means.view(torch.int16))
    if heads is None:
        short = lengths < config.min_context
        assert config.active_heads == q.shape[1] or bool(short.all())
    if exact:
        expected = _expected(record, means, config, topk, forced)
        assert torch.equal(record["positions"].long(), expected)
        return
    inputs = q, weights, k, k_scale
    allowed = reference.visible(lengths, len(k))
    if heads is not None:
        heads = heads.long()
        routing = q, weights, means, lengths, config.block_size
        estimates = reference.head_estimates(*routing)
        slack = TIE * reference.head_estimates(
            q.float().abs(), weights.abs(), means.abs(), *routing[3:]
        )
        everyone = torch.ones_like(estimates, dtype=torch.bool)
        check_best(heads, estimates, slack, everyone, config.active_heads)
    contenders = allowed
    if heads is not None and config.rerank_candidates:
        scores, slack = scores_and_slack(*inputs, lengths, forced, heads)
        allowed, contenders = candidates(
            scores, slack, allowed, config.rerank_candidates
        )
        heads = None
    scores, slack = scores_and_slack(*inputs, lengths, forced, heads)
    check_best(record["positions"].long(), scores, slack, allowed, topk, contenders)


def _expected(record, means, config, topk, forced) -> torch.Tensor:
    """The reference's selection; its heads must be the record's."""
    inputs = [record[name] for name in ("q", "weights", "k", "k_scale", "lengths")]
    if record["heads"] is None:
        return reference.dsa(*inputs, topk, **forced)
    q, weights, _, _, lengths = inputs
    options = {"active_heads": config.active_heads, "block_size": config.block_size}
    heads = reference.route(q, weights, means, lengths, **options)
    assert torch.equal(record["heads"].long(), heads)
    return reference.misa(
        *inputs, topk, rerank_candidates=config.rerank_candidates, **options, **forced
    )


def scores_and_slack(q, weights, k, k_scale, lengths, forced, heads=None):
    """The scores by `heads` (int64 [T, h], None for all), and how far each may be off: both float32 [T, S]."""
    q = q.float()
    if heads is not None:
        q, weights = reference.of_heads(q, weights, heads)
    scores = reference.token_scores(q, weights, k, k_scale)
    sizes = reference.token_scores(q.abs(), weights.abs(), k.float().abs(), k_scale)
    return reference.force(scores, lengths, **forced), TIE * sizes


def candidates(scores, slack, allowed, count: int):
    """What `count` best may and what they must contain, given how far the scores may be off -> two bool [T, S]."""
    if scores.shape[1] <= count:
        return allowed, allowed

    def largest(values, n):
        values = values.masked_fill(~allowed, float("-inf"))
        return values.topk(n, dim=1).values[:, -1:]

    may = allowed & (scores + slack >= largest(scores - slack, count))
    must = allowed & (scores - slack > largest(scores + slack, count + 1))
    few = allowed.sum(1, keepdim=True) <= count
    return may, must | (allowed & few)


def check_best(
    chosen: torch.Tensor,
    scores: torch.Tensor,
    slack: torch.Tensor,
    allowed: torch.Tensor,
    count: int,
    contenders: Optional[torch.Tensor] = None,
) -> None:
    """Every row of `chosen` holds the columns of the `count` best scores up to `slack`, ascending, -1 padded.

    Args:
        chosen: int64 [T, count].
        scores, slack: float32 [T, S].
        allowed: bool [T, S], the columns that may be chosen.
        contenders: bool [T, S], those that must not be passed over for a lower score; None for all that are allowed.
    """
    members = reference.members(chosen, scores.shape[1])
    size = members.sum(1)
    column = torch.arange(count, device=chosen.device)
    assert torch.equal(
        chosen >= 0, column < size[:, None]
    ), "not one row of distinct columns, padded"
    assert bool(((chosen.diff(dim=1) > 0) | (chosen[:, 1:] < 0)).all()), "not ascending"
    assert not bool((members & ~allowed).any()), "a column that is not allowed"
    contenders = allowed if contenders is None else contenders
    passed_over = contenders & ~members
    full = size == count
    assert not bool(passed_over[~full].any()), "fewer columns than there are"
    if not bool((full & passed_over.any(1)).any()):
        return
    # The lowest score chosen and the highest passed over, each as far off as it may be.
    worst = (scores + slack).masked_fill(~members, float("inf")).min(1)
    best = (scores - slack).masked_fill(~passed_over, float("-inf")).max(1)
    wrong = (full & (worst.values < best.values)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        low, high = int(worst.indices[row]), int(best.indices[row])
        raise AssertionError(
            f"a lower score was chosen in {len(wrong)} rows: in row {row}, {low} with {scores[row, low]} +- "
            f"{slack[row, low]} instead of {high} with {scores[row, high]} +- {slack[row, high]}"
        )


def check_records(records: List[Dict], config: MisaConfig, topk: int) -> None:
    assert records, "the indexer recorded nothing"
    for record in records:
        check_record(record, config, topk)


def covered(records: List[Dict]) -> Dict[int, Set[int]]:
    """The lengths of the rows recorded, by layer."""
    lengths = defaultdict(set)
    for record in records:
        lengths[record["layer_id"]].update(record["lengths"].tolist())
    return dict(lengths)


def selections(records: List[Dict], first: int, last: int) -> torch.Tensor:
    """Positions chosen by the rows that see `first` to `last` tokens -> [layers, last - first + 1, topk]."""
    layers = defaultdict(dict)
    for record in records:
        for length, row in zip(record["lengths"].tolist(), record["positions"]):
            layers[record["layer_id"]][length] = row
    return torch.stack(
        [
            torch.stack([rows[length] for length in range(first, last + 1)])
            for _, rows in sorted(layers.items())
        ]
    )
