"""Random shapes, 10,000 rows and more in all. Half of them have exact scores, full of ties."""

import random

import pytest
import sgl_kernel_misa
from hopper import decode, needs_hopper, prefill, route

from sglang.srt.layers.misa.testing.batches import (
    integer_inputs,
    random_heads,
    random_inputs,
    write_batch,
)
from sglang.srt.layers.misa.testing.judge import check_batch, check_heads

pytestmark = needs_hopper

SEEDS = range(20)
ROWS = 550  # at least, of every seed of prefill: 11,000 rows


def some_heads(rng):
    num_heads = rng.choice([32, 64])
    active_heads = rng.choice([1, 2, 3, 4, 8, 8, 8, 16, None])
    return num_heads, active_heads


def tokens_between(rng, low, high):
    """Log-uniform, and every other time at a page's edge."""
    tokens = int(low * (high / low) ** rng.random())
    if rng.random() < 0.5:
        tokens = tokens // 64 * 64 + rng.choice([-1, 0, 1])
    return max(1, tokens)


def options_of(rng):
    if rng.random() < 0.7:
        return {}
    return dict(init_tokens=rng.randrange(100), local_tokens=rng.randrange(200))


@pytest.mark.parametrize("seed", SEEDS)
def test_prefill(seed):
    rng = random.Random(seed)
    num_heads, active_heads = some_heads(rng)
    exact = seed % 2 == 0
    make = integer_inputs if exact else random_inputs
    sequences, rows = [], 0
    while rows < ROWS:
        tokens = tokens_between(rng, 1, rng.choice([300, 3000, 30_000]))
        own = min(tokens, rng.choice([1, 5, 32, rng.randint(1, 300)]))
        inputs = make(own, num_heads, tokens, seed=1000 * seed + len(sequences))
        if rng.random() < 0.3:
            lengths = sorted(rng.randint(1, tokens) for _ in range(own))
            inputs = inputs._replace(lengths=inputs.lengths.new_tensor(lengths))
        sequences.append(inputs)
        rows += own
    batch = write_batch(sequences, padded_rows=rng.choice([0, 0, 13]), seed=seed)
    topk = rng.choice([64, 128, 512, 2048, 2048, 2048, 4096])
    forced = options_of(rng)
    heads = random_heads(batch, active_heads, seed)
    out = prefill(batch, heads, topk, **forced)
    check_batch(out, batch, heads, topk, exact=exact, **forced)


@pytest.mark.parametrize("seed", SEEDS)
def test_decode(seed):
    rng = random.Random(seed)
    num_heads, active_heads = some_heads(rng)
    exact = seed % 2 == 0
    make = integer_inputs if exact else random_inputs
    rows = rng.randint(1, sgl_kernel_misa.MAX_ROWS)
    sequences = []
    for b in range(rng.choice([1, 2, 17, 40, 100])):
        tokens = tokens_between(rng, rows, rng.choice([300, 3000, 30_000]))
        inputs = make(rows, num_heads, tokens, seed=1000 * seed + b)
        lengths = inputs.lengths.clamp(min=0) * (rng.random() < 0.9)
        sequences.append(inputs._replace(lengths=lengths))
    batch = write_batch(sequences, seed=seed)
    topk = rng.choice([64, 128, 512, 2048, 2048, 2048, 4096])
    forced = options_of(rng)
    heads = random_heads(batch, active_heads, seed)
    out = decode(batch, heads, topk, **forced)
    check_batch(out, batch, heads, topk, exact=exact, **forced)


@pytest.mark.parametrize("seed", SEEDS)
def test_route(seed):
    rng = random.Random(seed)
    num_heads = rng.choice([32, 64])
    sequences = []
    for b in range(rng.choice([1, 5, 20])):
        tokens = tokens_between(rng, 1, 10_000)
        rows = min(tokens, rng.choice([1, 4, 200]))
        sequences.append(random_inputs(rows, num_heads, tokens, seed=1000 * seed + b))
    batch = write_batch(sequences, seed=seed)
    active_heads = rng.randint(1, 32)
    block_size = 64 * rng.choice([1, 2, 3, 5, 16, 32])
    heads = route(batch, active_heads, block_size)
    check_heads(heads, batch, active_heads, block_size)


def test_the_sweep_is_large_enough():
    assert len(SEEDS) * ROWS >= 10_000
