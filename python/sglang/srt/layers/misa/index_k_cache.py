"""The layout of SGLang's paged index-K cache.

One uint8 buffer [num_pages, 64 * 132] a layer: in each page, 64 keys of 128 float8_e4m3fn, then their 64 float32 scales.
"""

from typing import Tuple

import torch

from sglang.srt.layers.misa.reference import PAGE_SIZE

HEAD_DIM = 128
# Of a key with its scale.
BYTES_PER_KEY = HEAD_DIM + torch.float32.itemsize
_KEY_BYTES = PAGE_SIZE * HEAD_DIM


def read_pages(
    buffer: torch.Tensor, pages: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Copy pages out of the cache.

    Args:
        buffer: uint8 [num_pages, 64 * 132], one layer of the cache.
        pages: int [P], page numbers.

    Returns:
        keys float8_e4m3fn [P * 64, 128] and scales float32 [P * 64].
    """
    content = buffer[pages.long()]
    keys = content[:, :_KEY_BYTES].reshape(-1, HEAD_DIM)
    scales = content[:, _KEY_BYTES:].contiguous().view(torch.float32)
    return keys.view(torch.float8_e4m3fn), scales.view(-1)


def read_tokens(
    buffer: torch.Tensor, slots: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Copy single tokens out of the cache.

    Args:
        buffer: uint8 [num_pages, 64 * 132], one layer of the cache.
        slots: int64 [N], page * 64 + place in the page.

    Returns:
        keys float8_e4m3fn [N, 128] and scales float32 [N].
    """
    pages, places = slots // PAGE_SIZE, slots % PAGE_SIZE
    keys = buffer[:, :_KEY_BYTES].unflatten(1, (PAGE_SIZE, HEAD_DIM))[pages, places]
    scales = buffer[:, _KEY_BYTES:].unflatten(1, (PAGE_SIZE, 4))[pages, places]
    return keys.view(torch.float8_e4m3fn), scales.view(torch.float32)[:, 0]
