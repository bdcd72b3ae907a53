# SPDX-License-Identifier: Apache-2.0
"""Slots of the paged KV pool for new tokens (Triton: sglang.kernels.ops.memory.allocator)."""

import torch


def alloc_extend(
    prefix_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out: torch.Tensor,
    _bs_upper: int,
    page_size: int,
) -> None:
    """Fills the request's last page, then takes free pages in order.

    prefix_lens, seq_lens, last_loc: int64 [batch]; free_pages: int64 [pages]; out: int64 [sum(seq_lens - prefix_lens)].
    """
    owned_pages = -(-prefix_lens // page_size)
    new_pages = -(-seq_lens // page_size) - owned_pages
    first_page = new_pages.cumsum(0) - new_pages
    extend_lens = seq_lens - prefix_lens
    row = torch.repeat_interleave(torch.arange(len(seq_lens)), extend_lens)
    step = torch.arange(len(out)) - (extend_lens.cumsum(0) - extend_lens)[row]
    position = prefix_lens[row] + step
    page = position // page_size - owned_pages[row]
    # The caller finds out only afterwards whether the pages were enough, and then drops the result.
    taken = (first_page[row] + page).clamp(0, max(len(free_pages) - 1, 0))
    fresh = page >= 0
    out.copy_(last_loc[row] + 1 + step)
    if len(free_pages):
        slots = free_pages[taken] * page_size + position % page_size
        out.copy_(torch.where(fresh, slots, out))


def alloc_decode(
    seq_lens: torch.Tensor,
    last_loc: torch.Tensor,
    free_pages: torch.Tensor,
    out: torch.Tensor,
    bs_upper: int,
    page_size: int,
) -> None:
    """One slot a request. seq_lens (the new token included), last_loc, out: int64 [batch]; free_pages: int64 [pages]."""
    alloc_extend(seq_lens - 1, seq_lens, last_loc, free_pages, out, bs_upper, page_size)


def get_last_loc(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, lens: torch.Tensor
) -> torch.Tensor:
    """The slot of each request's last token, -1 without one. req_to_token: int32 [requests, context]; others: [batch]."""
    last = req_to_token[req_pool_indices, (lens - 1).clamp(min=0)]
    return torch.where(lens > 0, last, -1).to(lens.dtype)
