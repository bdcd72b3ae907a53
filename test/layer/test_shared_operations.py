"""MISA with a shared head as operations on batches: what the definition selects, bit for bit."""

import pytest
import torch

from sglang.srt.layers.misa import reference, torch_operations
from sglang.srt.layers.misa.testing.batches import write_cache
from sglang.srt.layers.misa.testing.inputs import KINDS, Inputs, make_inputs

HEADS, TOPK = 16, 128


class Sequences:
    """Sequences with rows of their own, in one cache, in the order of the batch."""

    def __init__(self, *sequences: Inputs):
        self.sequences = sequences
        caches = [write_cache(inputs) for inputs in sequences]
        before, tables = 0, []
        for index_k, pages in caches:
            tables.append(torch.nn.functional.pad(pages + before, (0, 60 - len(pages))))
            before += len(index_k)
        self.index_k = torch.cat([index_k for index_k, _ in caches])
        self.page_table = torch.stack(tables)
        self.q = torch.cat([inputs.q for inputs in sequences])
        self.weights = torch.cat([inputs.weights for inputs in sequences])
        self.lengths = torch.cat([inputs.lengths for inputs in sequences]).int()
        rows = torch.tensor([0] + [len(inputs.q) for inputs in sequences])
        self.cu_rows = rows.cumsum(0).int()

    @property
    def query(self):
        return self.q, self.weights

    @property
    def cache(self):
        return self.index_k, self.page_table, self.cu_rows, self.lengths

    def route(self, active_heads):
        return torch_operations.route_sampled(*self.query, *self.cache, active_heads)

    def select(self, active_heads, topk, **options):
        """What the indexer calls for rows of prompts."""
        *_, selected = torch_operations.route_sampled_topk_prefill(
            *self.query, *self.cache, active_heads, topk, **options
        )
        return selected

    def expected(self, *args, **options):
        return torch.cat(
            [
                reference.misa_shared(*inputs, *args, **options)
                for inputs in self.sequences
            ]
        ).int()


def batch(kind="random", heads=HEADS):
    rng = torch.Generator().manual_seed(1)
    sequences = []
    for seed, (rows, tokens) in enumerate([(70, 900), (1, 257), (5, 40), (30, 600)]):
        inputs = make_inputs(kind, rows, heads, tokens, seed)
        lengths = torch.randint(tokens + 1, (rows,), generator=rng)
        sequences.append(inputs._replace(lengths=lengths))
    return Sequences(*sequences)


OPTIONS = [
    {"active_heads": 1},
    {"active_heads": 5},
    {"active_heads": HEADS - 1},
    {"active_heads": 5, "rerank_candidates": 256},
    {"active_heads": 1, "rerank_candidates": 256, "local_tokens": 70},
    {"active_heads": 5, "init_tokens": 3, "local_tokens": 64},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_selects_as_defined(kind, options):
    rows = batch(kind)
    selected = rows.select(topk=TOPK, **options)
    assert selected.dtype == torch.int32
    assert torch.equal(selected, rows.expected(TOPK, **options))


def test_routes_as_defined():
    rows = batch()
    heads, shared_q, shared_scale = rows.route(5)
    assert (heads.dtype, shared_q.dtype) == (torch.int32, torch.float8_e4m3fn)
    of_each = [reference.route_sampled(*inputs, 5) for inputs in rows.sequences]
    expected = [torch.cat([x.float() for x in part]) for part in zip(*of_each)]
    for given, wanted in zip((heads, shared_q, shared_scale), expected, strict=True):
        assert torch.equal(given.float(), wanted)


@pytest.mark.parametrize("rows_per_seq", [1, 4, 8])
def test_decode_is_prefill(rows_per_seq):
    sequences = [make_inputs("random", rows_per_seq, HEADS, n) for n in (300, 64, 700)]
    rows = Sequences(*sequences)
    heads, shared_q, shared_scale = rows.route(5)
    shared = {"shared_q": shared_q, "shared_scale": shared_scale}
    cache = rows.index_k, rows.page_table, rows_per_seq, rows.lengths
    decoded = torch_operations.topk_decode(*rows.query, heads, *cache, TOPK, **shared)
    assert torch.equal(decoded, rows.expected(TOPK, active_heads=5))
    filled = torch_operations.topk_prefill(
        *rows.query, heads, *rows.cache, TOPK, **shared
    )
    assert torch.equal(decoded, filled)
    *routed, selected = torch_operations.route_sampled_topk_decode(
        *rows.query, *cache, 5, TOPK
    )
    for given, wanted in zip(routed, (heads, shared_q, shared_scale), strict=True):
        assert given.dtype == wanted.dtype and torch.equal(
            given.float(), wanted.float()
        )
    assert torch.equal(selected, decoded)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[3]], ids=str)
def test_scores_that_are_no_numbers(bad, options):
    """As many positions as ever, each once."""
    rows = batch()
    rows.weights[::3, 2], rows.weights[::5] = bad, bad
    heads, *_ = rows.route(5)
    for row in heads.tolist():
        assert len(set(row)) == 4 and set(row) <= {*range(HEADS)}
    selected = rows.select(topk=TOPK, **options)
    for row, length in zip(selected.tolist(), rows.lengths.tolist()):
        there = [position for position in row if position >= 0]
        assert len(there) == len(set(there)) == min(TOPK, length)
        assert max(there, default=-1) < length


def change(name, how):
    return pytest.param(name, how, id=f"{name}: {how.__name__}")


def double(x):
    return x.double()


def fewer(x):
    return x[:-1]


def column(x):
    return x[:, None]


def strided(x):
    return torch.stack([x, x], -1)[..., 0]


@pytest.mark.parametrize(
    "name, how",
    [
        change("shared_q", double),
        change("shared_q", fewer),
        change("shared_q", strided),
        change("shared_scale", double),
        change("shared_scale", fewer),
        change("shared_scale", column),
        change("shared_scale", strided),
    ],
)
def test_a_shared_head_of_another_form_is_refused(name, how):
    rows = batch()
    heads, shared_q, shared_scale = rows.route(5)
    shared = {"shared_q": shared_q, "shared_scale": shared_scale}
    shared[name] = how(shared[name])
    with pytest.raises(ValueError, match=name):
        torch_operations.topk_prefill(*rows.query, heads, *rows.cache, TOPK, **shared)


def test_what_does_not_go_together_is_refused():
    rows = batch()
    heads, shared_q, shared_scale = rows.route(5)
    scored = *rows.query, heads, *rows.cache
    select, both = torch_operations.topk_prefill, (shared_q, shared_scale)
    both = dict(zip(("shared_q", "shared_scale"), both))
    with pytest.raises(ValueError, match="come together"):
        select(*scored, TOPK, shared_q=shared_q)
    with pytest.raises(ValueError, match="come together"):
        select(*scored, TOPK, shared_scale=shared_scale)
    with pytest.raises(ValueError, match="all heads"):
        select(*rows.query, None, *rows.cache, TOPK, **both)
    for active_heads in (0, HEADS):
        with pytest.raises(ValueError, match=f"active_heads={active_heads}"):
            rows.route(active_heads)
    with pytest.raises(ValueError, match="lengths"):
        rows.lengths = rows.lengths.long()
        rows.route(5)
