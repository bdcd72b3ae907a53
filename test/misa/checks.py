"""What every record of a server's indexer must satisfy."""

from collections import defaultdict
from typing import Dict, List, Set

import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.config import MisaConfig


def check_record(record: Dict, config: MisaConfig, topk: int) -> None:
    """Page means, heads and positions are the reference's on the recorded inputs, bit for bit."""
    q, weights, k, k_scale, lengths = (
        record[name] for name in ("q", "weights", "k", "k_scale", "lengths")
    )
    means = reference.page_means(k, k_scale)
    cached = record["page_means"][: len(means)]
    assert torch.equal(cached.view(torch.int16), means.view(torch.int16))
    num_heads = q.shape[1]
    if record["heads"] is None:
        short = lengths < config.min_context
        assert config.active_heads == num_heads or bool(short.all())
        expected = reference.dsa(q, weights, k, k_scale, lengths, topk)
    else:
        heads = reference.route(
            q, weights, means, lengths, config.active_heads, config.block_size
        )
        assert torch.equal(record["heads"], heads)
        expected = reference.misa(
            q,
            weights,
            k,
            k_scale,
            lengths,
            topk,
            active_heads=config.active_heads,
            block_size=config.block_size,
            rerank_candidates=config.rerank_candidates,
        )
    assert torch.equal(record["positions"].long(), expected)


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
