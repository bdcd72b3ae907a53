"""Rows shared among the ranks of a group: each row is selected for once, and as it is where they are not shared."""

import itertools

import pytest
import torch

from sglang.srt.layers.misa import row_sharding
from sglang.srt.layers.misa.batch import Batch, bounds_of
from sglang.srt.layers.misa.config import DEFAULT_MIN_CONTEXT, MisaConfig
from sglang.srt.layers.misa.indexer import MisaIndexer
from sglang.srt.layers.misa.row_sharding import (
    MIN_WORK,
    SHARE_MULTIPLE,
    pays,
    share_of,
    share_size,
)
from sglang.srt.layers.misa.testing.batches import make_batch

HEADS, TOPK = 32, 128
RANKS = range(1, 9)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("rows", [0, 1, 7, 64, 65, 500, 512, 513, 8191, 8192])
def test_every_row_is_in_one_share(rows, ranks):
    shares = [share_of(rows, ranks, rank) for rank in range(ranks)]
    covered = [range(rows)[share] for share in shares]
    assert list(itertools.chain(*covered)) == list(range(rows))
    size = share_size(rows, ranks)
    assert size % SHARE_MULTIPLE == 0 and size * ranks >= rows
    # What is gathered is every share, filled up to `size`, one after the other: rows lie where they were.
    full = [share.stop - share.start == size for share in shares]
    assert full == sorted(full, reverse=True)
    for rank, share in enumerate(shares):
        assert share.start == min(rank * size, rows)


def test_pays():
    """From so much work on, for any two ranks alike, and never with a rank that has no rows."""
    assert pays(8192, 128 << 10, 4) and pays(2048, DEFAULT_MIN_CONTEXT[64], 2)
    assert not pays(8192, 128 << 10, 1)
    assert not pays(256, DEFAULT_MIN_CONTEXT[64], 2)
    assert not pays(16, MIN_WORK, 2), "the second rank would have none"
    for rows, context, ranks in itertools.product(
        range(1, 3000, 7), (20000, 200000, 2000000), RANKS
    ):
        if pays(rows, context, ranks):
            shares = [share_of(rows, ranks, rank) for rank in range(ranks)]
            assert all(share.start < share.stop for share in shares)


# The lengths of the rows of each sequence: prompts from their beginning and behind a prefix; every third row of each, as
# context parallelism deals them out.
RAGGED = {
    "one": [range(1, 301)],
    "several": [range(1, 201), range(700, 701), range(90, 150), range(301, 400)],
    "dealt out": [range(2, 301, 3), range(650, 701, 3), range(149, 150, 3)],
}


def batch_of(spans, device):
    """The tensors of a batch, and the layer's `Batch`."""
    specs = [(span[-1], span[-1]) for span in spans]
    tensors = make_batch("random", specs, HEADS)
    ends = itertools.accumulate((span[-1] for span in spans), initial=0)
    # Of the rows of all tokens, those of the spans.
    chosen = [end + length - 1 for end, span in zip(ends, spans) for length in span]
    chosen = torch.tensor(chosen, device=tensors.q.device)
    rows = [len(span) for span in spans]
    batch = Batch(
        page_table=tensors.page_table.to(device),
        cu_rows=torch.tensor([0, *rows]).cumsum(0).int().to(device),
        lengths=tensors.lengths[chosen].to(device),
        rows=rows,
        bounds=bounds_of(spans),
        spans=spans,
    )
    inputs = {
        "q": tensors.q.view(torch.uint8)[chosen].view(tensors.q.dtype).to(device),
        "weights": tensors.weights[chosen].to(device),
        "index_k": tensors.index_k.to(device),
        "pooled_keys": tensors.pooled_keys.to(device),
    }
    return batch, inputs


@pytest.fixture(params=RAGGED.values(), ids=RAGGED.keys())
def spans(request):
    return request.param


@pytest.fixture
def small_shares(monkeypatch):
    monkeypatch.setattr(row_sharding, "SHARE_MULTIPLE", 8)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_parts(spans, ranks, small_shares):
    """Of 64 ranks some have no rows."""
    batch, _ = batch_of(spans, "cpu")
    count, seen = len(batch.lengths), []
    for rank in range(ranks):
        rows = share_of(count, ranks, rank)
        part = batch.part(batch.within(rows))
        lengths = part.lengths.tolist()
        assert lengths == batch.lengths[rows].tolist()
        assert part.bounds == (min(lengths, default=0), max(lengths, default=0))
        assert part.cu_rows.dtype == torch.int32
        assert part.cu_rows.tolist() == list(itertools.accumulate(part.rows, initial=0))
        assert part.page_table is batch.page_table
        for sequence, mine in part.sequences():
            seen += [(sequence, length) for length in lengths[mine]]
    assert seen == [(i, length) for i, span in enumerate(spans) for length in span]


CONFIGS = {
    "sampled": MisaConfig(active_heads=3),
    "re-ranked": MisaConfig(active_heads=3, rerank_candidates=192),
    "pooled": MisaConfig("pooled", 3, 128),
    "all heads": MisaConfig(active_heads=HEADS),
}


def select(config, batch, inputs, rows=slice(None), part=None):
    """The indices of some rows of a batch, selected as those of `part`."""
    inputs = dict(inputs)
    if not config.pools_keys:
        inputs["pooled_keys"] = None
    for name in ("q", "weights"):
        inputs[name] = inputs[name][rows]
    misa = MisaIndexer(config=config, topk=TOPK)
    return misa.select(**inputs, batch=part or batch).indices


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_shares_are_what_all_rows_are(config, spans, device, small_shares):
    """Bit for bit, on a GPU too; and a rank that takes its neighbour's rows is found out."""
    batch, inputs = batch_of(spans, device)
    expected = select(config, batch, inputs)
    count, ranks = len(batch.lengths), 3

    def gathered(shift):
        own = []
        for rank in range(ranks):
            rows = share_of(count, ranks, (rank + shift) % ranks)
            part = batch.part(batch.within(rows))
            own.append(select(config, batch, inputs, rows, part))
        return torch.cat(own)

    assert torch.equal(gathered(0), expected)
    assert not torch.equal(gathered(1), expected)


class Group:
    """A group of which this rank alone is there."""

    def __init__(self, world_size, rank):
        self.world_size, self.rank_in_group, self.given = world_size, rank, None

    def all_gather(self, own, dim):
        assert dim == 0
        self.given = own
        return torch.cat([own + rank for rank in range(self.world_size)])


def test_gather_fills_up_a_short_share():
    own = torch.arange(20, dtype=torch.int32).view(10, 2)
    group = Group(3, 2)
    out = row_sharding.gather(own, 138, group)
    assert group.given.shape == (64, 2) and group.given.dtype == torch.int32
    assert torch.equal(group.given[:10], own)
    assert out.shape == (138, 2) and torch.equal(out[128:], own + 2)
    full = torch.zeros(64, 2, dtype=torch.int32)
    assert row_sharding.gather(full, 192, group).shape == (192, 2)
    assert group.given is full
