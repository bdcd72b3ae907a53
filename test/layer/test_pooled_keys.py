import pytest
import torch
from marks import needs_gpu

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE, read_pages
from sglang.srt.layers.misa.pooled_keys import BYTES_PER_TOKEN, PooledKeys
from sglang.srt.layers.misa.testing.batches import write_cache, write_pages
from sglang.srt.layers.misa.testing.inputs import KINDS, make_inputs


def slots_of(page_table, first, last):
    token = torch.arange(first, last)
    return (page_table[token // PAGE_SIZE] * PAGE_SIZE + token % PAGE_SIZE).long()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 63, 64, 65, 200, 1000])
def test_means_are_those_of_complete_pages(kind, chunk, device):
    inputs = make_inputs(kind, rows=1, heads=1, tokens=300)
    index_k, page_table = write_cache(inputs)
    pooled = PooledKeys([index_k.to(device)])
    for first in range(0, 300, chunk):
        slots = slots_of(page_table, first, min(first + chunk, 300)).to(device)
        pooled.update(0, index_k.to(device), slots)
    means = pooled.layers[0].cpu()
    expected = reference.page_means(inputs.k, inputs.k_scale)
    assert torch.equal(means[page_table[:4].long()], expected)
    # Neither the page that is not complete nor any page of somebody else's was written.
    others = set(range(1, len(index_k))) - set(page_table[:4].tolist())
    assert not means[sorted(others)].any()


def test_a_page_filled_again_has_a_new_mean(device):
    old, new = (make_inputs("random", 1, 1, 64, seed=seed) for seed in (1, 2))
    index_k, page_table = write_cache(old)
    index_k = index_k.to(device)
    pooled = PooledKeys([index_k])
    pooled.update(0, index_k, slots_of(page_table, 0, 64).to(device))
    page = int(page_table[0])
    moved = new.to(device)
    write_pages(index_k, page_table[:1].long(), moved.k, moved.k_scale)
    for first, last in ((0, 30), (30, 64)):
        slots = slots_of(page_table, first, last).to(device)
        pooled.update(0, index_k, slots)
    (expected,) = reference.page_means(new.k, new.k_scale)
    assert torch.equal(pooled.layers[0][page].cpu(), expected)


def test_many_sequences_in_one_batch(device):
    """Decode: every sequence at another place in its page, padding on slot 0."""
    inputs = make_inputs("random", rows=1, heads=1, tokens=64 * 8)
    index_k, page_table = write_cache(inputs)
    pooled = PooledKeys([index_k.to(device)])
    tokens = torch.tensor([63, 70, 191, 255, 300, 383])
    slots = page_table[tokens // 64].long() * 64 + tokens % 64
    slots = torch.cat([slots, torch.zeros(2, dtype=torch.long)])
    pooled.update(0, index_k.to(device), slots.to(device))
    complete = [0, 2, 3, 5]
    expected = reference.page_means(inputs.k, inputs.k_scale)
    means = pooled.layers[0].cpu()
    assert torch.equal(means[page_table[complete].long()], expected[complete])
    others = set(range(1, len(index_k))) - set(page_table[complete].tolist())
    assert not means[sorted(others)].any()


def test_an_empty_batch_writes_nothing(device):
    index_k = torch.zeros(3, 64 * 132, dtype=torch.uint8, device=device)
    pooled = PooledKeys([index_k])
    empty = torch.zeros(0, dtype=torch.long, device=device)
    pooled.update(0, index_k, empty)
    assert not pooled.layers[0].any()


def test_size():
    index_k = torch.zeros(10, 64 * 132, dtype=torch.uint8)
    assert PooledKeys([index_k] * 3).nbytes == 10 * PAGE_SIZE * BYTES_PER_TOKEN * 3


def test_read_pages(device):
    inputs = make_inputs("random", rows=1, heads=1, tokens=200).to(device)
    index_k, page_table = write_cache(inputs.to("cpu"))
    keys, scales = read_pages(index_k.to(device), page_table.to(device))
    assert torch.equal(keys[:200].view(torch.uint8), inputs.k.view(torch.uint8))
    assert torch.equal(scales[:200], inputs.k_scale)


@needs_gpu
def test_runs_in_a_captured_cuda_graph():
    inputs = make_inputs("random", rows=1, heads=1, tokens=64 * 4)
    index_k, page_table = write_cache(inputs)
    index_k = index_k.cuda()
    pooled = PooledKeys([index_k])
    slots = torch.zeros(4, dtype=torch.long, device="cuda")
    pooled.update(0, index_k, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pooled.update(0, index_k, slots)
    slots.copy_(page_table * 64 + torch.tensor([63, 62, 63, 0]))
    graph.replay()
    expected = reference.page_means(inputs.k, inputs.k_scale)[[0, 2]]
    means = pooled.layers[0].cpu()
    assert torch.equal(means[page_table[[0, 2]].long()], expected)
    assert not means[page_table[[1, 3]].long()].any()


def test_an_idle_rank_stores_nothing(device):
    """No slots, or those of padding, slot 0, alone."""
    inputs = make_inputs("random", rows=1, heads=1, tokens=64)
    index_k, _ = write_cache(inputs)
    pooled = PooledKeys([index_k.to(device)])
    pooled.layers[0].fill_(7)
    for count in (0, 5):
        slots = torch.zeros(count, dtype=torch.long, device=device)
        pooled.update(0, index_k.to(device), slots)
    assert (pooled.layers[0] == 7).all()
