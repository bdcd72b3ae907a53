import pytest
import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.router import route, running_block_means
from sglang.srt.layers.misa.testing.inputs import KINDS, make_inputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [64, 192, 1024])
def test_routes_as_defined(kind, block_size, device):
    inputs = make_inputs(kind, rows=700, heads=16, tokens=1500).to(device)
    means = reference.page_means(inputs.k, inputs.k_scale)
    # A page that is still being filled has whatever mean its last owner left.
    means = torch.cat([means, torch.full_like(means[:1], 1e4)])
    routed = route(inputs.q, inputs.weights, means, inputs.lengths, 5, block_size)
    expected = reference.route(
        inputs.q, inputs.weights, means, inputs.lengths, 5, block_size
    )
    assert torch.equal(routed, expected)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 255, 256, 257])
def test_page_and_block_edges(tokens, device):
    inputs = make_inputs("random", rows=1, heads=16, tokens=tokens).to(device)
    means = reference.page_means(inputs.k, inputs.k_scale)
    means = torch.cat([means, torch.full_like(means.new_empty(3, 128), 1e4)])
    routed = route(inputs.q, inputs.weights, means, inputs.lengths, 5, 128)
    expected = reference.route(inputs.q, inputs.weights, means, inputs.lengths, 5, 128)
    assert torch.equal(routed, expected)


def test_running_block_means_are_those_of_every_prefix(device):
    means = torch.randn(12, 128, device=device).bfloat16()
    running = running_block_means(means, block_size=256)
    for page in range(12):
        expected = reference.block_means(means[: page + 1], block_size=256)[-1]
        assert torch.equal(running[page], expected)
