"""Exact top-k selection, and the forms in which SGLang's sparse attention takes it.

Ties are broken in favour of the lower position, positions come out in ascending order, the result is a function of the
scores alone. Static shapes and no host sync.
"""

import torch

from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE


def topk_mask(scores: torch.Tensor, allowed: torch.Tensor, k: int) -> torch.Tensor:
    """The k best of the allowed entries of every row, or all of them where there are fewer.

    Args:
        scores: float32 [T, S].
        allowed: bool [T, S].
        k: entries to choose.

    Returns:
        bool [T, S].
    """
    if scores.shape[1] <= k:
        return allowed
    scores = scores.masked_fill(~allowed, float("-inf"))
    threshold = scores.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    above = allowed & (scores > threshold)
    ties = allowed & (scores == threshold)
    room = k - above.sum(1, keepdim=True)
    return above | (ties & (ties.cumsum(1) <= room))


def positions(mask: torch.Tensor, k: int) -> torch.Tensor:
    """The columns set in every row, ascending, -1 padded: bool [T, S] with at most k set a row -> int32 [T, k]."""
    rows, columns = mask.shape
    rank = mask.cumsum(1).sub_(1).masked_fill_(~mask, k)
    column = torch.arange(columns, dtype=torch.int32, device=mask.device)
    out = torch.full((rows, k + 1), -1, dtype=torch.int32, device=mask.device)
    return out.scatter_(1, rank, column.expand(rows, -1))[:, :k]


def to_slots(selected: torch.Tensor, page_table: torch.Tensor) -> torch.Tensor:
    """Positions of one sequence as slots of the KV cache: int32 [T, k] (-1 stays), page numbers [P] -> int32 [T, k]."""
    page = page_table[(selected // PAGE_SIZE).clamp(min=0).long()]
    slots = page.int() * PAGE_SIZE + selected % PAGE_SIZE
    return slots.masked_fill(selected < 0, -1)


def to_ragged(selected: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Positions as offsets into the batch's concatenated keys: int32 [T, k] (-1 stays), int32 [T] -> int32 [T, k]."""
    return (selected + offsets[:, None]).masked_fill(selected < 0, -1)
