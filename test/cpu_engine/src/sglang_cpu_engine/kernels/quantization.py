# SPDX-License-Identifier: Apache-2.0
"""FP8 quantisation and the Hadamard rotation of the indexer's q and k."""

from typing import Optional

import torch

FP8_MAX = 448.0


class IndexedCpuTensor(torch.Tensor):
    """A CPU tensor on "device 0".

    `Indexer._get_topk_ragged` asks q for its device's index, and torch drops the index of a CPU device. Results of
    operations are plain tensors.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return torch.device("cpu", 0)


ROTATED_AT_ONCE = 2048  # rows, 1 MiB in float32, which stays in a core's cache


def quantize(
    x: torch.Tensor, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises the last dimension as one group. x: [..., n]. Returns float8_e4m3fn [..., n] and float32 [..., 1]."""
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    if power_of_two:
        # 2^ceil(log2(amax / max)) from the exponent bits: log2 itself may round differently in a vector and in its tail.
        mantissa, exponent = torch.frexp(amax * (1.0 / FP8_MAX))
        scale = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
        x = x / scale
    else:
        scale = amax / FP8_MAX
        x = x * (1.0 / scale)
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def act_quant(
    x: torch.Tensor, block_size: int = 128, scale_fmt: Optional[str] = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [..., block_size]. Returns float8_e4m3fn of x's shape and float32 [..., 1]; a `scale_fmt` asks for powers of two."""
    assert x.shape[-1] == block_size
    q, scale = quantize(x, power_of_two=scale_fmt is not None)
    return q.as_subclass(IndexedCpuTensor), scale


def rotate_activation(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal Walsh-Hadamard transform of the last dimension, computed in float32. x: [..., 2^m]."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows)
    for start in range(0, len(rows), ROTATED_AT_ONCE):
        part = slice(start, start + ROTATED_AT_ONCE)
        out[part] = _rotate(rows[part])
    return out.view(x.shape)


def _rotate(rows: torch.Tensor) -> torch.Tensor:
    n = rows.shape[1]
    # The dimension that is transformed comes first: sums of neighbours then are sums of whole lines in memory.
    y = rows.float().t().contiguous()
    width = 1
    while width < n:
        a, b = y.unflatten(0, (n // (2 * width), 2, width)).unbind(1)
        y = torch.stack([a + b, a - b], dim=1).flatten(0, 2)
        width *= 2
    return (y.t() * n**-0.5).to(rows.dtype)
