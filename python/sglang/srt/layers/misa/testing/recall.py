"""How much of DSA's selection another selection holds."""

from typing import Dict, Optional

import torch

from sglang.srt.layers.misa import reference


def recall(selected: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The share of the positions `wanted` that are `selected`: float32 [T] of two sets of positions, bool [T, S]."""
    return (selected & wanted).sum(1) / wanted.sum(1)


def share_of_dsa(
    record: Dict, topk: int, rows: int, positions: Optional[torch.Tensor] = None
) -> float:
    """The mean recall of DSA's selection in the last `rows` rows of a record.

    Args:
        record: as `capture.Recorder` writes it.
        positions: int [rows, topk], what was selected; what the record says by default.
    """
    q, weights, lengths, recorded = (
        record[name][-rows:] for name in ("q", "weights", "lengths", "positions")
    )
    selected = recorded if positions is None else positions
    wanted = reference.dsa(q, weights, record["k"], record["k_scale"], lengths, topk)
    tokens = len(record["k"])
    sets = (reference.members(x.long(), tokens) for x in (selected, wanted))
    return recall(*sets).mean().item()
