"""A batch of the indexer, taken from SGLang's metadata."""

from __future__ import annotations

import bisect
import collections
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Iterator, List, Optional, Tuple

import torch

from sglang.srt.environ import envs
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod

if TYPE_CHECKING:
    from sglang.srt.layers.attention.dsa.dsa_indexer_metadata import DSAIndexerMetadata


@dataclass(frozen=True)
class Batch:
    """Sequences with cached keys, and the rows that query them: T rows of B sequences, without padding.

    Attributes:
        page_table: int32 [B, P], the pages of each sequence; columns behind a sequence's last page hold anything.
        cu_rows: int32 [B + 1], the rows of sequence b are cu_rows[b] .. cu_rows[b + 1].
        lengths: int32 [T], tokens visible to each row, non-decreasing within a sequence.
        rows: the number of rows of each sequence, on the host.
        bounds: the least and the largest of the lengths where the host knows them (extend); None in decode, where every
            sequence has one row.
    """

    page_table: torch.Tensor
    cu_rows: torch.Tensor
    lengths: torch.Tensor
    rows: List[int]
    bounds: Optional[Tuple[int, int]] = None

    def sequences(self) -> Iterator[Tuple[int, slice]]:
        """Each sequence's place in the batch, and its rows."""
        start = 0
        for index, count in enumerate(self.rows):
            yield index, slice(start, start + count)
            start += count

    def truncated(self, length: int) -> Batch:
        """The same rows, seeing at most the first `length` tokens; extend only."""
        assert self.bounds is not None, "in decode the host does not know the lengths"
        least, largest = self.bounds
        return replace(
            self,
            lengths=self.lengths.clamp(max=length),
            bounds=(min(least, length), min(largest, length)),
        )

    def only(self, rows: List[int]) -> Tuple[Batch, torch.Tensor]:
        """Some of the rows, given in ascending order, and where they are among all: int64 [len(rows)] on the device."""
        sequences, counts = rows, [1] * len(rows)
        if self.bounds is not None:
            ends = list(itertools.accumulate(self.rows))
            owners = collections.Counter(bisect.bisect(ends, row) for row in rows)
            sequences, counts = list(owners), list(owners.values())
        index = self._on_device(rows, torch.int64)
        cu_rows = list(itertools.accumulate(counts, initial=0))
        batch = replace(
            self,
            page_table=self.page_table[self._on_device(sequences, torch.int64)],
            cu_rows=self._on_device(cu_rows, torch.int32),
            lengths=self.lengths[index],
            rows=counts,
        )
        return batch, index

    def _on_device(self, values: List[int], dtype: torch.dtype) -> torch.Tensor:
        # From pinned memory the host need not wait for the copy.
        device = self.lengths.device
        pinned = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
        return pinned.to(device, non_blocking=True)


def rows_below(metadata: DSAIndexerMetadata, length: int) -> int:
    """How many rows of an extend batch see fewer tokens than `length`, from what the host knows."""
    rows = metadata.get_dsa_extend_len_cpu()
    seq_lens = metadata.get_indexer_seq_len_cpu().tolist()
    return sum(
        min(count, max(0, length - 1 - (seq_len - count)))
        for seq_len, count in zip(seq_lens, rows)
    )


def extend_batch(metadata: DSAIndexerMetadata) -> Batch:
    """The rows of an extend batch."""
    rows = metadata.get_dsa_extend_len_cpu()
    seq_lens = metadata.get_indexer_seq_len_cpu().tolist()
    first = [length - count + 1 for length, count in zip(seq_lens, rows)]
    return Batch(
        page_table=metadata.get_page_table_64(),
        cu_rows=metadata.attn_metadata.cu_seqlens_q,
        lengths=metadata.get_seqlens_expanded(),
        rows=rows,
        bounds=(min(first, default=0), max(seq_lens, default=0)),
    )


def decode_batch(metadata: DSAIndexerMetadata) -> Batch:
    """The rows of a decode batch; those of a CUDA graph's padding see one token of page 0."""
    return Batch(
        page_table=metadata.get_page_table_64(),
        cu_rows=metadata.attn_metadata.cu_seqlens_q,
        lengths=metadata.get_seqlens_expanded(),
        rows=metadata.get_dsa_extend_len_cpu(),
    )


def attention_output(
    metadata: DSAIndexerMetadata,
) -> Tuple[str, Optional[torch.Tensor]]:
    """The form in which the sparse attention of this batch takes selections, and the offsets that go with it."""
    if not envs.SGLANG_DSA_FUSE_TOPK.get() or metadata.force_unfused_topk:
        return "positions", None
    if metadata.topk_transform_method == TopkTransformMethod.RAGGED:
        return "ragged", metadata.attn_metadata.topk_indices_offset
    return "slots", None
