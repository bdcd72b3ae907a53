"""Slots and ragged positions are the positions, in the form that the attention takes."""

import pytest
import torch
from hopper import decode, needs_hopper, prefill, rerank

from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE
from sglang.srt.layers.misa.testing.batches import DEVICE, make_batch, random_heads
from sglang.srt.layers.misa.testing.judge import check_batch, check_form

pytestmark = needs_hopper

NAN = float("nan")

OPS = {
    "prefill": lambda batch, **options: prefill(
        batch, random_heads(batch, 8), 2048, **options
    ),
    "prefill with all heads": lambda batch, **options: prefill(
        batch, None, 2048, **options
    ),
    "decode": lambda batch, **options: decode(
        batch, random_heads(batch, 8), 2048, **options
    ),
    "rerank": lambda batch, **options: rerank(
        batch, prefill(batch, random_heads(batch, 8), 2560), 2048, **options
    ),
}
# Rows longer than topk, shorter, as long, and with a partial page at the end.
SPECS = [(4, 5000), (4, 700), (4, 2050), (4, 4)]


@pytest.mark.parametrize("name", OPS)
def test_forms(name):
    batch = make_batch("random", SPECS, 64)
    positions = OPS[name](batch)
    there = positions >= 0
    sequence = torch.arange(len(SPECS), device=DEVICE).repeat_interleave(4)
    pages = batch.page_table[sequence].gather(1, positions.clamp(min=0).long() // 64)
    expected = (pages * PAGE_SIZE + positions % PAGE_SIZE).where(there, -1)
    slots = OPS[name](batch, output="slots")
    assert slots.dtype == torch.int32 and torch.equal(slots, expected)
    offsets = torch.arange(len(positions), dtype=torch.int32, device=DEVICE) * 1000
    expected = (positions + offsets[:, None]).where(there, -1)
    ragged = OPS[name](batch, output="ragged", offsets=offsets)
    assert ragged.dtype == torch.int32 and torch.equal(ragged, expected)


@pytest.mark.parametrize("output", ["positions", "slots", "ragged"])
def test_padded_rows_are_minus_one_in_every_form(output):
    batch = make_batch("random", SPECS, 64, padded_rows=9)
    offsets = torch.full((len(batch.q),), 50, dtype=torch.int32, device=DEVICE)
    options = dict(output=output, offsets=offsets if output == "ragged" else None)
    for heads in (random_heads(batch, 8), None):
        assert (prefill(batch, heads, 2048, **options)[-9:] == -1).all()
    candidates = prefill(batch, None, 2560)
    assert (rerank(batch, candidates, 2048, **options)[-9:] == -1).all()


@pytest.mark.parametrize("op", [prefill, decode])
@pytest.mark.parametrize("active_heads", [8, None])
def test_what_is_not_visible_does_not_matter(op, active_heads):
    """Keys behind a row's length, and pages of nobody, may hold NaN."""
    batch = make_batch("random", SPECS, 64)
    index_k = torch.full_like(batch.index_k, 255)
    for b, (sequence, _) in enumerate(batch.rows()):
        pages = batch.page_table[b, : -(-len(sequence.k) // PAGE_SIZE)].long()
        index_k[pages] = batch.index_k[pages]
        used = len(sequence.k) % PAGE_SIZE
        if used:
            keys = index_k[pages[-1], : PAGE_SIZE * 128]
            keys[used * 128 :] = 255
            index_k[pages[-1], PAGE_SIZE * 128 + used * 4 :] = 255
    heads = random_heads(batch, active_heads)
    out = op(batch._replace(index_k=index_k), heads, 2048)
    check_batch(out, batch, heads, 2048)
    assert torch.equal(out, op(batch, heads, 2048))


@pytest.mark.parametrize("name", OPS)
def test_scores_that_are_not_numbers_come_last(name):
    """A key whose scale is NaN is selected only by rows that see too few others; every row has all that are due to it."""
    batch = make_batch("random", SPECS, 64)
    lost = torch.tensor([5, 100, 1000, 2047], device=DEVICE)
    for b, (sequence, _) in enumerate(batch.rows()):
        for position in lost[lost < len(sequence.k)].tolist():
            page = batch.index_k[int(batch.page_table[b, position // PAGE_SIZE])]
            page[PAGE_SIZE * 128 :].view(torch.float32)[position % PAGE_SIZE] = NAN
    out = OPS[name](batch)
    check_form(out, batch.lengths.clamp(max=2048))
    assert (out < batch.lengths[:, None]).all()
    enough = batch.lengths >= 2048 + len(lost)
    assert enough.any() and not torch.isin(out[enough], lost).any()


@pytest.mark.parametrize("op", [prefill, decode])
def test_the_page_table_may_be_a_part_of_a_larger_one(op):
    """Its rows are contiguous, the table need not be."""
    batch = make_batch("random", SPECS, 64)
    larger = torch.full((len(SPECS), 1000), 1, dtype=torch.int32, device=DEVICE)
    larger[:, : batch.page_table.shape[1]] = batch.page_table
    part = larger[:, : batch.page_table.shape[1]]
    heads = random_heads(batch, 8)
    out = op(batch._replace(page_table=part), heads, 2048)
    assert torch.equal(out, op(batch, heads, 2048))
