"""The check of a record lets rounding pass and nothing else."""

from dataclasses import replace

import pytest
import torch
from checks import check_record

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.testing.inputs import KINDS, make_inputs
from sglang.srt.layers.misa.testing.judge import ERROR

HEADS, TOPK = 16, 64
CONFIGS = {
    "pooled": MisaConfig("pooled", 3, 128),
    "pooled, rerank": MisaConfig("pooled", 3, 128, rerank_candidates=128),
    "sampled": MisaConfig("sampled", 3),
    "sampled, rerank": MisaConfig("sampled", 3, rerank_candidates=128),
    "shared head alone": MisaConfig("sampled", 1),
}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
SINGLE = CONFIGS["pooled"]


def make_record(config, kind="random", noise=0.0, tokens=600):
    """What an indexer would record whose scores are off by up to `noise` of themselves."""
    inputs = make_inputs(kind, rows=40, heads=HEADS, tokens=tokens)
    q, weights, k, k_scale, lengths = inputs
    means, shared = None, (None, None)
    if config.pools_keys:
        means = reference.page_means(k, k_scale)
        options = config.active_heads, config.block_size
        heads = reference.route(q, weights, means, lengths, *options)
    else:
        heads, *shared = reference.route_sampled(*inputs, config.active_heads)
    torch.manual_seed(0)
    off = 1 + noise * (2 * torch.rand(len(k)) - 1)
    noisy = inputs._replace(k_scale=k_scale * off)
    scored = reference.of_heads(q, weights, heads)
    scores = reference.token_scores(*scored, k, noisy.k_scale, *shared)
    positions = reference.best_of(scores, *noisy, TOPK, config.rerank_candidates)
    return {
        **inputs._asdict(),
        "decode": False,
        "router": config.router,
        "page_means": means,
        "heads": heads.int(),
        "shared_q": shared[0],
        "shared_scale": shared[1],
        "positions": positions.int(),
    }


def swap(record, row, leave, enter):
    """The same record with another token in the selection of a row."""
    positions = record["positions"].clone()
    chosen = set(positions[row].tolist()) - {leave} | {enter}
    positions[row] = torch.tensor(sorted(chosen))
    return {**record, "positions": positions}


@EACH
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_passes(config, kind):
    check_record(make_record(config, kind), config, TOPK, exact=True)
    check_record(make_record(config, kind), config, TOPK, exact=False)


# The best scores of few heads are less than a third of |q| |k|, which the tolerance is in proportion to. The shared head's
# scores are smaller still, and so the noise that moves a token is larger.
@pytest.mark.parametrize(
    "name, noise",
    [
        ("pooled", 3),
        ("pooled, rerank", 3),
        ("sampled", 24),
        ("sampled, rerank", 3),
        ("shared head alone", 12),
    ],
)
def test_rounding_passes_and_errors_do_not(name, noise):
    config = CONFIGS[name]
    rounded = make_record(config, noise=noise * ERROR, tokens=3000)
    exact = make_record(config, tokens=3000)
    assert not torch.equal(rounded["positions"], exact["positions"])
    check_record(rounded, config, TOPK, exact=False)
    with pytest.raises(AssertionError):
        check_record(rounded, config, TOPK, exact=True)
    # With re-ranking, a token that cannot have been a candidate is noticed first.
    with pytest.raises(AssertionError, match="a lower score|not allowed"):
        check_record(make_record(config, noise=0.05), config, TOPK, exact=False)


@EACH
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


def test_a_wrong_shared_head():
    config = CONFIGS["sampled"]
    record = make_record(config)
    for row in (0, 39):
        for name, wrong in (
            ("shared_q", record["shared_q"].float().roll(1, 0)),
            ("shared_scale", record["shared_scale"] * 4),
        ):
            changed = record[name].float()
            changed[row] = wrong[row]
            changed = {**record, name: changed.to(record[name].dtype)}
            for exact in (True, False):
                with pytest.raises(AssertionError):
                    check_record(changed, config, TOPK, exact=exact)


def test_what_belongs_to_the_other_router():
    pooled, sampled = CONFIGS["pooled"], CONFIGS["sampled"]
    with pytest.raises(AssertionError):
        check_record(make_record(pooled), sampled, TOPK)
    record = make_record(sampled)
    for name in ("shared_q", "page_means"):
        wrong = make_record(pooled)[name]
        with pytest.raises(AssertionError):
            check_record({**record, name: wrong}, sampled, TOPK)


def dsa_record(**changes):
    """A row of decode that SGLang's own indexer selected for, in an order of its own."""
    inputs = make_inputs("random", rows=1, heads=HEADS, tokens=600)
    positions = reference.dsa(*inputs, TOPK).flip(1).int()
    nothing = dict.fromkeys(
        ("router", "page_means", "heads", "shared_q", "shared_scale")
    )
    record = {**inputs._asdict(), **nothing, "decode": True, "positions": positions}
    return record | changes


@pytest.mark.parametrize("exact", [True, False])
def test_sglangs_own_selection(exact):
    record, config = dsa_record(), CONFIGS["sampled"]
    check_record(record, config, TOPK, exact=exact)
    chosen = record["positions"][0].tolist()
    other = next(p for p in range(600) if p not in chosen)
    positions = torch.tensor([[other, *chosen[1:]]])
    twice = torch.tensor([[chosen[1], *chosen[1:]]])
    for wrong in (positions, twice):
        with pytest.raises(AssertionError):
            check_record(dsa_record(positions=wrong), config, TOPK, exact=exact)
    # It may select in decode, unless MISA is to, and for prompts up to min_context.
    decoded = MisaConfig("sampled", 3, decode="misa")
    with pytest.raises(AssertionError):
        check_record(record, decoded, TOPK, exact=exact)
    prompt = dsa_record(decode=False)
    check_record(prompt, replace(config, min_context=600), TOPK, exact=exact)
    with pytest.raises(AssertionError):
        check_record(prompt, replace(config, min_context=599), TOPK, exact=exact)
    # And MISA may not, unless it is to, but where a sequence has several rows.
    routed = make_record(config) | {"decode": True}
    check_record(routed, config, TOPK, exact=exact)
    routed_by = "heads", "shared_q", "shared_scale"
    for name in ("q", "weights", "lengths", "positions", *routed_by):
        routed[name] = routed[name][:1]
    check_record(routed, decoded, TOPK, exact=exact)
    with pytest.raises(AssertionError):
        check_record(routed, config, TOPK, exact=exact)
