"""Exact top-k selection on a CPU, and the forms in which SGLang's sparse attention takes it.

For `torch_operations`, and for the evaluation on any device; on a GPU MISA selects in kernels. Ties are broken in favour of the lower position, positions come out in ascending order, the result is a function of the
scores alone.
"""

from typing import Optional

import torch

from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE


def topk_mask(scores: torch.Tensor, allowed: torch.Tensor, k: int) -> torch.Tensor:
    """The k best of the allowed entries of every row, or all of them where there are fewer; NaN is worse than any number.

    Args:
        scores: float32 [T, S].
        allowed: bool [T, S].
        k: entries to choose.

    Returns:
        bool [T, S].
    """
    if scores.shape[1] <= k:
        return allowed
    nan = allowed & scores.isnan()
    numbers = allowed & ~nan
    scores = scores.masked_fill(~numbers, float("-inf"))
    threshold = scores.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    mask = numbers & (scores > threshold)
    for ties in (numbers & (scores == threshold), nan):
        room = k - mask.sum(1, keepdim=True)
        mask |= ties & (ties.cumsum(1) <= room)
    return mask


def positions(mask: torch.Tensor, k: int) -> torch.Tensor:
    """The columns set in every row, ascending, -1 padded: bool [T, S] with at most k set a row -> int32 [T, k]."""
    rows, columns = mask.shape
    rank = mask.cumsum(1).sub_(1).masked_fill_(~mask, k)
    column = torch.arange(columns, dtype=torch.int32, device=mask.device)
    out = torch.full((rows, k + 1), -1, dtype=torch.int32, device=mask.device)
    return out.scatter_(1, rank, column.expand(rows, -1))[:, :k]


def to_output(
    selected: torch.Tensor,
    output: str,
    page_table: torch.Tensor,
    cu_rows: torch.Tensor,
    offsets: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Positions in the form that the sparse attention takes.

    Args:
        selected: int32 [T, k], -1 stays.
        output: "positions"; "slots" of the cache; "ragged", offsets into the batch's concatenated keys.
        page_table: int32 [B, P].
        cu_rows: int32 [B + 1], the rows of sequence b are cu_rows[b] .. cu_rows[b + 1].
        offsets: int32 [T], where each row's keys start, for "ragged".

    Returns:
        int32 [T, k].

    Raises:
        ValueError: there is no such form.
    """
    if output == "positions":
        return selected
    if output == "slots":
        rows = torch.arange(len(selected), device=selected.device)
        sequence = torch.bucketize(rows, cu_rows[1:].contiguous(), right=True)
        page = page_table[sequence[:, None], (selected // PAGE_SIZE).clamp(min=0)]
        indices = page * PAGE_SIZE + selected % PAGE_SIZE
    elif output == "ragged":
        assert offsets is not None, "ragged output needs offsets"
        indices = selected + offsets[:, None]
    else:
        raise ValueError(f"output {output!r} is not positions, slots or ragged")
    return indices.masked_fill(selected < 0, -1)
