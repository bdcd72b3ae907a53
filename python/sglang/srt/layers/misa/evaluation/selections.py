"""Selections that MISA is measured against, in a running server.

With SGLANG_MISA_EVAL_SELECTION set, a server with --enable-misa does not select by MISA but by one of
`environment.SELECTIONS`. They are torch operations that wait for the device, so CUDA graphs have to be off, and the memory that they take does not grow with
the batch. On a CPU the selections are those of `reference`, bit for bit; on a GPU up to scores that rounding ties.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Dict, Optional, Tuple

import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.batch import Batch
from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE, read_pages
from sglang.srt.layers.misa.indexer import Selection
from sglang.srt.layers.misa.sampled_router import slopes_and_estimates
from sglang.srt.layers.misa.selection import positions, to_output, topk_mask

# Those with a shared head.
WITH_SHARED_HEAD = "random-heads-shared", "half-slopes"
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


def stretches(lengths: torch.Tensor, topk: int) -> torch.Tensor:
    """One token by chance of each of `topk` equal stretches of a row's prefix; all tokens where there are no more.

    Args:
        lengths: int [T], tokens visible to each row.

    Returns:
        int32 [T, topk], ascending, -1 behind the last.
    """
    length = lengths.long()[:, None]
    places = torch.arange(topk + 1, device=lengths.device)
    edges = places * length // topk
    # A hash of the row and the stretch, 0 to 65535, stands for a draw.
    draws = (length * 40503 + places[:-1] * 60493) % 65521 * 30011 % 65521
    chosen = edges[:, :-1] + (draws * edges.diff(dim=1) >> 16)
    few = places[:-1].where(places[:-1] < length, -1)
    return chosen.where(length > topk, few).int()


def token_scores(q, weights, k, k_scale, *shared) -> torch.Tensor:
    """`reference.token_scores` of FP8 values; on a GPU their products, which bfloat16 holds exactly, add up in float32."""
    if q.device.type == "cpu":
        return reference.token_scores(q, weights, k, k_scale, *shared)
    scores = torch.zeros(len(q), len(k), device=q.device)
    q, k = q.bfloat16(), k.bfloat16().T
    for head in range(q.shape[1]):
        dots = torch.mm(q[:, head], k, out_dtype=torch.float32)
        scores.addcmul_(weights[:, head, None], dots.relu_())
    if shared:
        query, scale = shared
        dots = torch.mm(query.bfloat16(), k, out_dtype=torch.float32)
        scores.addcmul_(scale[:, None], dots)
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
        form = output, batch.page_table, batch.cu_rows, offsets
        if self.name == "free":
            return Selection(to_output(stretches(batch.lengths, self.topk), *form))
        heads, lengths = self._heads(weights, batch.lengths), batch.lengths.tolist()
        shared: Tuple[torch.Tensor, ...] = ()
        if self.name in WITH_SHARED_HEAD:
            heads, *rest = self._route(q, weights, index_k, batch)
            shared = tuple(rest)
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
                    query += tuple(x[chunk] for x in shared)
                scores = token_scores(
                    *query[:2], k[:tokens], k_scale[:tokens], *query[2:]
                )
                scores = reference.force(scores, seen, **self.forced)
                mask = topk_mask(scores, allowed, self.topk)
                selected[chunk] = positions(mask, self.topk)
        heads = None if heads is None else heads.int()
        return Selection(to_output(selected, *form), heads, *shared)

    def _route(
        self,
        q: torch.Tensor,
        weights: torch.Tensor,
        index_k: torch.Tensor,
        batch: Batch,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The routed heads of each row, int64 [T, active_heads - 1], and its shared head: shared_q and shared_scale."""
        slopes, estimates = torch.empty_like(weights), torch.empty_like(weights)
        for sequence, rows in batch.sequences():
            slopes[rows], estimates[rows] = slopes_and_estimates(
                q[rows],
                weights[rows],
                index_k,
                batch.page_table[sequence],
                batch.lengths[rows],
            )
        count = self.active_heads - 1
        if self.name == "half-slopes":
            heads = reference.best_heads(estimates, count)
            slopes.fill_(0.5)
        else:
            heads = random_heads(batch.lengths, weights.shape[1], count)
        return heads, *reference.shared_query(q, weights, slopes, heads)

    def _heads(
        self, weights: torch.Tensor, lengths: torch.Tensor
    ) -> Optional[torch.Tensor]:
        """The heads that score each row, int64 [T, active_heads]; None for all of them, or where a router chooses them."""
        if self.name == "hisa" or self.name in WITH_SHARED_HEAD:
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
