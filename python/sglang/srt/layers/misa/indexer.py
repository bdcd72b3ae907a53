"""The MISA indexer: q, weights and the paged index-K cache in, the top-k positions of every query out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Dict, Iterator, Optional, Tuple

import torch

from sglang.srt.environ import envs
from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE, read_pages
from sglang.srt.layers.misa.reference import force, token_scores, visible
from sglang.srt.layers.misa.router import route
from sglang.srt.layers.misa.selection import (
    positions,
    to_ragged,
    to_slots,
    topk_mask,
)

if TYPE_CHECKING:
    from sglang.srt.layers.attention.dsa.dsa_indexer_metadata import DSAIndexerMetadata

# Rows are taken in chunks whose temporaries fit in this much memory. A constant, so that neither the result nor the peak
# depends on how much memory happens to be free.
WORKSPACE_BYTES = 256 << 20
_BYTES_PER_SCORE = 48  # float64 and float32 scores, masks, int64 ranks


@dataclass
class Selection:
    """What was chosen for some rows of one sequence.

    Attributes:
        positions: int32 [T, topk], ascending, -1 padded.
        heads: int64 [T, active_heads], ascending; None where all heads scored.
    """

    positions: torch.Tensor
    heads: Optional[torch.Tensor]


@dataclass(frozen=True)
class Sequence:
    """One sequence's cached keys, and the rows of the batch that query them.

    Attributes:
        index: the sequence's place in the batch.
        rows: the rows of q that belong to it.
        num_tokens: bound on the tokens that any of the rows sees.
        page_table: int32 [P], its pages.
        first_length: tokens that the first row sees where the host knows it, each further row seeing one more.
    """

    index: int
    rows: slice
    num_tokens: int
    page_table: torch.Tensor
    first_length: Optional[int] = None


@dataclass
class MisaIndexer:
    """Selects with the parameters `config` for an indexer of `topk`; `forced` are the arguments of `reference.force`."""

    config: MisaConfig
    topk: int
    forced: Dict[str, int] = field(default_factory=dict)

    def select(
        self,
        q: torch.Tensor,
        weights: torch.Tensor,
        keys: torch.Tensor,
        scales: torch.Tensor,
        means: torch.Tensor,
        lengths: torch.Tensor,
        all_heads: bool = False,
    ) -> Selection:
        """Select for some rows of one sequence.

        Args:
            q: float8_e4m3fn [T, H, 128].
            weights: float32 [T, H].
            keys: float8_e4m3fn [S, 128].
            scales: float32 [S].
            means: bfloat16 [P, 128], means of the sequence's pages.
            lengths: int32 [T], tokens visible to each row.
            all_heads: score with all heads instead of the routed ones.
        """
        config = self.config
        heads, routed_q, routed_weights = None, q, weights
        if not all_heads and config.active_heads < q.shape[1]:
            heads = route(
                q, weights, means, lengths, config.active_heads, config.block_size
            )
            routed_q = q.float().gather(1, heads[:, :, None].expand(-1, -1, q.shape[2]))
            routed_weights = weights.gather(1, heads)
        scores = token_scores(routed_q, routed_weights, keys, scales)
        scores = force(scores, lengths, **self.forced)
        mask = visible(lengths, len(keys))
        if config.rerank_candidates and heads is not None:
            mask = topk_mask(scores, mask, config.rerank_candidates)
            scores = token_scores(q, weights, keys, scales)
            scores = force(scores, lengths, **self.forced)
        return Selection(
            positions(topk_mask(scores, mask, self.topk), self.topk), heads
        )

    def select_sequence(
        self,
        q: torch.Tensor,
        weights: torch.Tensor,
        index_k: torch.Tensor,
        pooled_keys: torch.Tensor,
        lengths: torch.Tensor,
        sequence: Sequence,
    ) -> Iterator[Tuple[slice, Selection]]:
        """Select for all rows of one sequence, a chunk of rows at a time.

        Args:
            q, weights, lengths: as in `select`, the rows of the whole batch.
            index_k: uint8 [num_pages, 64 * 132], the layer's index-K cache.
            pooled_keys: bfloat16 [num_pages, 128], the layer's page means.

        Yields:
            Rows of the batch, and what was chosen for them.
        """
        pages = sequence.page_table[: -(-sequence.num_tokens // PAGE_SIZE)]
        keys, scales = read_pages(index_k, pages)
        means = pooled_keys[pages.long()]
        for rows, tokens, all_heads in self._chunks(q.shape[1], sequence):
            yield rows, self.select(
                q[rows],
                weights[rows],
                keys[:tokens],
                scales[:tokens],
                means[: -(-tokens // PAGE_SIZE)],
                lengths[rows],
                all_heads,
            )

    def _chunks(
        self, num_heads: int, sequence: Sequence
    ) -> Iterator[Tuple[slice, int, bool]]:
        """The sequence's rows as (rows, bound on the tokens they see, whether all heads score them)."""
        blocks = -(-sequence.num_tokens // self.config.block_size)
        row_bytes = sequence.num_tokens * _BYTES_PER_SCORE
        row_bytes += num_heads * (128 + 3 * blocks) * 8
        step = max(1, WORKSPACE_BYTES // row_bytes)
        start, stop = sequence.rows.start, sequence.rows.stop
        short = 0
        if sequence.first_length is not None:
            short = max(0, self.config.min_context - sequence.first_length)
        dense_stop = min(start + short, stop)
        for begin, end in ((start, dense_stop), (dense_stop, stop)):
            for first in range(begin, end, step):
                last = min(first + step, end)
                tokens = sequence.num_tokens
                if sequence.first_length is not None:
                    tokens = sequence.first_length + last - start - 1
                yield slice(first, last), tokens, last <= dense_stop


def ragged_sequences(metadata: DSAIndexerMetadata) -> Iterator[Sequence]:
    """The sequences of an extend batch; the host knows every length."""
    row = 0
    extend_lens = metadata.get_dsa_extend_len_cpu()
    seq_lens = metadata.get_indexer_seq_len_cpu().tolist()
    for index, (extend, length) in enumerate(zip(extend_lens, seq_lens)):
        yield Sequence(
            index=index,
            rows=slice(row, row + extend),
            num_tokens=length,
            page_table=metadata.get_page_table_64()[index],
            first_length=length - extend + 1,
        )
        row += extend


def paged_sequences(metadata: DSAIndexerMetadata) -> Iterator[Sequence]:
    """The rows of a decode or verify batch; each has a page table of its own, and only the device knows the lengths."""
    page_tables = metadata.get_page_table_64()
    num_rows = sum(metadata.get_dsa_extend_len_cpu())
    per_sequence = max(1, num_rows // max(1, len(metadata.get_seqlens_int32())))
    for row in range(num_rows):
        yield Sequence(
            index=row // per_sequence,
            rows=slice(row, row + 1),
            num_tokens=page_tables.shape[1] * PAGE_SIZE,
            page_table=page_tables[row],
        )


def is_fused(metadata: DSAIndexerMetadata) -> bool:
    """Whether the attention of this batch takes slots or offsets instead of positions."""
    return envs.SGLANG_DSA_FUSE_TOPK.get() and not metadata.force_unfused_topk


def to_attention_indices(
    selected: torch.Tensor,
    rows: slice,
    sequence: Sequence,
    metadata: DSAIndexerMetadata,
) -> torch.Tensor:
    """Positions in the form that the sparse attention of this batch takes: int32 [T, topk] in, int32 [T, topk] out."""
    if not is_fused(metadata):
        return selected
    if metadata.topk_transform_method == TopkTransformMethod.RAGGED:
        offsets = metadata.attn_metadata.topk_indices_offset[rows]
        return to_ragged(selected, offsets)
    return to_slots(selected, sequence.page_table)
