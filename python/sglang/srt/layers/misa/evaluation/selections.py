"""Selections that MISA is measured against, in a running server.

With SGLANG_MISA_EVAL_SELECTION set, a server with --enable-misa does not select by MISA but by one of
`environment.SELECTIONS`. They are torch operations that wait for the device, so CUDA graphs have to be off, and the memory that they take does not grow with
the batch. On a CPU the selections are those of `reference`, bit for bit; on a GPU up to scores that rounding ties.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Dict, Optional

import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.batch import Batch
from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE, read_pages
from sglang.srt.layers.misa.indexer import Selection
from sglang.srt.layers.misa.selection import positions, to_output, topk_mask

# Scored at a time: 64 MiB in float32, some 600 MiB with all else.
CHUNK_SCORES = 1 << 24
# The random heads of a position are those of the one as many tokens before.
DRAWS = 4096


@functools.lru_cache
def _draws(num_heads: int, device: torch.device) -> torch.Tensor:
    """float32 [DRAWS, num_heads], always the same."""
    rng = torch.Generator().manual_seed(0)
    return torch.rand(DRAWS, num_heads, generator=rng).to(device)


def random_heads(lengths: torch.Tensor, num_heads: int, count: int) -> torch.Tensor:
    """`count` heads of each query by chance, a function of its place alone: int64 [T, count] of lengths, int [T]."""
    draws = _draws(num_heads, lengths.device)
    return reference.best_heads(draws[lengths.long() % DRAWS], count)


def heaviest_heads(weights: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` heads of the largest mean |weight|: int64 [count] of weights, float32 [T, H]."""
    return reference.best_heads(weights.abs().mean(0, keepdim=True), count)[0]


def token_scores(q, weights, k, k_scale) -> torch.Tensor:
    """`reference.token_scores` of FP8 values; on a GPU their products, which bfloat16 holds exactly, add up in float32."""
    if q.device.type == "cpu":
        return reference.token_scores(q, weights, k, k_scale)
    scores = torch.zeros(len(q), len(k), device=q.device)
    q, k = q.bfloat16(), k.bfloat16().T
    for head in range(q.shape[1]):
        dots = torch.mm(q[:, head], k, out_dtype=torch.float32)
        scores.addcmul_(weights[:, head, None], dots.relu_())
    return scores.mul_(k_scale)


@dataclass
class EvaluationIndexer:
    """Has the interface of `MisaIndexer`, and selects by `name`, one of `environment.SELECTIONS`, in layer `layer_id`.

    `heaviest` keeps the heaviest heads of each layer from call to call. The heaviest heads of a layer are those of the first rows that see more tokens than are selected, and stay so: a server
    begins with a short prompt of its own, which says nothing of a text's heads.
    """

    name: str
    active_heads: int
    topk: int
    forced: Dict[str, int]
    layer_id: int
    heaviest: Dict[int, torch.Tensor] = field(default_factory=dict)

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
        """Select for all rows of a batch; see `MisaIndexer.select`."""
        heads, lengths = self._heads(weights, batch.lengths), batch.lengths.tolist()
        selected = torch.empty(len(q), self.topk, dtype=torch.int32, device=q.device)
        for sequence, rows in batch.sequences():
            if rows.start == rows.stop:
                continue
            longest = max(lengths[rows])
            pages = batch.page_table[sequence, : -(-longest // PAGE_SIZE)]
            k, k_scale = (x[:longest] for x in read_pages(index_k, pages))
            pooled = None if heads is not None else reference.hisa_pooled(k, k_scale)
            step = max(1, CHUNK_SCORES // longest)
            for first in range(rows.start, rows.stop, step):
                chunk = slice(first, min(first + step, rows.stop))
                seen, tokens = batch.lengths[chunk], max(lengths[chunk])
                query = q[chunk], weights[chunk]
                if heads is None:
                    allowed = reference.hisa_tokens(*query, pooled, seen, tokens)
                else:
                    allowed = reference.visible(seen, tokens)
                    query = reference.of_heads(*query, heads[chunk])
                scores = token_scores(*query, k[:tokens], k_scale[:tokens])
                scores = reference.force(scores, seen, **self.forced)
                mask = topk_mask(scores, allowed, self.topk)
                selected[chunk] = positions(mask, self.topk)
        form = output, batch.page_table, batch.cu_rows, offsets
        heads = None if heads is None else heads.int()
        return Selection(to_output(selected, *form), heads)

    def _heads(
        self, weights: torch.Tensor, lengths: torch.Tensor
    ) -> Optional[torch.Tensor]:
        """The heads that score each row, int64 [T, active_heads]; None for all of them."""
        if self.name == "hisa":
            return None
        if self.name == "random-heads":
            return random_heads(lengths, weights.shape[1], self.active_heads)
        if self.layer_id not in self.heaviest:
            long = lengths > self.topk
            if not long.any():
                # All tokens are selected, whichever heads score them.
                heads = heaviest_heads(weights, self.active_heads)
                return heads.expand(len(weights), -1)
            self.heaviest[self.layer_id] = heaviest_heads(
                weights[long], self.active_heads
            )
        return self.heaviest[self.layer_id].expand(len(weights), -1)
