"""A batch of the indexer, taken from SGLang's metadata."""

from __future__ import annotations

import collections
import itertools
from bisect import bisect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Iterator, List, Optional, Tuple

import torch

from sglang.srt.environ import envs
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from sglang.srt.layers.misa.releases.installed import RELEASE
from sglang.srt.runtime_context import get_parallel

if TYPE_CHECKING:
    from sglang.srt.layers.attention.dsa.dsa_indexer_metadata import DSAIndexerMetadata
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


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
        spans: the lengths of each sequence's rows, as SGLang's batch has them (extend).
        rows_per_seq: in decode, the number of rows of every sequence.
        by_row: in decode, page_table and cu_rows as SGLang has them, [T, P] and [T + 1], as if each row were a sequence.
    """

    page_table: torch.Tensor
    cu_rows: torch.Tensor
    lengths: torch.Tensor
    rows: List[int]
    bounds: Optional[Tuple[int, int]] = None
    spans: Optional[List[range]] = None
    rows_per_seq: int = 1
    by_row: Optional[Tuple[torch.Tensor, torch.Tensor]] = None

    def sequences(self) -> Iterator[Tuple[int, slice]]:
        """Each sequence's place in the batch, and its rows."""
        start = 0
        for index, count in enumerate(self.rows):
            yield index, slice(start, start + count)
            start += count

    def within(self, rows: slice) -> List[slice]:
        """Of each sequence those rows that are among `rows`."""
        parts = []
        for _, mine in self.sequences():
            start = min(max(mine.start, rows.start), mine.stop)
            parts.append(slice(start, max(start, min(mine.stop, rows.stop))))
        return parts

    def cut(self, length: int) -> Tuple[List[slice], List[slice]]:
        """Of each sequence of an extend batch the rows that see at most `length` tokens, and those that see more."""
        assert self.spans is not None, "in decode the host does not know the lengths"
        few, more = [], []
        for (_, rows), span in zip(self.sequences(), self.spans):
            end = rows.start + bisect(span, length)
            few.append(slice(rows.start, end))
            more.append(slice(end, rows.stop))
        return few, more

    def part(self, rows: List[slice]) -> Batch:
        """Some rows of an extend batch. Its sequences stay, those that have none of the rows without any.

        Args:
            rows: those of each sequence, as `within` and `cut` give them.
        """
        assert self.spans is not None, "in decode the host does not know the lengths"
        spans = [
            span[kept.start - all_rows.start : kept.stop - all_rows.start]
            for (_, all_rows), span, kept in zip(self.sequences(), self.spans, rows)
        ]
        counts = [len(span) for span in spans]
        cu_rows = list(itertools.accumulate(counts, initial=0))
        return replace(
            self,
            cu_rows=self._on_device(cu_rows, torch.int32),
            lengths=pick(self.lengths, rows),
            rows=counts,
            bounds=bounds_of(spans),
            spans=spans,
        )

    def only(self, rows: List[int]) -> Tuple[Batch, torch.Tensor]:
        """Some of the rows, given in ascending order, and where they are among all: int64 [len(rows)] on the device."""
        sequences, counts = rows, [1] * len(rows)
        if self.bounds is not None:
            ends = list(itertools.accumulate(self.rows))
            owners = collections.Counter(bisect(ends, row) for row in rows)
            sequences, counts = list(owners), list(owners.values())
        index = self._on_device(rows, torch.int64)
        cu_rows = list(itertools.accumulate(counts, initial=0))
        batch = replace(
            self,
            page_table=self.page_table[self._on_device(sequences, torch.int64)],
            cu_rows=self._on_device(cu_rows, torch.int32),
            lengths=self.lengths[index],
            rows=counts,
            spans=None,
            by_row=None,
        )
        return batch, index

    def _on_device(self, values: List[int], dtype: torch.dtype) -> torch.Tensor:
        # From pinned memory the host need not wait for the copy.
        device = self.lengths.device
        pinned = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
        return pinned.to(device, non_blocking=True)


def joined(rows: List[slice]) -> List[slice]:
    """The same rows in as few pieces as they have."""
    pieces: List[slice] = []
    for piece in rows:
        if piece.start == piece.stop:
            continue
        if pieces and pieces[-1].stop == piece.start:
            piece = slice(pieces.pop().start, piece.stop)
        pieces.append(piece)
    return pieces


def pick(x: torch.Tensor, rows: List[slice]) -> torch.Tensor:
    """Some rows of a tensor: a view where they are one piece that begins at a multiple of 256 bytes, as tensors do."""
    pieces = joined(rows)
    if len(pieces) == 1 and pieces[0].start * x.stride(0) * x.element_size() % 256 == 0:
        return x[pieces[0]]
    # On a CPU, torch.cat takes no float8.
    values = x.view(torch.uint8) if x.element_size() == 1 else x
    return torch.cat([values[piece] for piece in pieces] or [values[:0]]).view(x.dtype)


def _is_split(forward_batch: ForwardBatch) -> bool:
    """Whether context parallelism deals the rows of an extend batch out, one by one, to the ranks of its group."""
    return get_parallel().attn_cp_size > 1 and RELEASE.deals_rows_out(forward_batch)


def _dealt_spans(forward_batch: ForwardBatch) -> List[range]:
    """The lengths of this rank's rows of every sequence; of some sequences it may have none."""
    parallel = get_parallel()
    size, rank = parallel.attn_cp_size, parallel.attn_cp_rank
    spans, before = [], 0
    for end, count in zip(
        forward_batch.seq_lens_cpu.tolist(), forward_batch.extend_seq_lens_cpu
    ):
        first = (rank - before) % size
        spans.append(range(end - count + 1 + first, end + 1, size))
        before += count
    return spans


def extend_spans(
    forward_batch: ForwardBatch, metadata: DSAIndexerMetadata
) -> List[range]:
    """The lengths of the rows of each sequence of an extend batch, from what the host knows."""
    if _is_split(forward_batch):
        # The metadata has no sequence of which this rank has no rows.
        return [span for span in _dealt_spans(forward_batch) if span]
    rows = metadata.get_dsa_extend_len_cpu()
    seq_lens = metadata.get_indexer_seq_len_cpu().tolist()
    return [range(end - count + 1, end + 1) for end, count in zip(seq_lens, rows)]


def extend_rids(forward_batch: ForwardBatch) -> List[str]:
    """The request of each sequence of an extend batch."""
    if not _is_split(forward_batch):
        return forward_batch.rids
    spans = _dealt_spans(forward_batch)
    return [rid for rid, span in zip(forward_batch.rids, spans) if span]


def rows_up_to(spans: List[range], length: int) -> int:
    """How many rows of an extend batch see at most `length` tokens."""
    return sum(bisect(span, length) for span in spans)


def bounds_of(spans: List[range]) -> Tuple[int, int]:
    """The least and the largest length; 0 of no rows."""
    spans = [span for span in spans if span]
    least = min((span[0] for span in spans), default=0)
    return least, max((span[-1] for span in spans), default=0)


def extend_batch(forward_batch: ForwardBatch, metadata: DSAIndexerMetadata) -> Batch:
    """The rows of an extend batch; with context parallelism those of this rank."""
    spans = extend_spans(forward_batch, metadata)
    return Batch(
        page_table=metadata.get_page_table_64(),
        cu_rows=metadata.attn_metadata.cu_seqlens_q,
        lengths=metadata.get_seqlens_expanded(),
        rows=[len(span) for span in spans],
        bounds=bounds_of(spans),
        spans=spans,
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
