"""Inputs of the indexer for one sequence: random ones, those on which a selection goes wrong first, and those that look like data.

Everything is drawn from a seed, on the device that is asked for; another device draws other numbers.
"""

from typing import NamedTuple, Tuple

import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.index_k_cache import HEAD_DIM, PAGE_SIZE
from sglang.srt.layers.misa.reference import FP8_MAX

# SGLang quantizes a vector of smaller values than this as if this were its largest one.
SMALLEST_AMAX = 1e-4


class Inputs(NamedTuple):
    """One sequence as `reference` takes it."""

    q: torch.Tensor
    weights: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    lengths: torch.Tensor

    def to(self, device: str) -> "Inputs":
        return Inputs(*(tensor.to(device) for tensor in self))

    def of_rows(self, rows: torch.Tensor) -> "Inputs":
        """The same sequence with some of its rows, int64 [n]."""
        q = self.q.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
        return self._replace(
            q=q, weights=self.weights[rows], lengths=self.lengths[rows]
        )


class Draw:
    """Random numbers from one seed on one device, float32 but for the integers."""

    def __init__(self, seed: int, device: str):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def uniform(self, *shape) -> torch.Tensor:
        """Between 0 and 1."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def integers(self, end: int, *shape) -> torch.Tensor:
        """From 0 to end - 1, int64."""
        return torch.randint(end, shape, generator=self.generator, device=self.device)


def fp8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def quantize(
    x: torch.Tensor, power_of_two: bool = False
) -> Tuple[torch.Tensor, torch.Tensor]:
    """float32 [..., 128] -> float8_e4m3fn [..., 128] and its float32 scale [...], as SGLang's `act_quant` does."""
    scale = x.abs().amax(-1).clamp(min=SMALLEST_AMAX) / FP8_MAX
    if power_of_two:
        scale = torch.exp2(scale.log2().ceil())
    return fp8(x / scale[..., None]), scale


