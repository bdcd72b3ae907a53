"""The variants that run on `sgl_kernel_misa`."""

from typing import NamedTuple

import torch

from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE
from sglang.srt.layers.misa.testing.batches import Batch
from sglang.srt.layers.misa.testing.judge import SharedHead

from .data import Step


class Routed(NamedTuple):
    """What scores a row: some heads, int32 [T, h], or None for all; with the sampled router the shared head too."""

    heads: torch.Tensor | None
    shared: SharedHead | None = None

    def options(self) -> dict:
        """The shared head as an operation takes it."""
        if self.shared is None:
            return {}
        return {"shared_q": self.shared.query, "shared_scale": self.shared.scale}


class Misa:
    """Route, score and select, and re-rank if `rerank_candidates` > 0; with `router` None every head scores.

    Writes what production writes: indices into the batch's contiguous keys in prefill, cache slots in decode.
    """

    def __init__(
        self,
        name: str,
        step: Step,
        layers: list[Batch],
        topk: int,
        router: str | None,
        active_heads: int,
        block_size: int,
        rerank_candidates: int,
    ):
        import sgl_kernel_misa

        sgl_kernel_misa.check_device()
        self.name, self.step, self.layers, self.topk = name, step, layers, topk
        self.ops, self.router = sgl_kernel_misa, router
        self.active_heads = active_heads
        self.block_size = block_size
        self.candidates = rerank_candidates
        self.prefill = step.case.mode == "prefill"
        self.output = (
            {"output": "ragged", "offsets": step.offsets}
            if self.prefill
            else {"output": "slots"}
        )

    def route(self, i: int) -> Routed:
        """What scores layer i's rows."""
        layer, step = self.layers[i], self.step
        query = (layer.q, layer.weights)
        rows = (step.page_table, step.cu_rows, step.lengths)
        if self.router == "sampled":
            heads, *shared = self.ops.route_sampled(
                *query, layer.index_k, *rows, self.active_heads
            )
            return Routed(heads, SharedHead(*shared))
        if self.router == "pooled":
            return Routed(
                self.ops.route(
                    *query,
                    layer.pooled_keys,
                    *rows,
                    self.active_heads,
                    self.block_size,
                )
            )
        return Routed(None)

    def first_stage(self) -> tuple:
        """How many tokens it keeps, and in which form: candidates (positions) if there is a second one, else the result."""
        return (self.candidates, {}) if self.candidates else (self.topk, self.output)

    def score_select(self, i: int, routed: Routed) -> torch.Tensor:
        """The top candidates (positions) if there is a second stage, else the result."""
        step, layer = self.step, self.layers[i]
        topk, output = self.first_stage()
        query = (
            layer.q,
            layer.weights,
            routed.heads,
            layer.index_k,
            step.page_table,
        )
        output = output | routed.options()
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
        """Both, in one operation where there is one for them."""
        step, layer = self.step, self.layers[i]
        topk, output = self.first_stage()
        query = (layer.q, layer.weights)
        if self.prefill or self.router is None:
            return self.score_select(i, self.route(i))
        rows = (step.page_table, step.case.rows_per_seq, step.lengths)
        if self.router == "sampled":
            *_, selected = self.ops.route_sampled_topk_decode(
                *query, layer.index_k, *rows, self.active_heads, topk, **output
            )
        else:
            _, selected = self.ops.route_topk_decode(
                *query,
                layer.pooled_keys,
                layer.index_k,
                *rows,
                self.active_heads,
                self.block_size,
                topk,
                **output,
            )
        return selected

    def total(self, i: int) -> torch.Tensor:
        """The indices or cache slots of layer i -> int32 [T, topk]; in a prefill of the sampled router by one operation."""
        if self.prefill and self.router == "sampled":
            step, layer = self.step, self.layers[i]
            *_, selected = self.ops.route_sampled_topk_prefill(
                *(layer.q, layer.weights, layer.index_k),
                *(step.page_table, step.cu_rows, step.lengths),
                *(self.active_heads, self.topk),
                rerank_candidates=self.candidates,
                max_context=step.case.context,
                **self.output,
            )
            return selected
        selected = self.route_score_select(i)
        return self.rerank(i, selected) if self.candidates else selected

    def stages(self) -> dict:
        """Parts of `total`, each a function of the layer; their inputs are computed here."""
        layers = range(len(self.layers))
        routed = [self.route(i) for i in layers]
        stages = {"score_select": lambda i: self.score_select(i, routed[i])}
        if self.router is not None:
            stages = {"route": self.route} | stages
        if self.candidates:
            found = [self.score_select(i, routed[i]) for i in layers]
            stages["rerank"] = lambda i: self.rerank(i, found[i])
        return stages

    def extras(self) -> dict:
        """Timed beside `total`, not part of it: the pooled keys of the step's new tokens (they are all there)."""
        if self.router != "pooled":
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
