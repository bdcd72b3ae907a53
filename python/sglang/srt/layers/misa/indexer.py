"""The MISA indexer: q, weights and the paged index-K cache in, the top-k positions of every query out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Optional

import torch

from sglang.srt.layers.misa.batch import Batch
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.operations import operations


@dataclass
class Selection:
    """What was chosen for the rows of a batch.

    Attributes:
        indices: int32 [T, topk], ascending, -1 padded, in the form that was asked for.
        heads: int32 [T, h], ascending, the routed heads; None where all heads scored all rows.
        shared_q: float8_e4m3fn [T, 128], the query of the head beside those; None where there is none.
        shared_scale: float32 [T], its scale.
    """

    indices: torch.Tensor
    heads: Optional[torch.Tensor] = None
    shared_q: Optional[torch.Tensor] = None
    shared_scale: Optional[torch.Tensor] = None


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
        pooled_keys: Optional[torch.Tensor],
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
            pooled_keys: bfloat16 [num_pages, 128], the layer's page means; None with the sampled router.
            output: "positions" in the sequence, "slots" of the cache, or "ragged": positions plus offsets.
            offsets: int32 [T], for "ragged".
        """
        config = self.config
        form: Dict[str, Any] = {"output": output, "offsets": offsets}
        if config.active_heads >= q.shape[1]:
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
        tensors: Dict[str, Any] = {
            "q": q,
            "weights": weights,
            "index_k": index_k,
            "pooled_keys": pooled_keys,
            "batch": batch,
        }
        if not config.rerank_candidates:
            return self._routed(**tensors, topk=self.topk, **form)
        if batch.bounds is not None and not config.pools_keys:
            # One operation does all of it.
            form["rerank_candidates"] = config.rerank_candidates
            return self._routed(**tensors, topk=self.topk, **form)
        selection = self._routed(**tensors, topk=config.rerank_candidates)
        # Candidates are gathered row by row: there is nothing to share.
        page_table, cu_rows = batch.by_row or (batch.page_table, batch.cu_rows)
        selection.indices = operations(q.device).rerank(
            q=q,
            weights=weights,
            candidates=selection.indices,
            index_k=index_k,
            page_table=page_table,
            cu_rows=cu_rows,
            lengths=batch.lengths,
            topk=self.topk,
            **form,
            **self.forced,
        )
        return selection

    def _routed(
        self,
        *,
        q: torch.Tensor,
        weights: torch.Tensor,
        index_k: torch.Tensor,
        pooled_keys: Optional[torch.Tensor],
        batch: Batch,
        topk: int,
        **form,
    ) -> Selection:
        """The `topk` tokens of highest score by the heads that the router chooses."""
        ops, config = operations(q.device), self.config
        if batch.bounds is None:
            decode = {
                "q": q,
                "weights": weights,
                "index_k": index_k,
                "page_table": batch.page_table,
                "rows_per_seq": batch.rows_per_seq,
                "lengths": batch.lengths,
                "active_heads": config.active_heads,
                "topk": topk,
                **form,
                **self.forced,
            }
            if not config.pools_keys:
                *routed, indices = ops.route_sampled_topk_decode(**decode)
                return Selection(indices, *routed)
            heads, indices = ops.route_topk_decode(
                pooled_keys=pooled_keys, block_size=config.block_size, **decode
            )
            return Selection(indices, heads)
        rows = {
            "q": q,
            "weights": weights,
            "page_table": batch.page_table,
            "cu_rows": batch.cu_rows,
            "lengths": batch.lengths,
            "active_heads": config.active_heads,
        }
        if not config.pools_keys:
            *routed, indices = ops.route_sampled_topk_prefill(
                index_k=index_k,
                topk=topk,
                max_context=batch.bounds[1],
                **rows,
                **form,
                **self.forced,
            )
            return Selection(indices, *routed)
        heads = ops.route(pooled_keys=pooled_keys, block_size=config.block_size, **rows)
        best = self._best(
            q=q,
            weights=weights,
            heads=heads,
            index_k=index_k,
            batch=batch,
            topk=topk,
            **form,
        )
        return Selection(best, heads)

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
        """The `topk` tokens of highest score by `heads`; by all heads where that is None."""
        ops = operations(q.device)
        if batch.bounds is None:
            return ops.topk_decode(
                q=q,
                weights=weights,
                heads=heads,
                index_k=index_k,
                page_table=batch.page_table,
                rows_per_seq=batch.rows_per_seq,
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
