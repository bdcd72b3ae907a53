"""update_pooled_keys writes the reference's bytes into complete pages, and nothing elsewhere."""

import pytest
import sgl_kernel_misa
import torch
from hopper import needs_hopper
from kernel_ops import captured

from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE
from sglang.srt.layers.misa.testing.batches import DEVICE, make_batch
from sglang.srt.layers.misa.testing.inputs import KINDS

pytestmark = needs_hopper


def updated(batch, slots, dtype=torch.int64):
    """Pooled keys after an update, from a buffer of recognisable bytes, and that buffer."""
    rng = torch.Generator(DEVICE).manual_seed(1)
    shape = batch.pooled_keys.shape
    bits = torch.randint(
        -(2**15), 2**15, shape, generator=rng, device=DEVICE, dtype=torch.int16
    )
    pooled = bits.clone().view(torch.bfloat16)
    sgl_kernel_misa.update_pooled_keys(batch.index_k, slots.to(dtype), pooled)
    return pooled.view(torch.int16), bits


def check_pages(pooled, before, batch, complete):
    """The pages that were completed hold their means, all others but page 0 what they held."""
    expected = before.clone()
    expected[complete] = batch.pooled_keys.view(torch.int16)[complete]
    # Page 0 holds padding only: whether its mean is written is nobody's business.
    assert torch.equal(pooled[1:], expected[1:])


def slots_of(batch, b, tokens):
    tokens = tokens.to(DEVICE)
    pages = batch.page_table[b].long()[tokens // PAGE_SIZE]
    return pages * PAGE_SIZE + tokens % PAGE_SIZE


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000, 20000])
def test_a_prompt(tokens, dtype):
    batch = make_batch("random", [(1, tokens)], 32)
    slots = slots_of(batch, 0, torch.arange(tokens))
    pooled, before = updated(batch, slots, dtype)
    complete = batch.page_table[0, : tokens // PAGE_SIZE].long()
    check_pages(pooled, before, batch, complete)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    batch = make_batch(kind, [(1, 700), (1, 640)], 32)
    slots = torch.cat(
        [slots_of(batch, b, torch.arange(n)) for b, n in enumerate((700, 640))]
    )
    pooled, before = updated(batch, slots)
    complete = torch.cat([batch.page_table[0, :10], batch.page_table[1, :10]]).long()
    check_pages(pooled, before, batch, complete)


def test_slots_in_any_order():
    batch = make_batch("random", [(1, 3000)], 32)
    slots = slots_of(batch, 0, torch.randperm(3000))
    pooled, before = updated(batch, slots)
    check_pages(pooled, before, batch, batch.page_table[0, : 3000 // PAGE_SIZE].long())


def test_a_later_chunk_completes_a_page_begun_before():
    batch = make_batch("random", [(1, 700)], 32)
    slots = slots_of(batch, 0, torch.arange(100, 300))
    pooled, before = updated(batch, slots)
    check_pages(pooled, before, batch, batch.page_table[0, 1:4].long())


@pytest.mark.parametrize("sequences", [1, 2, 33, 256])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_decode(sequences, dtype):
    """A token of each sequence, every other one the last of its page; padded slots behind them."""
    batch = make_batch("random", [(1, 64 + b % 3) for b in range(sequences)], 32)
    last = torch.arange(sequences) % 2 == 0
    slots = [
        slots_of(batch, b, torch.tensor([63 if last[b] else 62]))
        for b in range(sequences)
    ]
    slots = torch.cat(slots + [slots[0].new_tensor([0, 0, 63])])
    pooled, before = updated(batch, slots, dtype)
    check_pages(
        pooled, before, batch, batch.page_table[: len(last), 0][last.to(DEVICE)].long()
    )


@pytest.mark.parametrize("slots", [[], [0], [0] * 70, [64, 65, 126], [62]])
def test_nothing_complete(slots):
    batch = make_batch("random", [(1, 700)], 32)
    slots = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
    pooled, before = updated(batch, slots)
    assert torch.equal(pooled[1:], before[1:])


def test_runs_in_a_captured_cuda_graph():
    batch = make_batch("random", [(1, 256)], 32)
    pooled = torch.zeros_like(batch.pooled_keys)
    slots = torch.zeros(4, dtype=torch.int64, device=DEVICE)

    def update():
        sgl_kernel_misa.update_pooled_keys(batch.index_k, slots, pooled)
        return pooled

    _, replay = captured(update)
    pages = batch.page_table[0, :4].long()
    slots.copy_(pages * PAGE_SIZE + torch.tensor([63, 62, 63, 0], device=DEVICE))
    replay()
    assert torch.equal(pooled[pages[[0, 2]]], batch.pooled_keys[pages[[0, 2]]])
    assert not pooled[pages[[1, 3]]].any()
