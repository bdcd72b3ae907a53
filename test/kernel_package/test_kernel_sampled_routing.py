"""The sampled router and the shared head, in prefill and decode, are the reference's, and the same bits wherever a row lies."""

import random

import pytest
import torch
from hopper import (
    decode,
    needs_hopper,
    prefill,
    rerank,
    route_sampled,
    sampled_decode,
    sampled_prefill,
)
from kernel_ops import captured, route_sampled_topk_decode

from sglang.srt.layers.misa.testing.batches import (
    make_batch,
    random_inputs,
    write_batch,
)
from sglang.srt.layers.misa.testing.inputs import DATA_KINDS, KINDS
from sglang.srt.layers.misa.testing.judge import (
    SharedHead,
    check_batch,
    check_form,
    check_slots,
)

pytestmark = needs_hopper

# Around the lengths at which the stride of the samples doubles, and around pages.
EDGES = [1, 2, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1024, 1025, 16_384, 16_385]


def same_bits(some, others) -> bool:
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(some, others)
    )


def shared_options(routed):
    return dict(shared_q=routed[1], shared_scale=routed[2])


@pytest.mark.parametrize("kind", [*KINDS, *DATA_KINDS])
@pytest.mark.parametrize("num_heads", [32, 64])
@pytest.mark.parametrize("active_heads", [1, 8])
def test_kinds(kind, num_heads, active_heads):
    batch = make_batch(kind, [(33, 4500), (5, 2100), (9, 9)], num_heads, padded_rows=3)
    routed = route_sampled(batch, active_heads)
    check_slots(routed, batch, active_heads)
    for topk in (64, 2048):
        out = prefill(batch, routed[0], topk, **shared_options(routed))
        check_batch(out, batch, routed[0], topk, shared=SharedHead(*routed[1:]))


@pytest.mark.parametrize("active_heads", [1, 2, 4, 9, 16, 17, 31, 32, 33, 63])
def test_slots(active_heads):
    batch = make_batch("random", [(40, 6000), (9, 2500)], 64)
    routed = route_sampled(batch, active_heads)
    check_slots(routed, batch, active_heads)
    out = prefill(batch, routed[0], 2048, **shared_options(routed))
    check_batch(out, batch, routed[0], 2048, shared=SharedHead(*routed[1:]))


@pytest.mark.parametrize("num_heads", [32, 64])
@pytest.mark.parametrize("tokens", EDGES)
def test_edges_of_the_stride(tokens, num_heads):
    batch = write_batch(
        [random_inputs(min(tokens, 20), num_heads, tokens, seed=tokens)]
    )
    check_slots(route_sampled(batch, 8), batch, 8)


def test_long_context():
    batch = write_batch([random_inputs(20, 64, 200_000, seed=1)])
    routed = route_sampled(batch, 8)
    check_slots(routed, batch, 8)
    out = prefill(batch, routed[0], 2048, **shared_options(routed))
    check_batch(out, batch, routed[0], 2048, shared=SharedHead(*routed[1:]))


@pytest.mark.parametrize("num_heads", [32, 64])
def test_a_row_alone(num_heads):
    """A row's heads and shared head are the same bits in a prefill, alone, in decode, in verify and in another batch."""
    inputs = random_inputs(48, num_heads, 5000, seed=7)
    whole = route_sampled(
        write_batch([random_inputs(3, num_heads, 300, seed=8), inputs]), 8
    )
    whole = [x[3:] for x in whole]
    alone = [inputs.of_rows(slice(i, i + 1)) for i in range(48)]
    assert same_bits(whole, route_sampled(write_batch(alone, seed=2), 8))
    for rows in (1, 2, 3, 4, 6, 8):
        parts = [inputs.of_rows(slice(i, i + rows)) for i in range(0, 48, rows)]
        assert same_bits(
            whole, sampled_decode(write_batch(parts, seed=rows), 8, 64)[:3]
        )


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("num_heads", [32, 64])
@pytest.mark.parametrize("kind", ["random", "zeros", "few", "rare"])
def test_decode(kind, rows, num_heads):
    specs = [(rows, max(rows, n)) for n in (1, 64, 700, 2048, 2049, 9000, 33_000)]
    batch = make_batch(kind, specs, num_heads)
    *routed, out = sampled_decode(batch, 8, 2048)
    check_slots(routed, batch, 8)
    check_batch(out, batch, routed[0], 2048, shared=SharedHead(*routed[1:]))
    apart = decode(batch, routed[0], 2048, **shared_options(routed))
    assert torch.equal(out, apart)


