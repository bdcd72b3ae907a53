"""Pooled keys: the mean dequantized index key of every complete page, kept beside the index-K cache.

A page's mean is written by the forward pass that stores the page's last token and is a function of the page's content
alone. It lives and dies with the page: a radix hit finds it, a page that is freed and filled again gets a new one, and
nobody reads the mean of a page that is not complete.
"""

from typing import List

import torch

from sglang.srt.layers.misa.index_k_cache import HEAD_DIM, PAGE_SIZE, read_pages
from sglang.srt.layers.misa.reference import page_means

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

    def update(
        self, layer: int, index_k: torch.Tensor, slots: torch.Tensor, num_seqs: int
    ) -> None:
        """Write the means of the pages that the tokens just stored have completed.

        Static shapes and no host sync: a captured CUDA graph may hold it.

        Args:
            layer: index into `layers`.
            index_k: uint8 [num_pages, 64 * 132], the layer's index-K cache, the new tokens included.
            slots: int [N], the cache slot of every new token; slot 0 stands for padding.
            num_seqs: sequences that the tokens belong to; N tokens of B sequences complete at most N // 64 + B pages.
        """
        if slots.numel() == 0:
            return
        completes = slots % PAGE_SIZE == PAGE_SIZE - 1
        limit = min(slots.numel(), slots.numel() // PAGE_SIZE + num_seqs)
        # Compact the completed pages to the front; whatever is left over points at page 0, which holds padding only.
        target = torch.where(completes, completes.cumsum(0) - 1, limit)
        pages = slots.new_zeros(limit + 1).scatter(0, target, slots // PAGE_SIZE)
        pages = pages[:limit]
        self.layers[layer][pages.long()] = page_means(*read_pages(index_k, pages))
