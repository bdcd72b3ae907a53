# SPDX-License-Identifier: Apache-2.0
"""Copies between the cache and HiCache's host memory, of the layout page_first_direct."""

import torch
from sglang_cpu_engine.streams import launch


def load_layer(
    *,
    src_ptrs: list[torch.Tensor],
    dst_ptrs: list[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """Copy one layer of host pages to the device.

    Args:
        src_ptrs: one tensor, [pages, layers, page_size, ...].
        dst_ptrs: one tensor, [slots, ...].
        src_indices, dst_indices: the slots, page by page.
    """
    (host,), (device,) = src_ptrs, dst_ptrs

    def copy() -> None:
        for page, slot in _pages(src_indices, dst_indices, page_size):
            device[slot : slot + page_size] = host[page, layer_id]

    launch(copy)


def store_layers(
    *,
    src_ptrs: list[torch.Tensor],
    dst_ptrs: list[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """Copy all layers of device pages to the host: `load_layer` the other way round, with a source for each layer."""
    (host,) = dst_ptrs

    def copy() -> None:
        for page, slot in _pages(dst_indices, src_indices, page_size):
            for layer_id, device in enumerate(src_ptrs):
                host[page, layer_id] = device[slot : slot + page_size]

    launch(copy)


def _pages(host_indices: torch.Tensor, device_indices: torch.Tensor, page_size: int):
    """The page of the host and the first slot on the device, for every page."""
    pages = host_indices[::page_size] // page_size
    return zip(pages.tolist(), device_indices[::page_size].tolist())
