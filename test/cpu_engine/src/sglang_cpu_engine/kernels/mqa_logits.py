# SPDX-License-Identifier: Apache-2.0
"""The indexer's scores, as DeepGEMM computes them: logits[t, s] = scale[s] * sum_j w[t, j] * relu(q[t, j] . k[s]).

A logit is the same bits whatever else is in the call. The dot products of float8 numbers are exact in float64; after
rounding to float32, the heads are added up in ascending order with a separate multiplication and addition each.
"""

import types

import torch
from sglang_cpu_engine.kernels.kv_cache import index_k_pages

# What a chunk of query rows may take for one head's products.
CHUNK_ELEMENTS = 1 << 24


def _scores(
    q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """q: float8 [rows, heads, 128]; k: float8 [keys, 128]; k_scale: [keys]; weights: [rows, heads]. Returns [rows, keys]."""
    q, k = q.double(), k.double().t()
    total = torch.zeros(q.shape[0], k.shape[1])
    for head in range(q.shape[1]):
        product = (q[:, head] @ k).float().relu_()
        total += product.mul_(weights[:, head, None])
    return total.mul_(k_scale)


def fp8_mqa_logits(
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    clean_logits: bool = True,
) -> torch.Tensor:
    """Scores of packed sequences, where row t sees the keys ks[t] to ke[t] - 1.

    q: float8 [rows, heads, 128]; kv: float8 [keys, 128] and float32 [keys]; weights: float32 [rows, heads];
    ks, ke: int32 [rows]. Returns float32 [rows, keys]. What no row of a chunk sees is -inf if clean, else NaN: DeepGEMM
    leaves it uninitialised, and a reader that forgets to mask it should not go unnoticed.
    """
    k, k_scale = kv
    column = torch.arange(len(k))
    logits = torch.full((len(q), len(k)), float("nan"))
    step = max(1, min(256, CHUNK_ELEMENTS // max(len(k), 1)))
    for row in range(0, len(q), step):
        rows = slice(row, row + step)
        keys = slice(int(ks[rows].min()), int(ke[rows].max()))
        logits[rows, keys] = _scores(q[rows], k[keys], k_scale[keys], weights[rows])
        if clean_logits:
            hidden = (column < ks[rows, None]) | (column >= ke[rows, None])
            logits[rows].masked_fill_(hidden, float("-inf"))
    return logits


def fp8_paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    schedule_metadata: torch.Tensor,
    max_context_len: int,
    clean_logits: bool = True,
) -> torch.Tensor:
    """Scores of sequences in the paged cache, `next_n` query rows each.

    q: float8 [batch, next_n, heads, 128]; kv_cache: uint8 [pages, 64, 1, 132]; weights: float32 [batch * next_n, heads];
    context_lens: int32 [batch, next_n]; block_tables: int32 [batch, blocks]. Returns float32 [batch * next_n,
    max_context_len], beyond a row's context -inf if clean, else NaN.
    """
    batch, next_n = q.shape[:2]
    page_size = kv_cache.shape[1]
    keys, scales = index_k_pages(kv_cache.flatten(1), page_size)
    fill = float("-inf") if clean_logits else float("nan")
    logits = torch.full((batch * next_n, max_context_len), fill)
    for row, length in enumerate(context_lens.reshape(-1).tolist()):
        i = row // next_n
        pages = block_tables[i, : -(-length // page_size)].long()
        k = keys[pages].flatten(0, 1)[:length].view(torch.float8_e4m3fn)
        k_scale = scales[pages].flatten()[:length]
        rows = slice(row, row + 1)
        logits[row, :length] = _scores(
            q[i, row % next_n, None], k, k_scale, weights[rows]
        )
    return logits


def get_paged_mqa_logits_metadata(
    context_lens: torch.Tensor, block_kv: int, num_sms: int
) -> torch.Tensor:
    """A work schedule of DeepGEMM's shape, int32 [num_sms + 1, 2]. Nothing here reads it."""
    return torch.zeros(num_sms + 1, 2, dtype=torch.int32)


def get_num_sms() -> int:
    """As many as an H100 has."""
    return 132


deep_gemm = types.SimpleNamespace(
    fp8_mqa_logits=fp8_mqa_logits,
    fp8_paged_mqa_logits=fp8_paged_mqa_logits,
    get_paged_mqa_logits_metadata=get_paged_mqa_logits_metadata,
    get_num_sms=get_num_sms,
)
