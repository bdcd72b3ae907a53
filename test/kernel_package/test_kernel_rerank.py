"""rerank, and the hierarchical chain that ends with it."""

import pytest
import torch
from hopper import decode, needs_hopper, prefill, rerank, route

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.testing.batches import (
    integer_inputs,
    make_batch,
    random_inputs,
    write_batch,
)
from sglang.srt.layers.misa.testing.inputs import KINDS
from sglang.srt.layers.misa.testing.judge import check_batch, check_heads

pytestmark = needs_hopper

EXACT_KINDS = ("equal", "zeros", "rising", "falling")


def random_candidates(batch, count, seed=0):
    """Up to `count` visible positions of every row, ascending, -1 padded."""
    rng = torch.Generator(batch.q.device).manual_seed(seed)
    out = torch.full((len(batch.q), count), -1, device=batch.q.device)
    for sequence, rows in batch.rows():
        shape = len(sequence.q), len(sequence.k)
        scores = torch.rand(shape, generator=rng, device=batch.q.device)
        allowed = reference.visible(sequence.lengths, len(sequence.k))
        out[rows] = reference.top_positions(scores, allowed, count)
    return out.int()


def check(batch, candidates, topk, exact=False, **forced):
    out = rerank(batch, candidates, topk, **forced)
    options = dict(candidates=candidates, exact=exact, **forced)
    check_batch(out, batch, None, topk, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_heads", [32, 64])
@pytest.mark.parametrize("topk, count", [(64, 256), (2048, 4096)])
@pytest.mark.parametrize("many", [0, 200])
def test_kinds(kind, num_heads, topk, count, many):
    """With few rows in all, a cluster of blocks shares each."""
    specs = [(33, 6000), (5, 2100), (40 + many, 60)]
    batch = make_batch(kind, specs, num_heads)
    check(batch, random_candidates(batch, count), topk, kind in EXACT_KINDS)


@pytest.mark.parametrize("count", [64, 1024, 2048, 2112, 8192, 16_384])
@pytest.mark.parametrize("num_heads", [32, 64])
def test_candidate_counts(count, num_heads):
    """Fewer candidates than topk, as many, and more; rows with fewer tokens than candidates."""
    tokens = (20_000, 2047, 2048, 2049, 1, 65, 8193)
    sequences = [random_inputs(min(n, 7), num_heads, n, seed=n) for n in tokens]
    batch = write_batch(sequences, padded_rows=3)
    check(batch, random_candidates(batch, count), 2048)


@pytest.mark.parametrize("forced", [(4, 0), (0, 100), (65, 129)], ids=str)
def test_forced_tokens(forced):
    init_tokens, local_tokens = forced
    batch = make_batch("random", [(33, 6000), (5, 100)], 64)
    forced = dict(init_tokens=init_tokens, local_tokens=local_tokens)
    check(batch, random_candidates(batch, 4096), 2048, **forced)
    check(batch, random_candidates(batch, 4096), 64, **forced)


def test_exact_scores():
    tokens = (12_000, 3000, 100)
    batch = write_batch([integer_inputs(40, 64, n, seed=n) for n in tokens])
    for topk, count in ((64, 1024), (2048, 8192)):
        check(batch, random_candidates(batch, count), topk, exact=True)


def test_one_row_a_sequence():
    """As decode calls it."""
    batch = make_batch("random", [(1, 1 + b * 97 % 3000) for b in range(100)], 64)
    check(batch, random_candidates(batch, 512), 64)


def test_no_candidates_no_positions():
    batch = make_batch("random", [(5, 3000)], 64)
    candidates = torch.full((5, 4096), -1, dtype=torch.int32, device=batch.q.device)
    assert (rerank(batch, candidates, 2048) == -1).all()


def test_all_tokens_as_candidates_give_what_all_heads_select():
    batch = write_batch([integer_inputs(33, 64, 8000, seed=1)])
    candidates = prefill(batch, None, 8192)
    assert torch.equal(rerank(batch, candidates, 2048), prefill(batch, None, 2048))


@pytest.mark.parametrize("op", [prefill, decode])
@pytest.mark.parametrize("num_heads", [32, 64])
@pytest.mark.parametrize("rerank_candidates", [0, 1024])
def test_the_chain_is_misa(op, num_heads, rerank_candidates):
    """Routing, scoring and re-ranking together against `reference.misa`, on exact scores."""
    tokens = (7000, 1500, 500, 300, 50)
    batch = write_batch([integer_inputs(4, num_heads, n, seed=n) for n in tokens])
    heads = route(batch, 8, 1024)
    check_heads(heads, batch, 8, 1024)
    if rerank_candidates:
        candidates = op(batch, heads, rerank_candidates)
        out = rerank(batch, candidates, 512)
    else:
        out = op(batch, heads, 512)
    same = 0
    for sequence, rows in batch.rows():
        means = reference.page_means(sequence.k, sequence.k_scale)
        expected_heads = reference.route(
            sequence.q, sequence.weights, means, sequence.lengths, 8, 1024
        )
        expected = reference.misa(
            *sequence, 512, block_size=1024, rerank_candidates=rerank_candidates
        )
        # Where two heads tie, another one may score.
        agree = (heads[rows] == expected_heads).all(1)
        assert torch.equal(out[rows][agree].long(), expected[agree])
        same += int(agree.sum())
    assert same >= len(out) - 2


@pytest.mark.parametrize("num_heads", [32, 64])
def test_the_chain_on_a_long_context(num_heads):
    """m = 8192, k = 2048: every stage against the reference on what the stage before it gave."""
    batch = write_batch([random_inputs(40, num_heads, 40_000, seed=7)], padded_rows=5)
    heads = route(batch, 8, 1024)
    check_heads(heads, batch, 8, 1024)
    candidates = prefill(batch, heads, 8192)
    check_batch(candidates, batch, heads, 8192)
    check(batch, candidates, 2048)
