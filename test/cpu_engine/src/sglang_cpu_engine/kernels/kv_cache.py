# SPDX-License-Identifier: Apache-2.0
"""Writes and reads of the latent KV pool and of the indexer's paged K pool.

A page of the indexer's pool is a row of uint8: the float8_e4m3fn keys of 64 tokens, then their 64 float32 scales.
"""

import torch

HEAD_DIM = 128


def write_mla_kv(
    buffer: torch.Tensor, loc: torch.Tensor, nope: torch.Tensor, rope: torch.Tensor
) -> None:
    """buffer: [slots, 1, 576]; loc: int64 [tokens]; nope: [tokens, 1, 512]; rope: [tokens, 1, 64]."""
    buffer[loc] = torch.cat([nope, rope], dim=-1).view(len(loc), 1, -1)


def index_k_pages(
    buffer: torch.Tensor, page_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a pool uint8 [pages, page_size * 132]: keys uint8 [pages, page_size, 128], scales float32 [pages, page_size]."""
    keys, scales = buffer.tensor_split([page_size * HEAD_DIM], dim=1)
    return keys.unflatten(1, (page_size, HEAD_DIM)), scales.view(torch.float32)


def write_index_k(
    buffer: torch.Tensor,
    loc: torch.Tensor,
    k_fp8: torch.Tensor,
    k_scale: torch.Tensor,
    page_size: int,
) -> None:
    """buffer: uint8 [pages, page_size * 132]; loc: int64 [tokens]; k_fp8: [tokens, 128]; k_scale: float32 [tokens, 1]."""
    keys, scales = index_k_pages(buffer, page_size)
    keys[loc // page_size, loc % page_size] = k_fp8.view(torch.uint8)
    scales[loc // page_size, loc % page_size] = k_scale.view(-1)


def read_index_k(
    pool,
    buffer: torch.Tensor,
    page_indices: torch.Tensor,
    seq_len_tensor: torch.Tensor,
    seq_len_sum: int,
    max_seq_len: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of several sequences, one after the other (GetKAndS).

    page_indices: int32 [batch, pages]; seq_len_tensor: [batch]. Returns uint8 [seq_len_sum, 128] and [seq_len_sum, 4].
    """
    keys, scales = index_k_pages(buffer, pool.page_size)
    rows = [
        (keys[pages].flatten(0, 1)[:length], scales[pages].flatten()[:length])
        for pages, length in zip(page_indices.long(), seq_len_tensor.tolist())
    ]
    k, s = (torch.cat(part) for part in zip(*rows))
    return k, s.view(-1, 1).view(torch.uint8)