def pick(keys: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn [n, 128] at int64 [S]; not every operation of torch takes FP8."""
    return keys.view(torch.uint8)[index].view(torch.float8_e4m3fn)


# --- Values as they come: q and k are drawn in FP8's range, scales and gates of one size.


def random(draw, rows, heads, tokens):
    q = draw.normal(rows, heads, HEAD_DIM) * 100
    weights = draw.normal(rows, heads)
    k = draw.normal(tokens, HEAD_DIM) * 100
    return fp8(q), weights, fp8(k), draw.uniform(tokens) + 0.5


def equal(draw, rows, heads, tokens):
    """All keys are equal, and so all scores of a row."""
    q, weights, k, k_scale = random(draw, rows, heads, tokens)
    return q, weights, pick(k, torch.zeros_like(k_scale).long()), k_scale * 0 + 1


def zeros(draw, rows, heads, tokens):
    """No query meets a key: all scores are exactly 0."""
    q, weights, k, k_scale = random(draw, rows, heads, tokens)
    return fp8(q.float().abs()), weights, fp8(-k.float().abs()), k_scale


def rising(draw, rows, heads, tokens):
    """Every score is higher than the one before it."""
    q, weights, k, _ = random(draw, rows, heads, tokens)
    k = fp8(k[:1].float().abs()).expand(tokens, -1).contiguous()
    k_scale = torch.linspace(0.5, 1.5, tokens, device=draw.device)
    return fp8(q.float().abs()), weights.abs(), k, k_scale


def falling(draw, rows, heads, tokens):
    """Every score is lower than the one before it."""
    q, weights, k, k_scale = rising(draw, rows, heads, tokens)
    return q, weights, k, k_scale.flip(0)


def huge(draw, rows, heads, tokens):
    """One score dwarfs the rest."""
    q, weights, k, k_scale = random(draw, rows, heads, tokens)
    k_scale[tokens // 3] = 1e20
    return q, weights, k, k_scale


def extremes(draw, rows, heads, tokens):
    """FP8's largest and smallest values, scales of 1e-30 to 1e30."""
    values = torch.tensor([FP8_MAX, -FP8_MAX, 2.0**-9, -(2.0**-9), 0.0])
    values = values.to(draw.device)
    q = values[draw.integers(5, rows, heads, HEAD_DIM)]
    k = values[draw.integers(5, tokens, HEAD_DIM)]
    k_scale = 10.0 ** (draw.integers(60, tokens) - 30)
    return fp8(q), draw.normal(rows, heads), fp8(k), k_scale.float()


def twins(draw, rows, heads, tokens):
    """Pairs of equal heads."""
    q, weights, k, k_scale = random(draw, rows, heads, tokens)
    even = torch.arange(heads, device=draw.device) // 2 * 2
    q = q.view(torch.uint8)[:, even].view(torch.float8_e4m3fn)
    return q, weights[:, even], k, k_scale


# --- Activations: q and k are quantized as SGLang does, gates are small and take q's scale in.


def activations(q, gates, k, power_of_two: bool = False):
    """Quantize q [T, H, 128] and k [S, 128], and fold q's scale into the gates [T, H]: all float32."""
    q, q_scale = quantize(q, power_of_two)
    return q, gates * q_scale, *quantize(k, power_of_two)


def gaussian_gates(draw, rows, heads):
    return draw.normal(rows, heads) * (heads * HEAD_DIM) ** -0.5


def gaussian(draw, rows, heads, tokens):
    """Keys share a mean, and so do a page's keys and a head's queries: heads differ in what they contribute."""
    q = draw.normal(rows, heads, HEAD_DIM) + draw.normal(heads, HEAD_DIM)
    pages = -(-tokens // PAGE_SIZE)
    shift = draw.normal(pages, HEAD_DIM) / 2 + draw.normal(HEAD_DIM)
    k = draw.normal(tokens, HEAD_DIM) + shift.repeat_interleave(PAGE_SIZE, 0)[:tokens]
    return activations(q, gaussian_gates(draw, rows, heads), k)


# Standard deviations that a head's products lie below 0 on average in `rare`: it fires on one token in 96, and of 8 heads
# none does on 92% of the tokens.
RARE_DEVIATIONS = 2.31


def rare(draw, rows, heads, tokens):
    """Heads that rarely fire: any 8 of them score exactly 0 on 92% of the tokens, and all 64 on two thirds."""
    away = torch.nn.functional.normalize(draw.normal(HEAD_DIM), dim=0)
    # Queries of length sqrt(128) across that direction, and keys and queries as far along it, on either side, as it takes.
    ratio = RARE_DEVIATIONS**2
    squared = (ratio + (ratio**2 + 4 * ratio * HEAD_DIM) ** 0.5) / 2
    q = draw.normal(rows, heads, HEAD_DIM)
    q = q - (q @ away)[..., None] * away
    q = torch.nn.functional.normalize(q, dim=-1) * HEAD_DIM**0.5
    q = q - away * squared**0.5
    k = draw.normal(tokens, HEAD_DIM) + away * squared**0.5
    return activations(q, gaussian_gates(draw, rows, heads), k)


FEW = 64


def few(draw, rows, heads, tokens):
    """64 distinct keys, in random order."""
    q, weights, k, k_scale = gaussian(draw, rows, heads, FEW)
    index = draw.integers(FEW, tokens)
    return q, weights, pick(k, index), k_scale[index]


RUN = 1024  # tokens on average


def runs(draw, rows, heads, tokens):
    """Runs of equal keys, 1024 on average."""
    index = (draw.uniform(tokens) < 1 / RUN).long().cumsum(0)
    q, weights, k, k_scale = gaussian(draw, rows, heads, int(index[-1]) + 1)
    return q, weights, pick(k, index), k_scale[index]


def sample_stride(tokens: int) -> int:
    """The router samples one token in so many of a prefix of `tokens` tokens."""
    samples = len(reference.sample_positions(tokens))
    return 1 << (tokens // samples).bit_length() - 1


def periodic(draw, rows, heads, tokens):
    """A text in step with the router's sample: the last key of each of its strides is the opposite of what keys are elsewhere."""
    q, weights, k, k_scale = gaussian(draw, rows, heads, tokens)
    stride = sample_stride(tokens)
    last = torch.arange(tokens, device=draw.device) % stride == stride - 1
    return q, weights, fp8(k.float() * torch.where(last, -1, 1)[:, None]), k_scale


def dummy(draw, rows, heads, tokens):
    """What `--load-format dummy` leads to behind a few layers, with weights of 1e-3, those of the norms included.

    So little of a token is left that its key is the bias of the keys' norm but for one part in a thousand, and that queries are
    smaller than FP8 can hold at the smallest scale there is: 2% of their elements are not 0, and hundreds of tokens share a score.
    """
    q = draw.normal(rows, heads, HEAD_DIM) * 1e-10
    bias = (draw.uniform(HEAD_DIM) * 2 - 1) * 1e-3
    k = bias + draw.normal(tokens, HEAD_DIM) * 1e-6
    return activations(q, draw.normal(rows, heads) * 1e-7, k, power_of_two=True)


def integers(draw, rows, heads, tokens):
    """Small integers, with scales and gates such that every float32 sum is exact.

    So every arithmetic gives the reference's scores to the last bit, and many of them are equal.
    """
    q = draw.integers(5, rows, heads, HEAD_DIM) - 2
    weights = (draw.integers(1025, rows, heads) - 512) / 512
    k = draw.integers(5, tokens, HEAD_DIM) - 2
    k_scale = 2.0 ** (draw.integers(3, tokens) - 1)
    return fp8(q.float()), weights, fp8(k.float()), k_scale


# On these a selection goes wrong first.
_ADVERSE = (random, equal, zeros, rising, falling, huge, extremes, twins)
KINDS = tuple(kind.__name__ for kind in _ADVERSE)
# These look like data, or like what a kernel would rather not be given: what is timed.
_DATA = (gaussian, rare, equal, few, rising, falling, runs, periodic, dummy)
DATA_KINDS = tuple(kind.__name__ for kind in _DATA)
_MAKE = {kind.__name__: kind for kind in (*_ADVERSE, *_DATA, integers)}


def make_inputs(
    kind: str, rows: int, heads: int, tokens: int, seed: int = 0, device: str = "cpu"
) -> Inputs:
    """`rows` queries at the end of a sequence of `tokens` tokens, of one of `KINDS`, `DATA_KINDS` or "integers"."""
    q, weights, k, k_scale = _MAKE[kind](Draw(seed, device), rows, heads, tokens)
    lengths = torch.arange(tokens - rows + 1, tokens + 1, device=device)
    return Inputs(q, weights, k, k_scale, lengths)
