"""The MISA indexer: q, weights and the paged index-K cache in, the top-k positions of every query out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, Optional, Tuple

import torch

from sglang.srt.layers.misa.batch import Batch
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.operations import operations


@dataclass
class Selection:
    """What was chosen for the rows of a batch.

    Attributes:
        indices: int32 [T, topk], ascending, -1 padded, in the form that was asked for.
        heads: int32 [T, active_heads], ascending; None where all heads scored all rows.
        dense: bool [T], the rows that all heads scored although `heads` names some; None for none.
    """

    indices: torch.Tensor
    heads: Optional[torch.Tensor] = None
    dense: Optional[torch.Tensor] = None


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
        index_k: torch.Tensor,
        pooled_keys: torch.Tensor,
        batch: Batch,
        output: str = "positions",
        offsets: Optional[torch.Tensor] = None,
    ) -> Selection:
        """Select for all rows of a batch.

        On a GPU nothing here waits for the device, and the shapes of a decode batch are static: a captured CUDA graph
        may hold it.

        Args:
            q: float8_e4m3fn [T, H, 128], contiguous.
            weights: float32 [T, H], contiguous.
            index_k: uint8 [num_pages, 64 * 132], the layer's index-K cache.
            pooled_keys: bfloat16 [num_pages, 128], the layer's page means.
            output: "positions" in the sequence, "slots" of the cache, or "ragged": positions plus offsets.
            offsets: int32 [T], for "ragged".
        """
        config = self.config
        form = {"output": output, "offsets": offsets}
        # Decode always routes. Rows that see at most topk tokens select all of them, whichever heads score.
        least, largest = batch.bounds or (config.min_context, config.min_context)
        some_dense = least < config.min_context and self.topk + 1 < config.min_context
        all_dense = largest < config.min_context
        if all_dense or config.active_heads >= q.shape[1]:
            best = self._best(
                q=q,
                weights=weights,
                heads=None,
                index_k=index_k,
                batch=batch,
                topk=self.topk,
                **form,
            )
            return Selection(best)
        if config.rerank_candidates:
            heads, candidates = self._routed(
                q=q,
                weights=weights,
                index_k=index_k,
                pooled_keys=pooled_keys,
                batch=batch,
                topk=config.rerank_candidates,
            )
            indices = operations(q.device).rerank(
                q=q,
                weights=weights,
                candidates=candidates,
                index_k=index_k,
                page_table=batch.page_table,
                cu_rows=batch.cu_rows,
                lengths=batch.lengths,
                topk=self.topk,
                **form,
                **self.forced,
            )
        else:
            heads, indices = self._routed(
                q=q,
                weights=weights,
                index_k=index_k,
                pooled_keys=pooled_keys,
                batch=batch,
                topk=self.topk,
                **form,
            )
        if not some_dense:
            return Selection(indices, heads)

        # Rows that see too few tokens are not a contiguous part of the batch. All rows are scored again, as if none saw
        # more than those do: no row is gathered, and the host need not know which they are.
        dense = batch.lengths < config.min_context
        best = self._best(
            q=q,
            weights=weights,
            heads=None,
            index_k=index_k,
            batch=batch.truncated(config.min_context - 1),
            topk=self.topk,
            **form,
        )
        return Selection(torch.where(dense[:, None], best, indices), heads, dense)

    def _routed(
        self,
        *,
        q: torch.Tensor,
        weights: torch.Tensor,
        index_k: torch.Tensor,
        pooled_keys: torch.Tensor,
        batch: Batch,
        topk: int,
        **form,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """The active heads of every row, and the `topk` tokens of highest score by them."""
        ops, config = operations(q.device), self.config
        if batch.bounds is None:
            return ops.route_topk_decode(
                q=q,
                weights=weights,
                pooled_keys=pooled_keys,
                index_k=index_k,
                page_table=batch.page_table,
                rows_per_seq=1,
                lengths=batch.lengths,
                active_heads=config.active_heads,
                block_size=config.block_size,
                topk=topk,
                **form,
                **self.forced,
            )
        heads = ops.route(
            q=q,
            weights=weights,
            pooled_keys=pooled_keys,
            page_table=batch.page_table,
            cu_rows=batch.cu_rows,
            lengths=batch.lengths,
            active_heads=config.active_heads,
            block_size=config.block_size,
        )
        best = self._best(
            q=q,
            weights=weights,
            heads=heads,
            index_k=index_k,
            batch=batch,
            topk=topk,
            **form,
        )
        return heads, best

    def _best(
        self,
        *,
        q: torch.Tensor,
        weights: torch.Tensor,
        heads: Optional[torch.Tensor],
        index_k: torch.Tensor,
        batch: Batch,
        topk: int,
        **form,
    ) -> torch.Tensor:
        """The `topk` tokens of highest score by `heads`, or by all heads where that is None."""
        ops = operations(q.device)
        if batch.bounds is None:
            return ops.topk_decode(
                q=q,
                weights=weights,
                heads=heads,
                index_k=index_k,
                page_table=batch.page_table,
                rows_per_seq=1,
                lengths=batch.lengths,
                topk=topk,
                **form,
                **self.forced,
            )
        return ops.topk_prefill(
            q=q,
            weights=weights,
            heads=heads,
            index_k=index_k,
            page_table=batch.page_table,
            cu_rows=batch.cu_rows,
            lengths=batch.lengths,
            topk=topk,
            max_context=batch.bounds[1],
            **form,
            **self.forced,
        )
