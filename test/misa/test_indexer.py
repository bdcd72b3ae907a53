"""Selection through the paged cache equals the definition on the plain tensors, bit for bit."""

import pytest
import torch
from conftest import needs_gpu
from inputs import KINDS, make_inputs, write_cache

from sglang.srt.layers.misa import indexer as indexer_module
from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.indexer import MisaIndexer, Sequence
from sglang.srt.layers.misa.pooled_keys import PooledKeys

TOPK = 128
CONFIGS = {
    "single stage": MisaConfig(active_heads=3, block_size=256),
    "hierarchical": MisaConfig(active_heads=3, block_size=256, rerank_candidates=300),
    "all heads": MisaConfig(active_heads=16, block_size=256),
    "one head, blocks of a page": MisaConfig(active_heads=1, block_size=64),
}


def options(config):
    return dict(
        active_heads=config.active_heads,
        block_size=config.block_size,
        rerank_candidates=config.rerank_candidates,
    )


def run(misa, inputs, device, *, ragged: bool):
    """Select for all rows, as an extend batch does (ragged) or row by row as decode does."""
    index_k, page_table = write_cache(inputs)
    index_k, page_table = index_k.to(device), page_table.to(device)
    q, weights, k, _, lengths = inputs.to(device)
    pooled = PooledKeys([index_k])
    tokens = torch.arange(len(k), device=device)
    slots = page_table[tokens // 64].long() * 64 + tokens % 64
    pooled.update(0, index_k, slots, num_seqs=1)
    if ragged:
        sequences = [Sequence(0, slice(0, len(q)), len(k), page_table, int(lengths[0]))]
    else:
        sequences = [
            Sequence(0, slice(t, t + 1), len(page_table) * 64, page_table)
            for t in range(len(q))
        ]
    out = torch.full((len(q), misa.topk), -7, dtype=torch.int32)
    for sequence in sequences:
        for rows, selection in misa.select_sequence(
            q, weights, index_k, pooled.layers[0], lengths.int(), sequence
        ):
            out[rows] = selection.positions.cpu()
    return out.long()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "paged"])
def test_selects_as_defined(name, kind, ragged, device):
    config = CONFIGS[name]
    inputs = make_inputs(kind, rows=40, heads=16, tokens=700)
    out = run(MisaIndexer(config, TOPK), inputs, device, ragged=ragged)
    assert torch.equal(out, reference.misa(*inputs, TOPK, **options(config)))


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "paged"])
def test_edges(tokens, ragged, device):
    config = CONFIGS["hierarchical"]
    inputs = make_inputs("random", rows=1, heads=16, tokens=tokens)
    out = run(MisaIndexer(config, TOPK), inputs, device, ragged=ragged)
    assert torch.equal(out, reference.misa(*inputs, TOPK, **options(config)))


def test_a_whole_prompt(device):
    config = CONFIGS["single stage"]
    inputs = make_inputs("random", rows=700, heads=16, tokens=700)
    out = run(MisaIndexer(config, TOPK), inputs, device, ragged=True)
    assert torch.equal(out, reference.misa(*inputs, TOPK, **options(config)))


def test_row_chunks_change_nothing(device, monkeypatch):
    inputs = make_inputs("random", rows=300, heads=16, tokens=700)
    misa = MisaIndexer(CONFIGS["hierarchical"], TOPK)
    whole = run(misa, inputs, device, ragged=True)
    for workspace in (1, 7 * 700 * 48):
        monkeypatch.setattr(indexer_module, "WORKSPACE_BYTES", workspace)
        assert torch.equal(run(misa, inputs, device, ragged=True), whole)


def test_forced_tokens(device):
    config = CONFIGS["hierarchical"]
    forced = dict(init_tokens=5, local_tokens=9)
    inputs = make_inputs("random", rows=40, heads=16, tokens=700)
    out = run(MisaIndexer(config, TOPK, forced), inputs, device, ragged=True)
    expected = reference.misa(*inputs, TOPK, **options(config), **forced)
    assert torch.equal(out, expected)


def test_prompt_tokens_below_min_context_are_scored_by_all_heads(device):
    config = MisaConfig(active_heads=2, block_size=64, min_context=500)
    inputs = make_inputs("random", rows=300, heads=16, tokens=650)
    out = run(MisaIndexer(config, TOPK), inputs, device, ragged=True)
    routed = reference.misa(*inputs, TOPK, active_heads=2, block_size=64)
    dense = reference.dsa(*inputs, TOPK)
    short = inputs.lengths < 500
    assert short.any() and (~short).any()
    assert torch.equal(out[short], dense[short])
    assert torch.equal(out[~short], routed[~short])
    assert not torch.equal(dense, routed)


@needs_gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_runs_in_a_captured_cuda_graph(name):
    config = CONFIGS[name]
    inputs = make_inputs("random", rows=130, heads=16, tokens=700)
    index_k, page_table = write_cache(inputs)
    index_k, page_table = index_k.cuda(), page_table.cuda()
    pooled = PooledKeys([index_k])
    tokens = torch.arange(700, device="cuda")
    slots = page_table[tokens // 64].long() * 64 + tokens % 64
    pooled.update(0, index_k, slots, num_seqs=1)
    q, weights = inputs.q[:1].cuda(), inputs.weights[:1].cuda()
    lengths = torch.ones(1, dtype=torch.int32, device="cuda")
    sequence = Sequence(0, slice(0, 1), len(page_table) * 64, page_table)

    def select():
        args = q, weights, index_k, pooled.layers[0], lengths, sequence
        ((_, selection),) = MisaIndexer(config, TOPK).select_sequence(*args)
        return selection.positions

    select()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = select()
    expected = reference.misa(*inputs, TOPK, **options(config))
    for t, length in enumerate(inputs.lengths.tolist()):
        q.copy_(inputs.q[t : t + 1])
        weights.copy_(inputs.weights[t : t + 1])
        lengths.fill_(length)
        graph.replay()
        assert torch.equal(out[0].long().cpu(), expected[t])
