"""Each kind of inputs is what it says, and a batch is the sequences that it was made of."""

import pytest
import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.index_k_cache import read_pages
from sglang.srt.layers.misa.testing.batches import (
    make_batch,
    random_inputs,
    write_batch,
    write_cache,
)
from sglang.srt.layers.misa.testing.inputs import (
    DATA_KINDS,
    FP8_MAX,
    KINDS,
    make_inputs,
    quantize,
    sample_stride,
)

ROWS, HEADS, TOKENS = 8, 64, 4096


def scores_of(inputs, active_heads=None):
    """float32 [T, S], by the heads that the pooled router chooses or by all."""
    q, weights, k, k_scale, lengths = inputs
    if active_heads is not None:
        means = reference.page_means(k, k_scale)
        heads = reference.route(q, weights, means, lengths, active_heads, 1024)
        q, weights = reference.of_heads(q, weights, heads)
    return reference.token_scores(q, weights, k, k_scale)


def distinct(scores) -> list:
    """How many different scores each row has."""
    return [len(row.unique()) for row in scores]


def make(kind):
    return make_inputs(kind, ROWS, HEADS, TOKENS)


@pytest.mark.parametrize("kind", [*dict.fromkeys(KINDS + DATA_KINDS), "integers"])
def test_shapes_types_and_repetition(kind):
    inputs = make_inputs(kind, 5, 16, 300, seed=3)
    q, weights, k, k_scale, lengths = inputs
    assert (q.shape, q.dtype) == ((5, 16, 128), torch.float8_e4m3fn)
    assert (weights.shape, weights.dtype) == ((5, 16), torch.float32)
    assert (k.shape, k.dtype) == ((300, 128), torch.float8_e4m3fn)
    assert (k_scale.shape, k_scale.dtype) == ((300,), torch.float32)
    assert lengths.tolist() == [296, 297, 298, 299, 300]
    for x in (q, weights, k, k_scale):
        assert x.float().isfinite().all() and x.is_contiguous()
    again = make_inputs(kind, 5, 16, 300, seed=3)
    other = make_inputs(kind, 5, 16, 300, seed=4)
    for mine, same in zip(inputs, again):
        assert torch.equal(mine.float(), same.float())
    assert not torch.equal(inputs.q.float(), other.q.float())


def test_gaussian_heads_differ_and_nothing_ties():
    inputs = make("gaussian")
    scores = scores_of(inputs, 8)
    assert (scores == 0).float().mean() < 0.01
    assert min(distinct(scores)) > 0.99 * TOKENS
    means = reference.page_means(inputs.k, inputs.k_scale)
    estimates = reference.head_estimates(inputs.q, inputs.weights, means, inputs.lengths, 1024)  # fmt: skip
    assert estimates.topk(8).values.sum() > 0.3 * estimates.sum()


def test_rare_heads_leave_most_scores_at_zero():
    inputs = make("rare")
    zero = (scores_of(inputs, 8) == 0).float().mean(1)
    assert zero.min() > 0.90 and zero.max() < 0.94
    zero = (scores_of(inputs) == 0).float().mean(1)
    assert zero.min() > 0.6 and zero.max() < 0.7


def test_equal_keys_have_one_score():
    assert distinct(scores_of(make("equal"), 8)) == [1] * ROWS


def test_few_keys_have_few_scores():
    inputs = make("few")
    assert len(inputs.k.float().unique(dim=0)) == 64
    counts = distinct(scores_of(inputs, 8))
    assert max(counts) <= 64 and min(counts) > 55


@pytest.mark.parametrize("kind, sign", [("rising", 1), ("falling", -1)])
@pytest.mark.parametrize("active_heads", [8, None])
def test_sorted_scores(kind, sign, active_heads):
    assert (scores_of(make(kind), active_heads).diff(dim=1) * sign > 0).all()


def test_runs_of_equal_keys():
    inputs = make_inputs("runs", 1, 8, 100_000)
    k = inputs.k.float()
    changes = int((k[1:] != k[:-1]).any(1).sum())
    assert 60 < changes < 140  # one in 1024
    scores = scores_of(inputs, 4)
    assert len(scores.unique()) <= changes + 1


