"""Sharing the rows of an extend batch among the ranks of an attention TP group: each selects for its share, and gets the rest.

The indexer is replicated: every rank of the group has the same q, gates and index K. What the kernels select for a row is a
function of these alone, the same bits in every launch and in every batch. So ranks that each select for all rows (decode, and
small batches) agree without a broadcast, and rows that were shared get what they would have got without. Whether to share
depends only on what all ranks of a group know on the host and have in common: all of them gather, or none does.

Shares are contiguous and of equal numbers of rows, not of equal work. The rows of a chunk of 8192 that ends at 128K differ by 6%
in what they see, so the last share takes 3% more than its part. Where a batch begins at nothing they differ more, up to 1.75
times on four ranks; shares of equal work would be of uneven size there, and gather up to twice as many bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator

# A share is so many rows or a multiple of it: whole tiles of the kernels, and no tensor of the share is a copy (see `batch.pick`).
SHARE_MULTIPLE = 64
# What a row costs whatever it sees, the re-ranking above all, in tokens scored; measured (benchmark/results) between 27K, without
# re-ranking, and 85K.
ROW_TOKENS = 32 << 10
# Rows times tokens from which on rows are shared. So many take 0.2 ms on an H100 or H200 (benchmark/results), of which two ranks save
# half. A gather waits for the slowest rank and was taken to cost half of that at most: some 30 us to launch, and at 8 KB a row over
# NVLink 10 us more for the 410 to 1400 rows that this means. bench_row_sharding has shapes on both sides.
MIN_WORK = 1 << 26


def share_size(rows: int, ranks: int) -> int:
    """Rows of a full share; the last shares may have fewer, or none."""
    return -(-rows // (ranks * SHARE_MULTIPLE)) * SHARE_MULTIPLE


def share_of(rows: int, ranks: int, rank: int) -> slice:
    """The rows that `rank` selects for. The shares of all ranks, one after the other, are all rows."""
    size = share_size(rows, ranks)
    return slice(min(rank * size, rows), min((rank + 1) * size, rows))


def pays(rows: int, context: int, ranks: int) -> bool:
    """Whether to share `rows`, of which one sees `context` tokens and none sees more, among `ranks`, so that none goes without."""
    enough = rows * (context + ROW_TOKENS) >= MIN_WORK
    return ranks > 1 and enough and share_of(rows, ranks, ranks - 1).start < rows


def gather(own: torch.Tensor, rows: int, group: GroupCoordinator) -> torch.Tensor:
    """What all ranks of a group selected, int32 [rows, topk]; every rank calls it with its share, int32 [its rows, topk].

    A collective on the current stream, so not for a CUDA graph that is being captured: an extend batch is selected for between
    the pieces of a prefill graph, and --cuda-graph-backend-prefill full is refused.
    """
    size = share_size(rows, group.world_size)
    if len(own) < size:
        padded = own.new_empty(size, own.shape[1])
        padded[: len(own)] = own
        own = padded
    return group.all_gather(own, dim=0)[:rows]
