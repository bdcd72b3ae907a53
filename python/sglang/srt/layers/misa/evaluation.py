"""Selections that MISA is measured against, in a running server: for evaluation only, no feature of it.

With SGLANG_MISA_EVAL_SELECTION set, a server with --enable-misa does not select by MISA but by one of SELECTIONS. They are
torch operations that wait for the device, so CUDA graphs have to be off, and the memory that they take does not grow with
the batch. On a CPU the selections are those of `reference`, bit for bit; on a GPU up to scores that rounding ties.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Dict, Optional

import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.batch import Batch
from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE, read_pages
from sglang.srt.layers.misa.indexer import Selection
from sglang.srt.layers.misa.selection import positions, to_output, topk_mask

EVAL_SELECTION_ENV = "SGLANG_MISA_EVAL_SELECTION"
SELECTIONS = {
    "hisa": "HISA's 64 blocks of 128 tokens, scored by all heads",
    "random-heads": "--misa-active-heads other heads for every query, by chance",
    "heaviest-heads": "the --misa-active-heads of the largest average weight, the same for all queries",
}

CHUNK_SCORES = (
    1 << 24
)  # scored at a time: 64 MiB in float32, some 600 MiB with all else
DRAWS = (
    4096  # the random heads of a position are those of the one as many tokens before
)

# The heaviest heads of each layer of this process.
_heaviest: Dict[int, torch.Tensor] = {}


def eval_selection() -> Optional[str]:
    """What SGLANG_MISA_EVAL_SELECTION names, or None where it is not set."""
    return os.environ.get(EVAL_SELECTION_ENV) or None


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
    """Has the interface of `MisaIndexer`, and selects by `name`, one of SELECTIONS, in layer `layer_id`.

    The heaviest heads of a layer are those of the first rows that see more tokens than are selected, and stay so: a server
    begins with a short prompt of its own, which says nothing of a text's heads.
    """

    name: str
    active_heads: int
    topk: int
    forced: Dict[str, int]
    layer_id: int

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
        if self.layer_id not in _heaviest:
            long = lengths > self.topk
            if not long.any():
                # All tokens are selected, whichever heads score them.
                heads = heaviest_heads(weights, self.active_heads)
                return heads.expand(len(weights), -1)
            _heaviest[self.layer_id] = heaviest_heads(weights[long], self.active_heads)
        return _heaviest[self.layer_id].expand(len(weights), -1)
