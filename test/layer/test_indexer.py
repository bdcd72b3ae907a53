"""Selection through the paged cache is the one defined on the plain tensors."""

from dataclasses import replace

import pytest
import torch
from checks import check_record
from marks import needs_gpu

from sglang.srt.layers.misa import reference, torch_operations
from sglang.srt.layers.misa.batch import Batch
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.indexer import MisaIndexer
from sglang.srt.layers.misa.pooled_keys import PooledKeys
from sglang.srt.layers.misa.testing.batches import write_cache
from sglang.srt.layers.misa.testing.inputs import KINDS, make_inputs

HEADS, TOPK = 32, 128
SAMPLED = MisaConfig("sampled", 2, decode="misa")
POOLED = MisaConfig("pooled", 3, 256, decode="misa")
CONFIGS = {
    "single stage": replace(SAMPLED, active_heads=3),
    "hierarchical": replace(SAMPLED, active_heads=3, rerank_candidates=320),
    "all heads": replace(SAMPLED, active_heads=HEADS),
    "the shared head alone": replace(SAMPLED, active_heads=1),
    "all heads but one": replace(SAMPLED, active_heads=HEADS - 1),
    "pooled": POOLED,
    "pooled, hierarchical": replace(POOLED, rerank_candidates=320),
    "pooled, all heads": replace(POOLED, active_heads=HEADS),
    "pooled, one head, blocks of a page": replace(
        POOLED, active_heads=1, block_size=64
    ),
}
ROUTERS = {"sampled": SAMPLED, "pooled": POOLED}


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


class Cached:
    """One sequence in the cache of a device, with its page means."""

    def __init__(self, inputs, device):
        index_k, page_table = write_cache(inputs)
        self.device = device
        self.index_k, self.page_table = index_k.to(device), page_table.to(device)
        self.q, self.weights, _, _, self.lengths = inputs.to(device)
        pooled = PooledKeys([self.index_k])
        tokens = torch.arange(len(inputs.k), device=device)
        slots = self.page_table[tokens // 64].long() * 64 + tokens % 64
        pooled.update(0, self.index_k, slots)
        self.pooled_keys = pooled.layers[0]

    def batch(self, ragged: bool) -> Batch:
        """The rows as an extend batch of one sequence, or as a decode batch of sequences that share their pages."""
        rows, lengths = len(self.q), self.lengths.int()
        if ragged:
            return Batch(
                self.page_table[None],
                int32([0, rows], self.device),
                lengths,
                [rows],
                (int(lengths[0]), int(lengths[-1])),
            )
        return Batch(
            self.page_table.expand(rows, -1),
            int32(range(rows + 1), self.device),
            lengths,
            [1] * rows,
        )

    def select(self, misa, batch, **form):
        pooled_keys = self.pooled_keys if misa.config.pools_keys else None
        return misa.select(
            self.q, self.weights, self.index_k, pooled_keys, batch, **form
        )


def check(misa, inputs, device, *, ragged: bool):
    """Select for all rows, and check them: bit for bit on a CPU, up to ties on a GPU."""
    cached = Cached(inputs, device)
    selection = cached.select(misa, cached.batch(ragged))
    record = {
        **inputs.to(device)._asdict(),
        "decode": not ragged,
        "router": misa.config.router,
        "heads": selection.heads,
        "shared_q": selection.shared_q,
        "shared_scale": selection.shared_scale,
        "positions": selection.indices,
        "page_means": None,
    }
    if misa.config.pools_keys:
        record["page_means"] = cached.pooled_keys[cached.page_table.long()]
    check_record(record, misa.config, TOPK, exact=device == "cpu", **misa.forced)
    return selection


RAGGED = pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "paged"])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
@RAGGED
def test_selects_as_defined(name, kind, ragged, device):
    inputs = make_inputs(kind, rows=40, heads=HEADS, tokens=700)
    check(MisaIndexer(CONFIGS[name], TOPK), inputs, device, ragged=ragged)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 255, 256, 257])
