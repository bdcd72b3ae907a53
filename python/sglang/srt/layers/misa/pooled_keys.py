"""Pooled keys: the mean dequantized index key of every complete page, kept beside the index-K cache.

A page's mean is written by the forward pass that stores the page's last token and is a function of the page's content
alone. It lives and dies with the page: a radix hit finds it, a page that is freed and filled again gets a new one, and
nobody reads the mean of a page that is not complete.
"""

from typing import List

import torch

from sglang.srt.layers.misa.index_k_cache import HEAD_DIM, PAGE_SIZE
from sglang.srt.layers.misa.operations import operations

BYTES_PER_TOKEN = HEAD_DIM * torch.bfloat16.itemsize // PAGE_SIZE


class PooledKeys:
    """The page means of every layer of one KV pool.

    Attributes:
        layers: one bfloat16 [num_pages, 128] a layer.
    """

    def __init__(self, index_k_buffers: List[torch.Tensor]):
        self.layers = [
            torch.zeros(
                len(buffer), HEAD_DIM, dtype=torch.bfloat16, device=buffer.device
            )
            for buffer in index_k_buffers
        ]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def update(self, layer: int, index_k: torch.Tensor, slots: torch.Tensor) -> None:
        """Write the means of the pages that the tokens just stored have completed.

        On a GPU: static shapes and no host sync, a captured CUDA graph may hold it.

        Args:
            layer: index into `layers`.
            index_k: uint8 [num_pages, 64 * 132], the layer's index-K cache, the new tokens included.
            slots: int32 or int64 [N], the cache slot of every new token; page 0 stands for padding.
        """
        if slots.numel():
            ops = operations(index_k.device)
            ops.update_pooled_keys(index_k, slots, self.layers[layer])
