"""The check of a record lets rounding pass and nothing else."""

import pytest
import torch
from checks import check_record

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.testing.inputs import KINDS, make_inputs
from sglang.srt.layers.misa.testing.judge import ERROR

HEADS, TOPK = 16, 64
SINGLE = MisaConfig(active_heads=3, block_size=128)
HIERARCHICAL = MisaConfig(active_heads=3, block_size=128, rerank_candidates=128)


def make_record(config, kind="random", noise=0.0, tokens=600):
    """What an indexer would record whose scores are off by up to `noise` of themselves."""
    inputs = make_inputs(kind, rows=40, heads=HEADS, tokens=tokens)
    means = reference.page_means(inputs.k, inputs.k_scale)
    options = {"active_heads": config.active_heads, "block_size": config.block_size}
    heads = reference.route(inputs.q, inputs.weights, means, inputs.lengths, **options)
    torch.manual_seed(0)
    off = 1 + noise * (2 * torch.rand(len(inputs.k)) - 1)
    noisy = inputs._replace(k_scale=inputs.k_scale * off)
    positions = reference.misa(
        *noisy, TOPK, rerank_candidates=config.rerank_candidates, **options
    )
    return {
        **inputs._asdict(),
        "page_means": means,
        "heads": heads.int(),
        "positions": positions.int(),
    }


def swap(record, row, leave, enter):
    """The same record with another token in the selection of a row."""
    positions = record["positions"].clone()
    chosen = set(positions[row].tolist()) - {leave} | {enter}
    positions[row] = torch.tensor(sorted(chosen))
    return {**record, "positions": positions}


@pytest.mark.parametrize("config", [SINGLE, HIERARCHICAL], ids=["single", "rerank"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_passes(config, kind):
    check_record(make_record(config, kind), config, TOPK, exact=True)
    check_record(make_record(config, kind), config, TOPK, exact=False)


@pytest.mark.parametrize("config", [SINGLE, HIERARCHICAL], ids=["single", "rerank"])
def test_rounding_passes_and_errors_do_not(config):
    # The best scores of few heads are less than a third of |q| |k|, which the tolerance is in proportion to.
    rounded = make_record(config, noise=3 * ERROR, tokens=3000)
    exact = make_record(config, tokens=3000)
    assert not torch.equal(rounded["positions"], exact["positions"])
    check_record(rounded, config, TOPK, exact=False)
    with pytest.raises(AssertionError):
        check_record(rounded, config, TOPK, exact=True)
    # With re-ranking, a token that cannot have been a candidate is noticed first.
    with pytest.raises(AssertionError, match="a lower score|not allowed"):
        check_record(make_record(config, noise=0.05), config, TOPK, exact=False)


@pytest.mark.parametrize("config", [SINGLE, HIERARCHICAL], ids=["single", "rerank"])
def test_a_wrong_token(config):
    record = make_record(config)
    for row in (0, 39):
        chosen = record["positions"][row].tolist()
        other = next(p for p in range(300, 600) if p not in chosen)
        with pytest.raises(AssertionError):
            wrong = swap(record, row, chosen[5], other)
            check_record(wrong, config, TOPK, exact=False)


def test_a_wrong_head():
    record = make_record(SINGLE)
    for row in (0, 39):
        heads = record["heads"].clone()
        other = next(h for h in range(HEADS) if h not in heads[row])
        heads[row, 0] = other
        heads[row] = heads[row].sort().values
        with pytest.raises(AssertionError, match="a lower score"):
            check_record({**record, "heads": heads}, SINGLE, TOPK, exact=False)


def test_a_token_of_the_future_or_no_token():
    record = make_record(SINGLE)
    length = int(record["lengths"][0])
    leave = int(record["positions"][0, 3])
    with pytest.raises(AssertionError, match="not allowed"):
        check_record(swap(record, 0, leave, length), SINGLE, TOPK, exact=False)
    positions = record["positions"].clone()
    positions[0, -1] = -1
    with pytest.raises(AssertionError, match="fewer positions"):
        check_record({**record, "positions": positions}, SINGLE, TOPK, exact=False)
    positions[0, -1] = positions[0, -2]
    with pytest.raises(AssertionError):
        check_record({**record, "positions": positions}, SINGLE, TOPK, exact=False)
    positions = record["positions"].flip(1)
    with pytest.raises(AssertionError, match="not ascending"):
        check_record({**record, "positions": positions}, SINGLE, TOPK, exact=False)
