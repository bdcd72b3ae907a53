"""A batch of the indexer, taken from SGLang's metadata."""

from __future__ import annotations

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

    Decode, in the sense of the kernels, is all that SGLang's indexer selects for in its cache: decode itself, and the two
    passes of speculative decoding that have several rows a sequence, target verify and draft extend.

    Attributes:
        page_table: int32 [B, P], the pages of each sequence; columns behind a sequence's last page hold anything.
        cu_rows: int32 [B + 1], the rows of sequence b are cu_rows[b] .. cu_rows[b + 1].
        lengths: int32 [T], tokens visible to each row, non-decreasing within a sequence; in decode 0 for some padding rows.
        rows: the number of rows of each sequence, on the host.
        bounds: the least and the largest of the lengths where the host knows them (extend); None in decode.
        rows_per_seq: in decode, the number of rows of every sequence.
        by_row: in decode, page_table and cu_rows as SGLang has them, [T, P] and [T + 1], as if each row were a sequence.
    """

    page_table: torch.Tensor
    cu_rows: torch.Tensor
    lengths: torch.Tensor
    rows: List[int]
    bounds: Optional[Tuple[int, int]] = None
    rows_per_seq: int = 1
    by_row: Optional[Tuple[torch.Tensor, torch.Tensor]] = None

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
    """The rows of a decode, target verify or draft extend batch.

    The rows of a CUDA graph's padding see a few tokens of page 0, or none.
    """
    lengths = metadata.get_seqlens_expanded()
    # SGLang repeats what it has of a sequence for each of its rows, but for this. What it counts as a sequence's rows differs
    # between eager passes and CUDA graphs.
    sequences = len(metadata.get_seqlens_int32())
    rows_per_seq = len(lengths) // sequences if sequences else 1
    # Folded, a kernel reads the keys of a sequence once. These are views: a CUDA graph gets no node for them.
    page_table = metadata.get_page_table_64()
    cu_rows = metadata.attn_metadata.cu_seqlens_q
    return Batch(
        page_table=page_table[::rows_per_seq],
        cu_rows=cu_rows[::rows_per_seq],
        lengths=lengths,
        rows=[rows_per_seq] * sequences,
        rows_per_seq=rows_per_seq,
        by_row=(page_table, cu_rows),
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
