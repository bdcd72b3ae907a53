"""The same bits every time, and inside CUDA graphs whose inputs change between replays."""

import pytest
import sgl_kernel_misa
import torch
from hopper import needs_hopper, poison
from kernel_ops import (
    captured,
    rerank,
    route,
    route_topk_decode,
    topk_decode,
    topk_prefill,
)

from sglang.srt.layers.misa.testing.batches import (
    make_batch,
    random_heads,
    random_inputs,
    write_batch,
)
from sglang.srt.layers.misa.testing.judge import check_batch, check_heads
from sglang.srt.layers.misa.testing.score_inputs import distributed

pytestmark = needs_hopper

RUNS = 100


def check_runs(function) -> None:
    """The same bits every time, whatever the memory held before."""
    first = function()
    for run in range(RUNS):
        if run % 10 == 0:
            poison()
        assert torch.equal(function(), first)


@pytest.mark.parametrize("op", [topk_prefill, topk_decode])
@pytest.mark.parametrize("active_heads", [8, None])
def test_the_same_bits_in_every_run(op, active_heads):
    batch = make_batch("random", [(4, 20_000), (4, 3000), (4, 700)], 64)
    heads = random_heads(batch, active_heads)
    check_runs(lambda: op(batch, heads, 2048))


@pytest.mark.parametrize("op", [topk_prefill, topk_decode])
@pytest.mark.parametrize(
    "name", ["every 16th is tiny", "two values, one more", "half zeros"]
)
def test_the_same_bits_where_a_threshold_is_misjudged(op, name):
    batch = write_batch([distributed(name, 4, 64, 20_000, 2048)] * 2)
    check_runs(lambda: op(batch, None, 2048))


def test_route_and_rerank_give_the_same_bits_in_every_run():
    batch = make_batch("random", [(60, 20_000), (33, 3000)], 64)
    heads = route(batch, 8, 1024)
    candidates = topk_prefill(batch, heads, 8192)
    check_runs(lambda: route(batch, 8, 1024))
    check_runs(lambda: rerank(batch, candidates, 2048))


@pytest.mark.parametrize("rows_per_seq", [1, 4, 8])
def test_the_same_bits_in_every_step(rows_per_seq):
    """The kernels of a step overlap with each other, and those of one step follow those of another without a pause."""
    sequences = [random_inputs(rows_per_seq, 64, 40_000 + n, seed=n) for n in range(12)]
    batch = write_batch(sequences)
    heads, first = route_topk_decode(batch, 8, 1024, 2048)
    steps, replay = captured(
        lambda: [route_topk_decode(batch, 8, 1024, 2048)[1] for _ in range(8)]
    )
    for _ in range(RUNS):
        for out in steps:
            out.fill_(7)
        replay()
        for out in steps:
            assert torch.equal(out, first)


@pytest.mark.parametrize("rows_per_seq", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("active_heads", [8, None])
def test_the_same_bits_in_every_replay(rows_per_seq, active_heads):
    sequences = [random_inputs(rows_per_seq, 64, n, seed=n) for n in (30_000, 5000, 99)]
    batch = write_batch(sequences)
    heads = random_heads(batch, active_heads)
    first = topk_decode(batch, heads, 2048)
    out, replay = captured(lambda: topk_decode(batch, heads, 2048))
    for _ in range(RUNS):
        out.fill_(7)
        replay()
        assert torch.equal(out, first)


def overwrite(batch, other) -> None:
    """Give a batch the content of another one of the same shapes, in place."""
    for name in ("q", "weights", "index_k", "pooled_keys", "page_table", "lengths"):
        getattr(batch, name).copy_(getattr(other, name))


@pytest.mark.parametrize("rows_per_seq", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("rerank_candidates", [0, 4096])
def test_a_decode_step_in_a_graph(rows_per_seq, rerank_candidates):
    """Routing, selection and re-rank captured once; then other queries, keys, pages and lengths each replay."""
    ends = [9000, 0, 1, 2047, 2048, 2049, 64, 65, 8191]

    def batch_of(seed):
        sequences = []
        for b in range(len(ends)):
            one = random_inputs(rows_per_seq, 64, max(ends), seed=100 * seed + b)
            end = ends[(b + seed) % len(ends)]
            lengths = torch.arange(end - rows_per_seq + 1, end + 1).clamp(min=0)
            sequences.append(one._replace(lengths=lengths))
        return write_batch(sequences, seed=seed)

    batch = batch_of(0)

    def step():
        if not rerank_candidates:
            return route_topk_decode(batch, 8, 1024, 2048)
        heads, candidates = route_topk_decode(batch, 8, 1024, rerank_candidates)
        return heads, candidates, rerank(batch, candidates, 2048)

    (heads, selected, *reranked), replay = captured(step)
    for seed in range(6):
        now = batch_of(seed)
        overwrite(batch, now)
        replay()
        check_heads(heads, now, 8, 1024)
        check_batch(selected, now, heads, rerank_candidates or 2048)
        for out in reranked:
            check_batch(out, now, None, 2048, candidates=selected)


def test_prefill_in_a_graph():
    """Serving runs prefill eagerly; still nothing in it waits for the host."""
    batch = make_batch("random", [(33, 6000), (40, 2500)], 64)
    heads = random_heads(batch, 8)
    first = topk_prefill(batch, heads, 2048)
    out, replay = captured(lambda: topk_prefill(batch, heads, 2048))
    out.fill_(7)
    replay()
    assert torch.equal(out, first)


def test_nothing_waits_for_the_gpu():
    batch = make_batch("random", [(4, 6000), (4, 2500)], 64)
    slots = torch.arange(200, device=batch.q.device)
    pooled_keys = batch.pooled_keys.clone()

    def all_ops():
        sgl_kernel_misa.update_pooled_keys(batch.index_k, slots, pooled_keys)
        heads = route(batch, 8, 1024)
        for scoring in (heads, None):
            topk_prefill(batch, scoring, 2048)
            topk_decode(batch, scoring, 2048)
        rerank(batch, route_topk_decode(batch, 8, 1024, 4096)[1], 2048)

    all_ops()  # whatever is set up once
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_ops()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream():
    """What was queued before on the same stream has happened when the op runs."""
    batch = make_batch("random", [(33, 20_000)], 64)
    heads = random_heads(batch, 8)
    first = topk_prefill(batch, heads, 2048)
    late = batch._replace(weights=torch.zeros_like(batch.weights))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        late.weights.copy_(batch.weights)
        out = topk_prefill(late, heads, 2048)
    torch.cuda.synchronize()
    assert torch.equal(out, first)