@pytest.mark.parametrize("active_heads", [1, 8, 20])
@pytest.mark.parametrize("num_heads", [32, 64])
def test_prefill_is_the_router_and_the_selection(num_heads, active_heads):
    """In one operation, bit for bit; of several sequences, and padding."""
    specs = [(300, 9000), (1, 2049), (700, 40_000), (5, 64)]
    batch = make_batch("random", specs, num_heads, padded_rows=3)
    options = dict(output="slots", init_tokens=3, local_tokens=70)
    *routed, out = sampled_prefill(batch, active_heads, 2048, **options)
    assert same_bits(routed, route_sampled(batch, active_heads))
    shared = shared_options(routed)
    apart = prefill(batch, routed[0], 2048, **shared, **options)
    assert torch.equal(out, apart)
    # Re-ranked, it is the three.
    forced = dict(init_tokens=3, local_tokens=70)
    for count in (2048, 4096, 8192):
        *again, out = sampled_prefill(
            batch, active_heads, 2048, rerank_candidates=count, **options
        )
        assert same_bits(routed, again)
        candidates = prefill(batch, routed[0], count, **shared, **forced)
        assert torch.equal(out, rerank(batch, candidates, 2048, **options))


@pytest.mark.parametrize("rows", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("num_heads", [32, 64])
def test_rows_of_any_lengths(rows, num_heads):
    """Each row of a sequence has its own length, and the samples that go with it."""
    ends = [0, *EDGES, 2047, 2048, 2049, 40_000]
    rng = random.Random(rows)
    sequences = []
    for b in range(9):
        inputs = random_inputs(rows, num_heads, max(ends), seed=b)
        lengths = inputs.lengths.new_tensor(sorted(rng.choices(ends, k=rows)))
        sequences.append(inputs._replace(lengths=lengths))
    batch = write_batch(sequences)
    *routed, out = sampled_decode(batch, 8, 2048)
    check_slots(routed, batch, 8)
    check_batch(out, batch, routed[0], 2048, shared=SharedHead(*routed[1:]))
    alone = [s.of_rows(slice(i, i + 1)) for s in sequences for i in range(rows)]
    assert same_bits(routed, route_sampled(write_batch(alone, seed=1), 8))


@pytest.mark.parametrize("rows", [2, 4, 5, 8])
def test_graph_and_repetition(rows):
    batch = make_batch("random", [(rows, n) for n in (20_000, 3000, 700)], 64)
    eager = route_sampled_topk_decode(batch, 8, 2048)
    out, replay = captured(lambda: route_sampled_topk_decode(batch, 8, 2048))
    for _ in range(100):
        replay()
    assert same_bits(eager, out)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_no_number(value):
    """As many heads as asked for, distinct; the other rows get what is theirs."""
    batch = make_batch("random", [(9, 3000), (3, 700)], 64)
    weights = batch.weights.clone()
    weights[::3, 1::2] = float(value)
    broken = batch._replace(weights=weights)
    heads, *shared = route_sampled(broken, 8)
    check_form(heads, torch.full_like(batch.lengths, 7))
    assert (heads < 64).all()
    out = prefill(broken, heads, 64, shared_q=shared[0], shared_scale=shared[1])
    check_form(out, batch.lengths.clamp(max=64))
    assert (out < batch.lengths[:, None]).all()
    fine = torch.arange(len(heads), device=heads.device) % 3 > 0
    whole = route_sampled(batch, 8)
    assert same_bits([heads[fine], shared[1][fine]], [whole[0][fine], whole[2][fine]])


@pytest.mark.parametrize("length", [1000, 2047, 2048, 2049, 3000, 8191, 8192, 8193])
@pytest.mark.parametrize("plateau", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("topk", [2048, 8192])
def test_plateaus(length, plateau, topk):
    """Where `length` tokens share a score, the ones at the lowest positions win, however many score more."""
    tokens = 20_000
    for above in (0, 1, 1000, 2047, 2048, 5000):
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(above))
        scores = torch.full((tokens,), -2.0)
        scores[order[:above]] = 2.0
        scores[order[above : above + length]] = plateau
        inputs = random_inputs(5, 64, tokens, seed=above)
        # One head is the first dimension of a key; the shared head of u = e_0 has no relu.
        q = torch.zeros(5, 64, 128)
        q[:, :, 0] = 1
        keys = torch.zeros(tokens, 128)
        keys[:, 0] = scores
        inputs = inputs._replace(
            q=q.to(torch.float8_e4m3fn).to(inputs.q.device),
            k=keys.to(torch.float8_e4m3fn).to(inputs.q.device),
            k_scale=torch.ones(tokens, device=inputs.q.device),
        )
        batch = write_batch([inputs])
        heads = torch.empty(5, 0, dtype=torch.int32, device=batch.q.device)
        shared = SharedHead(
            batch.q[:, 0].contiguous(), torch.ones(5, device=batch.q.device)
        )
        options = dict(shared_q=shared.query, shared_scale=shared.scale)
        out = prefill(batch, heads, topk, **options)
        check_batch(out, batch, heads, topk, shared=shared, exact=True)
        singles = write_batch([inputs.of_rows(slice(i, i + 1)) for i in range(5)])
        check_batch(
            decode(singles, heads, topk, **options),
            singles,
            heads,
            topk,
            shared=shared,
            exact=True,
        )