@RAGGED
def test_edges(tokens, ragged, device):
    inputs = make_inputs("random", rows=1, heads=HEADS, tokens=tokens)
    check(MisaIndexer(CONFIGS["hierarchical"], TOPK), inputs, device, ragged=ragged)


def test_a_whole_prompt(device):
    inputs = make_inputs("random", rows=700, heads=HEADS, tokens=700)
    check(MisaIndexer(CONFIGS["single stage"], TOPK), inputs, device, ragged=True)


def test_row_chunks_change_nothing(monkeypatch):
    inputs = make_inputs("random", rows=300, heads=HEADS, tokens=700)
    misa = MisaIndexer(CONFIGS["hierarchical"], TOPK)
    whole = check(misa, inputs, "cpu", ragged=True)
    for workspace in (1, 7 * 700 * 48):
        monkeypatch.setattr(torch_operations, "WORKSPACE_BYTES", workspace)
        chunked = check(misa, inputs, "cpu", ragged=True)
        assert torch.equal(chunked.indices, whole.indices)


@pytest.mark.parametrize(
    "name", ["single stage", "hierarchical", "pooled, hierarchical"]
)
@RAGGED
def test_forced_tokens(name, ragged, device):
    inputs = make_inputs("random", rows=40, heads=HEADS, tokens=700)
    misa = MisaIndexer(CONFIGS[name], TOPK, dict(init_tokens=5, local_tokens=9))
    check(misa, inputs, device, ragged=ragged)


@needs_gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_runs_in_a_captured_cuda_graph(name):
    inputs = make_inputs("random", rows=130, heads=HEADS, tokens=700)
    misa = MisaIndexer(CONFIGS[name], TOPK)
    cached = Cached(inputs, "cuda")
    eager = cached.select(misa, cached.batch(ragged=False)).indices
    # A batch of four whose last row is padding.
    q, weights = cached.q[:4].clone(), cached.weights[:4].clone()
    lengths = torch.ones(4, dtype=torch.int32, device="cuda")
    page_table = cached.page_table.repeat(4, 1)
    batch = Batch(page_table, int32(range(5), "cuda"), lengths, [1] * 4)

    def select():
        pooled_keys = cached.pooled_keys if misa.config.pools_keys else None
        return misa.select(q, weights, cached.index_k, pooled_keys, batch)

    select()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = select().indices
    for first in range(0, 129, 3):
        rows = slice(first, first + 3)
        q[:3] = cached.q[rows]
        weights[:3] = cached.weights[rows]
        lengths[:3] = cached.lengths[rows]
        graph.replay()
        assert torch.equal(out[:3], eager[rows])
        assert out[3].tolist() == [0] + [-1] * (TOPK - 1)


def test_output_forms(device):
    """The kernels write the forms themselves; that they are those of `selection` is seen here."""
    inputs = make_inputs("random", rows=40, heads=HEADS, tokens=700)
    cached = Cached(inputs, device)
    for name in ("single stage", "hierarchical", "pooled", "all heads"):
        misa = MisaIndexer(CONFIGS[name], TOPK)
        for ragged in (True, False):
            batch = cached.batch(ragged)
            positions = cached.select(misa, batch).indices.long()
            slots = cached.select(misa, batch, output="slots").indices
            pages = cached.page_table.long()
            assert torch.equal(
                slots.long(), pages[positions // 64] * 64 + positions % 64
            )
            offsets = 1000 * torch.arange(40, dtype=torch.int32, device=device)
            form = dict(output="ragged", offsets=offsets)
            moved = cached.select(misa, batch, **form).indices
            assert torch.equal(moved.long(), positions + offsets[:, None])


def test_all_heads_are_dsa(device):
    inputs = make_inputs("random", rows=40, heads=HEADS, tokens=700)
    config = replace(SAMPLED, active_heads=HEADS, rerank_candidates=320)
    selection = check(MisaIndexer(config, TOPK), inputs, device, ragged=True)
    assert selection.heads is None
    if device == "cpu":
        expected = reference.dsa(*inputs, TOPK)
        assert torch.equal(selection.indices.long(), expected)