@pytest.mark.parametrize(
    "tokens, stride",
    [
        (1, 1),
        (256, 1),
        (257, 2),
        (512, 2),
        (513, 4),
        (32768, 128),
        (32769, 256),
        (131_071, 512),
    ],
)
def test_the_stride_of_the_sample(tokens, stride):
    assert sample_stride(tokens) == stride


def test_periodic_keys_are_others_at_one_place_of_a_stride():
    inputs, usual = make("periodic"), make("gaussian")
    stride = sample_stride(TOKENS)
    last = torch.arange(TOKENS) % stride == stride - 1
    k, expected = inputs.k.float(), usual.k.float()
    assert torch.equal(k[~last], expected[~last])
    assert torch.equal(k[last], -expected[last])
    # The products of queries and keys have opposite means there and elsewhere.
    products = reference.dot(inputs.q[0], inputs.k) * inputs.k_scale
    inside, outside = products[:, last].mean(1), products[:, ~last].mean(1)
    assert torch.corrcoef(torch.stack([inside, outside]))[0, 1] < -0.9


def test_dummy_weights_leave_masses_of_ties():
    inputs = make("dummy")
    assert (inputs.q.float() == 0).float().mean() > 0.95
    scores = scores_of(inputs, 8)
    for row in scores:
        _, counts = row.unique(return_counts=True)
        assert counts.max() > TOKENS / 10


def test_zeros_and_huge():
    assert not scores_of(make("zeros")).any()
    scores = scores_of(make("huge")).abs()
    assert (scores.argmax(1) == TOKENS // 3).all()


def test_extremes_reach_the_ends_of_fp8():
    q = make("extremes").q.float()
    assert q.max() == FP8_MAX and q[q > 0].min() == 2.0**-9


def test_twins():
    q, weights = make("twins")[:2]
    assert torch.equal(q[:, ::2].float(), q[:, 1::2].float())
    assert torch.equal(weights[:, ::2], weights[:, 1::2])


def test_integers_are_exact_in_any_order():
    inputs = make("integers")
    backwards = inputs._replace(q=inputs.q.flip(1), weights=inputs.weights.flip(1))
    assert torch.equal(scores_of(inputs), scores_of(backwards))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantize(power_of_two):
    x = torch.randn(100, 128) * torch.logspace(-8, 3, 100)[:, None]
    q, scale = quantize(x, power_of_two)
    tiny = x.abs().amax(1) < 1e-4
    assert tiny.any() and (scale[tiny] >= 1e-4 / FP8_MAX).all()
    if power_of_two:
        assert torch.equal(scale.log2(), scale.log2().round())
    error = (q.float() * scale[:, None] - x).abs()
    assert (error <= x.abs() / 16 + scale[:, None] * 2.0**-10).all()


def test_a_batch_holds_its_sequences():
    batch = make_batch("random", [(2, 130), (3, 64), (1, 1)], 16, padded_rows=2)
    assert batch.cu_rows.tolist() == [0, 2, 5, 6] and len(batch.q) == 8
    assert batch.row_sequence().tolist() == [0, 0, 1, 1, 1, 2]
    for b, (sequence, rows) in enumerate(batch.rows()):
        k, k_scale = read_pages(batch.index_k, batch.pages(b))
        tokens = len(sequence.k)
        assert torch.equal(k[:tokens].float(), sequence.k.float())
        assert torch.equal(k_scale[:tokens], sequence.k_scale)
        assert torch.equal(batch.q[rows].float(), sequence.q.float())
        assert torch.equal(batch.lengths[rows].long(), sequence.lengths)
        means = reference.page_means(sequence.k, sequence.k_scale)
        assert torch.equal(batch.pooled_keys[batch.pages(b)[: len(means)]], means)
    pages = torch.cat([batch.pages(b) for b in range(3)])
    assert len(pages.unique()) == len(pages) and (pages > 0).all()


def test_the_page_table_is_that_of_the_seed():
    batches = [write_batch([random_inputs(1, 8, 700, seed=i)], seed=5) for i in (0, 1)]
    assert torch.equal(batches[0].page_table, batches[1].page_table)


def test_a_cache_holds_its_sequence():
    inputs = random_inputs(1, 8, 200, seed=0)
    index_k, page_table = write_cache(inputs)
    k, k_scale = read_pages(index_k, page_table)
    assert torch.equal(k[:200].float(), inputs.k.float())
    assert torch.equal(k_scale[:200], inputs.k_scale)
