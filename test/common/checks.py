"""What every record of the indexer must satisfy: bit for bit on a CPU, up to ties on a GPU."""

from collections import defaultdict
from typing import Dict, List, Set

import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.testing import judge
from sglang.srt.layers.misa.testing.inputs import Inputs


def check_record(
    record: Dict, config: MisaConfig, topk: int, *, exact: bool = True, **forced
) -> None:
    """Page means, heads and positions are the reference's on the recorded inputs.

    Page means always are bit for bit. Without `exact`, the heads may be any that the estimates allow up to rounding, and the
    positions any that the scores by the recorded heads allow.

    Args:
        record: as `capture.Recorder` writes it.
        forced: arguments of `reference.force`.
    """
    inputs = Inputs(*(record[name] for name in Inputs._fields))
    heads = record["heads"]
    means = reference.page_means(inputs.k, inputs.k_scale)
    cached = record["page_means"][: len(means)]
    assert torch.equal(cached.view(torch.int16), means.view(torch.int16))
    if heads is None:
        short = inputs.lengths < config.min_context
        assert config.active_heads == inputs.q.shape[1] or bool(short.all())
    if exact:
        expected = _expected(record, means, config, topk, forced)
        assert torch.equal(record["positions"].long(), expected)
        return
    if heads is not None:
        assert heads.shape[1] == config.active_heads
        judge.check_routing(heads, inputs, means, config.block_size)
    judge.check_selection(
        record["positions"],
        inputs,
        heads,
        topk,
        rerank_candidates=0 if heads is None else config.rerank_candidates,
        **forced,
    )


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
