"""The sampled router on the paged cache, bit for bit against its definition."""

import pytest
import torch

from sglang.srt.layers.misa import reference, sampled_router
from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE, read_pages, read_tokens
from sglang.srt.layers.misa.testing.batches import write_cache
from sglang.srt.layers.misa.testing.inputs import KINDS, make_inputs


def bits(tensor):
    return tensor.view(
        {1: torch.uint8, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    )


def assert_same(given, expected):
    for one, other in zip(given, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("shape", [(300, 5, 64), (300, 1, 1), (7, 2, 3), (1, 4, 4)])
def test_samples_are_added_one_by_one(shape):
    """Whatever lies side by side in memory, and where another order gives another sum."""
    samples = torch.randn(shape, dtype=torch.float64)
    samples[::3] *= 1e16
    mean = reference.mean(samples)
    side_by_side = samples.movedim(0, -1).contiguous().movedim(-1, 0)
    for x in (samples, side_by_side):
        assert_same([sampled_router.sequential_sum(x) / len(x)], [mean])


def route_both(inputs, active_heads):
    """By the module, and by the definition."""
    index_k, pages = write_cache(inputs.to("cpu"))
    cache = index_k.to(inputs.q.device), pages.to(inputs.q.device)
    rows = inputs.q, inputs.weights
    return (
        sampled_router.route_sampled(*rows, *cache, inputs.lengths, active_heads),
        reference.route_sampled(*inputs, active_heads),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("active_heads", [1, 5, 16])
def test_routes_as_defined(kind, active_heads, device):
    """Rows of all strides, in no order, more of them than are taken at once."""
    inputs = make_inputs(kind, rows=150, heads=16, tokens=1500).to(device)
    edges = torch.tensor([0, 1, 2, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1500])
    others = torch.randint(1501, (150,), generator=torch.Generator().manual_seed(0))
    others[:: len(others) // len(edges)][: len(edges)] = edges
    inputs = inputs._replace(lengths=others.to(device))
    assert_same(*route_both(inputs, active_heads))


@pytest.mark.parametrize("tokens", [1, 63, 64, 255, 256, 257, 511, 512, 513, 1025])
def test_one_row(tokens, device):
    inputs = make_inputs("random", rows=1, heads=16, tokens=tokens).to(device)
    assert_same(*route_both(inputs, 5))


def test_all_of_a_row_s_slopes_and_estimates():
    """Those of the heads that are not routed too: what is not chosen does not hide them."""
    inputs = make_inputs("random", rows=70, heads=16, tokens=540)
    given = sampled_router.slopes_and_estimates(
        *inputs[:2], *write_cache(inputs), inputs.lengths
    )
    assert_same(given, reference.slopes_and_estimates(*inputs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_behind_a_row_do_not_matter(bad):
    inputs = make_inputs("random", rows=100, heads=8, tokens=500)
    spoilt = inputs._replace(k_scale=inputs.k_scale.clone())
    spoilt.k_scale[450:] = bad
    kept = inputs.lengths <= 450
    for one, other in zip(route_both(spoilt, 3)[0], route_both(inputs, 3)[0]):
        assert torch.equal(bits(one[kept]), bits(other[kept]))
        if one.dtype == torch.int64:
            assert all(len(set(row)) == 2 and max(row) < 8 for row in one.tolist())
            assert one.min() >= 0


def test_strides():
    lengths = torch.arange(140000, dtype=torch.int32)
    strides = sampled_router.sample_strides(lengths)
    for length in [*range(3000), *range(131000, 131200)]:
        expected = 1
        while length > 256 * expected:
            expected *= 2
        assert strides[length] == expected
    counts = lengths // strides
    assert (counts[257:] >= 128).all() and (counts <= 256).all()


def test_single_tokens_of_the_cache():
    inputs = make_inputs("random", rows=1, heads=1, tokens=300)
    index_k, pages = write_cache(inputs)
    keys, scales = read_pages(index_k, pages)
    positions = torch.tensor([299, 0, 63, 64, 127, 64])
    slots = pages[positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
    assert_same(read_tokens(index_k, slots), (keys[positions], scales[positions]))
