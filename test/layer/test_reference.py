"""The definitions against a transcription of the formulas into Python loops, and against what must follow from them."""

import pytest
import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.testing.inputs import KINDS, make_inputs


def naive_scores(q, weights, k, k_scale, t, heads):
    """I[t,s] for one query in exact Python arithmetic, rounded at the places that the definition names."""
    scores = []
    for s in range(len(k)):
        total = torch.zeros(())
        for j in heads:
            product = sum(a * b for a, b in zip(q[t, j].tolist(), k[s].tolist()))
            total += weights[t, j] * torch.tensor(product).relu()
        scores.append(float(total * k_scale[s]))
    return scores


def naive_top(scores, length, topk):
    order = sorted(range(length), key=lambda s: (-scores[s], s))[:topk]
    return sorted(order) + [-1] * (topk - len(order))


def as_float(inputs):
    return inputs._replace(q=inputs.q.float(), k=inputs.k.float())


@pytest.mark.parametrize("kind", ["random", "equal", "zeros"])
def test_dsa_is_the_formula(kind):
    inputs = make_inputs(kind, rows=3, heads=4, tokens=100)
    selected = reference.dsa(*inputs, topk=20)
    for t, length in enumerate(inputs.lengths.tolist()):
        scores = naive_scores(*as_float(inputs)[:4], t, range(4))
        assert selected[t].tolist() == naive_top(scores, length, 20)


def test_misa_is_the_formula():
    inputs = make_inputs("random", rows=3, heads=6, tokens=64 * 5 + 20)
    q, weights, k, k_scale, _ = as_float(inputs)
    keys = k.double() * k_scale.double()[:, None]
    selected = reference.misa(*inputs, topk=70, active_heads=2, block_size=128)
    for t, length in enumerate(inputs.lengths.tolist()):
        estimates = []
        for j in range(6):
            total, blocks = 0.0, 0
            for start in range(0, length // 64 * 64, 128):
                pages = [
                    keys[p : p + 64].mean(0).bfloat16()
                    for p in range(start, min(start + 128, length // 64 * 64), 64)
                ]
                kbar = torch.stack(pages).double().mean(0).bfloat16().double()
                total += abs(float(weights[t, j] * (q[t, j].double() @ kbar).relu()))
                blocks += 1
            estimates.append(total / blocks)
        heads = sorted(sorted(range(6), key=lambda j: -estimates[j])[:2])
        scores = naive_scores(q, weights, k, k_scale, t, heads)
        assert selected[t].tolist() == naive_top(scores, length, 70)


@pytest.mark.parametrize("kind", KINDS)
def test_all_heads_are_dsa(kind):
    inputs = make_inputs(kind, rows=40, heads=8, tokens=500)
    assert torch.equal(
        reference.misa(*inputs, topk=100, active_heads=8, block_size=128),
        reference.dsa(*inputs, topk=100),
    )


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 99, 100, 101])
def test_short_rows_select_everything(tokens):
    inputs = make_inputs("random", rows=1, heads=8, tokens=tokens)
    expected = list(range(min(tokens, 100)))
    for select in (reference.dsa, reference.misa, reference.hisa):
        (selected,) = select(*inputs, topk=100).tolist()
        assert len(selected) == 100
        if tokens <= 100:
            assert selected == expected + [-1] * (100 - tokens)


@pytest.mark.parametrize("variant", ["misa", "rerank", "hisa", "dsa"])
def test_a_row_depends_on_its_prefix_only(variant):
    select, options = {
        "misa": (reference.misa, dict(active_heads=2, block_size=128)),
        "rerank": (
            reference.misa,
            dict(active_heads=2, block_size=128, rerank_candidates=150),
        ),
        "hisa": (reference.hisa, dict(block_size=32, top_blocks=6)),
        "dsa": (reference.dsa, {}),
    }[variant]
    inputs = make_inputs("random", rows=300, heads=8, tokens=600)
    together = select(*inputs, topk=100, **options)
    for t in range(0, 300, 7):
        length = int(inputs.lengths[t])
        alone = select(
            inputs.q[t : t + 1],
            inputs.weights[t : t + 1],
            inputs.k[:length],
            inputs.k_scale[:length],
            inputs.lengths[t : t + 1],
            topk=100,
            **options,
        )
        assert torch.equal(together[t : t + 1], alone)


def test_rerank_selects_among_the_candidates():
    inputs = make_inputs("random", rows=20, heads=8, tokens=600)
    candidates = reference.misa(*inputs, topk=200, active_heads=2, block_size=128)
    selected = reference.misa(
        *inputs, topk=100, active_heads=2, block_size=128, rerank_candidates=200
    )
    for t in range(20):
        scores = naive_scores(*as_float(inputs)[:4], t, range(8))
        best = sorted(candidates[t].tolist(), key=lambda s: (-scores[s], s))[:100]
        assert selected[t].tolist() == sorted(best)


def test_hisa_keeps_the_first_and_the_last_block():
    inputs = make_inputs("rising", rows=5, heads=4, tokens=1000)
    selected = reference.hisa(*inputs, topk=128, block_size=64, top_blocks=2)
    for row, length in zip(selected.tolist(), inputs.lengths.tolist()):
        last = (length - 1) // 64 * 64
        assert set(row) <= {-1, *range(64), *range(last, length)}


def test_forced_tokens_are_always_selected():
    inputs = make_inputs("falling", rows=5, heads=4, tokens=400)
    forced = dict(init_tokens=3, local_tokens=4)
    for select in (reference.dsa, reference.misa):
        selected = select(*inputs, topk=100, **forced)
        for row, length in zip(selected.tolist(), inputs.lengths.tolist()):
            assert {0, 1, 2, *range(length - 4, length)} <= set(row)


def test_ties_go_to_the_lower_position_and_head():
    inputs = make_inputs("equal", rows=2, heads=4, tokens=300)
    assert reference.dsa(*inputs, topk=100).tolist() == [list(range(100))] * 2
    twins = make_inputs("twins", rows=10, heads=8, tokens=300)
    means = reference.page_means(twins.k, twins.k_scale)
    heads = reference.route(
        twins.q, twins.weights, means, twins.lengths, active_heads=3, block_size=64
    )
    for row in heads.tolist():
        # Equal heads rank next to each other, the even one first: an odd one never comes alone.
        assert all(head - 1 in row for head in row if head % 2)
