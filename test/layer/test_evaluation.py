"""What MISA is measured against, in a batch and in a server, is what `reference` says."""

import pytest
import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.batch import Batch
from sglang.srt.layers.misa.environment import SELECTIONS
from sglang.srt.layers.misa.evaluation import selections
from sglang.srt.layers.misa.evaluation.selections import (
    EvaluationIndexer,
    heaviest_heads,
    random_heads,
)
from sglang.srt.layers.misa.selection import to_output
from sglang.srt.layers.misa.testing.batches import write_cache
from sglang.srt.layers.misa.testing.inputs import KINDS, make_inputs
from sglang_misa.client import Client

TOPK, HEADS = 128, 3
# Those that look at scores.
SCORED = [name for name in SELECTIONS if name != "free"]


def by_heads(inputs, heads, **forced):
    """`reference.dsa` with these heads of each query alone."""
    scored = reference.of_heads(inputs.q, inputs.weights, heads)
    return reference.dsa(*scored, *inputs[2:], TOPK, **forced)


def expected(name, inputs, fixed=None, **forced):
    """The definition; `fixed` are the heaviest heads where other rows have fixed them."""
    if name == "hisa":
        return reference.hisa(*inputs, TOPK, **forced)
    if name in selections.WITH_SHARED_HEAD:
        slopes, estimates = reference.slopes_and_estimates(*inputs)
        if name == "half-slopes":
            slopes, heads = slopes * 0 + 0.5, reference.best_heads(estimates, HEADS - 1)
        else:
            heads = random_heads(inputs.lengths, inputs.q.shape[1], HEADS - 1)
        shared = reference.shared_query(*inputs[:2], slopes, heads)
        scored = reference.of_heads(*inputs[:2], heads)
        scores = reference.token_scores(*scored, *inputs[2:4], *shared)
        return reference.best_of(scores, *inputs, TOPK, **forced)
    if name == "random-heads":
        heads = random_heads(inputs.lengths, inputs.q.shape[1], HEADS)
    else:
        fixed = heaviest_heads(inputs.weights, HEADS) if fixed is None else fixed
        heads = fixed.expand(len(inputs.q), -1)
    return by_heads(inputs, heads, **forced)


def batch_of(sequences):
    """Sequences as (q, weights, index_k, batch); each has pages of its own in one cache."""
    caches = [write_cache(inputs, seed=i) for i, inputs in enumerate(sequences)]
    index_k = torch.cat([cache for cache, _ in caches])
    page_table = torch.zeros(len(caches), max(len(p) for _, p in caches)).int()
    first = 0
    for i, (cache, pages) in enumerate(caches):
        page_table[i, : len(pages)] = pages + first
        first += len(cache)
    rows = [len(inputs.q) for inputs in sequences]
    q = torch.cat([x.q.float() for x in sequences]).to(torch.float8_e4m3fn)
    batch = Batch(
        page_table=page_table,
        cu_rows=torch.tensor([0, *rows]).cumsum(0).int(),
        lengths=torch.cat([x.lengths for x in sequences]).int(),
        rows=rows,
    )
    return q, torch.cat([x.weights for x in sequences]), index_k, batch


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("kind", KINDS)
def test_selects_as_defined(name, kind, monkeypatch):
    # Some rows at a time, so that rows of a sequence are not all in one chunk.
    monkeypatch.setattr(selections, "CHUNK_SCORES", 4 * 9000)
    # More tokens than are in HISA's 64 blocks, and fewer.
    sequences = [
        make_inputs(kind, rows, 8, length, seed=length)
        for rows, length in ((9, 8900), (1, 64), (5, 300))
    ]
    q, weights, index_k, batch = batch_of(sequences)
    indexer = EvaluationIndexer(name, HEADS, TOPK, {}, 0)
    selection = indexer.select(q, weights, index_k, None, batch)
    fixed = heaviest_heads(weights[batch.lengths > TOPK], HEADS)
    wanted = torch.cat([expected(name, x, fixed) for x in sequences])
    assert torch.equal(selection.indices.long(), wanted)
    assert selection.indices.dtype == torch.int32
    assert (selection.heads is None) == (name == "hisa")
    slots = indexer.select(q, weights, index_k, None, batch, "slots").indices
    wanted = to_output(selection.indices, "slots", batch.page_table, batch.cu_rows)
    assert torch.equal(slots, wanted)


@pytest.mark.parametrize("name", SCORED)
def test_forced_tokens(name):
    inputs = make_inputs("random", 4, 8, 700)
    q, weights, index_k, batch = batch_of([inputs])
    forced = {"init_tokens": 2, "local_tokens": 3}
    indexer = EvaluationIndexer(name, HEADS, TOPK, forced, 0)
    selection = indexer.select(q, weights, index_k, None, batch)
    wanted = expected(name, inputs, **forced)
    assert torch.equal(selection.indices.long(), wanted)
    assert not torch.equal(wanted, expected(name, inputs))


