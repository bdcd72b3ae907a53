# SPDX-License-Identifier: Apache-2.0
"""Matrix products of bfloat16, in float32: many a CPU has no instructions for bfloat16, and torch is eight times as slow there."""

from typing import Optional

import torch

# So few rows are multiplied at the speed of reading the weights, which conversion would only add to.
FEW_ROWS = 8

_linear, _bmm = torch.nn.functional.linear, torch.bmm


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """`torch.nn.functional.linear`."""
    few = input.numel() <= FEW_ROWS * input.shape[-1]
    if weight.dtype != torch.bfloat16 or few:
        return _linear(input, weight, bias)
    bias = None if bias is None else bias.float()
    return _linear(input.float(), weight.float(), bias).to(input.dtype)


def bmm(
    input: torch.Tensor, mat2: torch.Tensor, *, out: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """`torch.bmm`."""
    if mat2.dtype != torch.bfloat16:
        return _bmm(input, mat2, out=out)
    product = _bmm(input.float(), mat2.float()).to(mat2.dtype)
    return product if out is None else out.copy_(product)
