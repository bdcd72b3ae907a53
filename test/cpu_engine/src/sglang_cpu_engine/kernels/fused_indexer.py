# SPDX-License-Identifier: Apache-2.0
"""What the indexer's fused kernels do: with interleaved rope (GLM-5) q and k are prepared in one launch each, and k goes
into its page quantised with a plain float32 scale. Both families store k through the fused kernel on a GPU.
"""

import torch
import torch.nn.functional as F
from sglang_cpu_engine.kernels.kv_cache import write_index_k
from sglang_cpu_engine.kernels.quantization import IndexedCpuTensor, quantize
from sglang_cpu_engine.kernels.rotary import rotate


def _rope_first(
    x: torch.Tensor, cos_sin_cache: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Rotates the leading dimensions by interleaved pairs. x: [tokens, ..., 128]; cos_sin_cache: float32 [positions, 64]."""
    rope, rest = x.float().tensor_split([cos_sin_cache.shape[-1]], dim=-1)
    return torch.cat([rotate(rope, cos_sin_cache[positions], False), rest], dim=-1)


def fused_store_index_k_cache(
    key: torch.Tensor, cache: torch.Tensor, out_cache_loc: torch.Tensor, page_size: int
) -> None:
    """key: bfloat16 [tokens, 128]; cache: uint8 [pages, page_size * 132]; out_cache_loc: int64 [tokens]."""
    write_index_k(cache, out_cache_loc, *quantize(key), page_size)


def fused_k_indexer_norm_rope_store(
    k_input: torch.Tensor,
    cache: torch.Tensor,
    out_cache_loc: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    page_size: int,
) -> None:
    """LayerNorm, rope, quantisation and store. k_input: bfloat16 [tokens, 128]; weight, bias: float32 [128]."""
    key = F.layer_norm(k_input.float(), weight.shape, weight, bias, eps)
    key = _rope_first(key, cos_sin_cache, positions).to(k_input.dtype)
    fused_store_index_k_cache(key, cache, out_cache_loc, page_size)


def fused_q_indexer_rope_first_quant(
    q_input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: float,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rope, quantisation and the head gates. q_input: bfloat16 [tokens, heads, 128]; weight: bfloat16 [tokens, heads].

    Returns float8_e4m3fn [tokens, heads, 128] and float32 [tokens, heads, 1].
    """
    q_fp8, q_scale = quantize(_rope_first(q_input, cos_sin_cache, positions))
    gates = weight.float().unsqueeze(-1) * weight_scale * q_scale
    return q_fp8.as_subclass(IndexedCpuTensor), gates