def test_what_is_free():
    sequences = [make_inputs("random", 9, 8, length) for length in (8900, TOPK, 70)]
    q, weights, index_k, batch = batch_of(sequences)
    indexer = EvaluationIndexer("free", HEADS, TOPK, {}, 0)
    found = indexer.select(q, weights, index_k, None, batch)
    assert found.heads is None and found.indices.dtype == torch.int32
    for chosen, length in zip(found.indices, batch.lengths.tolist()):
        count = min(length, TOPK)
        assert (chosen[count:] == -1).all()
        assert (chosen[:count].diff() > 0).all()
        assert 0 <= chosen[0] and chosen[count - 1] < length
        # Every stretch has one.
        places = torch.arange(count + 1) * length // count
        assert (places[:-1] <= chosen[:count]).all()
        assert (chosen[:count] < places[1:]).all()
    # Neighbours do not choose alike: attention would find its keys in the L2 cache.
    first, second = found.indices[:2]
    assert len(set(first.tolist()) & set(second.tolist())) < TOPK / 4
    slots = indexer.select(q, weights, index_k, None, batch, "slots").indices
    wanted = to_output(found.indices, "slots", batch.page_table, batch.cu_rows)
    assert torch.equal(slots, wanted)


def test_heads_of_the_controls():
    lengths = torch.arange(1, 9000)
    heads = random_heads(lengths, 64, 8)
    assert torch.equal(heads[100:200], random_heads(lengths[100:200], 64, 8))
    assert (heads.diff(dim=1) > 0).all()
    # All heads are chosen about as often.
    counts = heads.flatten().bincount(minlength=64)
    assert counts.min() > 0.8 * counts.max()
    weights = torch.tensor([[1.0, -5.0, 2.0, 0.0], [1.0, 5.0, 0.0, 3.0]])
    assert heaviest_heads(weights, 2).tolist() == [1, 3]


def test_the_heaviest_heads_stay():
    short = make_inputs("random", 6, 8, TOPK, seed=2)
    first, later = (make_inputs("random", 6, 8, 700, seed=i) for i in range(2))
    chosen, heaviest = [], {}
    for layer, inputs in ((0, short), (0, first), (0, later), (1, later)):
        q, weights, index_k, batch = batch_of([inputs])
        indexer = EvaluationIndexer("heaviest-heads", HEADS, TOPK, {}, layer, heaviest)
        chosen.append(indexer.select(q, weights, index_k, None, batch).heads.long())
    # A prompt of which all is selected says nothing of the heads to come.
    assert torch.equal(chosen[0][0], heaviest_heads(short.weights, HEADS))
    assert torch.equal(chosen[1][0], heaviest_heads(first.weights, HEADS))
    assert not torch.equal(chosen[1], chosen[0])
    assert torch.equal(chosen[2], chosen[1])
    assert torch.equal(chosen[3][0], heaviest_heads(later.weights, HEADS))
    assert not torch.equal(chosen[3], chosen[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", SCORED)
def test_on_a_gpu_up_to_ties(name):
    inputs = make_inputs("random", 700, 64, 9000).to("cuda")
    q, weights, index_k, batch = batch_of([make_inputs("random", 700, 64, 9000)])
    tensors = batch.page_table, batch.cu_rows, batch.lengths
    batch = Batch(*(x.cuda() for x in tensors), batch.rows)
    indexer = EvaluationIndexer(name, 8, 2048, {}, 0)
    found = indexer.select(q.cuda(), weights.cuda(), index_k.cuda(), None, batch)
    scored, shared = inputs[:2], ()
    if found.heads is not None:
        scored = reference.of_heads(*scored, found.heads.long())
    if found.shared_q is not None:
        shared = found.shared_q, found.shared_scale
    scored = *scored, *inputs[2:4], *shared
    ours, exact = selections.token_scores(*scored), reference.token_scores(*scored)
    assert (ours - exact).abs().max() < 1e-4 * exact.abs().max()
    if name == "hisa":
        wanted = reference.hisa(*inputs, 2048)
    else:
        wanted = reference.best_of(exact, *inputs, 2048)
    both = (reference.members(x, 9000) for x in (found.indices.long(), wanted))
    assert torch.logical_xor(*both).float().sum(1).max() <= 4


def test_what_a_result_says_of_hisa():
    """A server of a selection is in test_perplexity."""
    client = Client("none")
    misa = {"active_heads": 4, "rerank_candidates": 0, "router": "sampled"}
    client.info = {"enable_misa": True, "misa": misa, "misa_eval_selection": "hisa"}
    assert tuple(client.variant().values()) == ("hisa", 0, 128, 0, "")
