"""The variants that run on `sgl_kernel_misa`."""

import torch

from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE
from sglang.srt.layers.misa.testing.batches import Batch

from .data import Step


class Misa:
    """Route, score and select, and re-rank if `rerank_candidates` > 0; with `active_heads` None every head scores.

    Writes what production writes: indices into the batch's contiguous keys in prefill, cache slots in decode.
    """

    def __init__(
        self,
        name: str,
        step: Step,
        layers: list[Batch],
        topk: int,
        active_heads: int | None,
        block_size: int,
        rerank_candidates: int,
    ):
        import sgl_kernel_misa

        sgl_kernel_misa.check_device()
        self.name, self.step, self.layers, self.topk = name, step, layers, topk
        self.ops = sgl_kernel_misa
        self.active_heads = active_heads
        self.block_size = block_size
        self.candidates = rerank_candidates
        self.prefill = step.case.mode == "prefill"
        self.output = (
            {"output": "ragged", "offsets": step.offsets}
            if self.prefill
            else {"output": "slots"}
        )

    def route(self, i: int) -> torch.Tensor | None:
        """Active heads of layer i's rows -> int32 [T, active_heads], None if all score."""
        if self.active_heads is None:
            return None
        layer = self.layers[i]
        return self.ops.route(
            layer.q,
            layer.weights,
            layer.pooled_keys,
            self.step.page_table,
            self.step.cu_rows,
            self.step.lengths,
            self.active_heads,
            self.block_size,
        )

    def first_stage(self) -> tuple:
        """How many tokens it keeps, and in which form: candidates (positions) if there is a second one, else the result."""
        return (self.candidates, {}) if self.candidates else (self.topk, self.output)

    def score_select(self, i: int, heads: torch.Tensor | None) -> torch.Tensor:
        """The top candidates (positions) if there is a second stage, else the result."""
        step, layer = self.step, self.layers[i]
        topk, output = self.first_stage()
        query = (layer.q, layer.weights, heads, layer.index_k, step.page_table)
        if self.prefill:
            return self.ops.topk_prefill(
                *query,
                step.cu_rows,
                step.lengths,
                topk,
                max_context=step.case.context,
                **output,
            )
        return self.ops.topk_decode(
            *query, step.case.rows_per_seq, step.lengths, topk, **output
        )

    def rerank(self, i: int, candidates: torch.Tensor) -> torch.Tensor:
        layer = self.layers[i]
        return self.ops.rerank(
            layer.q,
            layer.weights,
            candidates,
            layer.index_k,
            self.step.page_table,
            self.step.cu_rows,
            self.step.lengths,
            self.topk,
            **self.output,
        )

    def route_score_select(self, i: int) -> torch.Tensor:
        """Both; in decode one operation does, and overlaps them."""
        if self.prefill or self.active_heads is None:
            return self.score_select(i, self.route(i))
        step, layer = self.step, self.layers[i]
        topk, output = self.first_stage()
        _, selected = self.ops.route_topk_decode(
            layer.q,
            layer.weights,
            layer.pooled_keys,
            layer.index_k,
            step.page_table,
            step.case.rows_per_seq,
            step.lengths,
            self.active_heads,
            self.block_size,
            topk,
            **output,
        )
        return selected

    def total(self, i: int) -> torch.Tensor:
        """The indices or cache slots of layer i -> int32 [T, topk]."""
        selected = self.route_score_select(i)
        return self.rerank(i, selected) if self.candidates else selected

    def stages(self) -> dict:
        """Parts of `total`, each a function of the layer; their inputs are computed here."""
        layers = range(len(self.layers))
        heads = [self.route(i) for i in layers]
        stages = {"score_select": lambda i: self.score_select(i, heads[i])}
        if self.active_heads is not None:
            stages = {"route": self.route} | stages
        if self.candidates:
            found = [self.score_select(i, heads[i]) for i in layers]
            stages["rerank"] = lambda i: self.rerank(i, found[i])
        return stages

    def extras(self) -> dict:
        """Timed beside `total`, not part of it: the pooled keys of the step's new tokens (they are all there)."""
        if self.active_heads is None:
            return {}
        step = self.step
        position = step.lengths.long() - 1
        sequence = self.layers[0].row_sequence()
        pages = step.page_table[sequence, position // PAGE_SIZE].long()
        slots = pages * PAGE_SIZE + position % PAGE_SIZE

        def update(i: int) -> None:
            layer = self.layers[i]
            self.ops.update_pooled_keys(layer.index_k, slots, layer.pooled_keys)

        return {"update": update}

    def positions(self, output: torch.Tensor) -> torch.Tensor:
        return self.step.positions(self.layers[0], output)
