"""The second stage of hierarchical MISA: candidates scored by all heads."""

import functools
from typing import Optional

import torch
from sgl_kernel_misa import checks
from sgl_kernel_misa.constants import FORMS, MAX_TOPK, RERANK_CAPACITIES, RERANK_RANKS
from sgl_kernel_misa.library import SHAPES, Chain, Step
from sgl_kernel_misa.registration import launching, operation
from sgl_kernel_misa.tensors import KEYS_AND_SCALES, no_offsets

TENSORS = (
    *("q", "weights", "candidates", "index_k", "page_table", "cu_rows", "lengths"),
    *("offsets", "out"),
)
FEW_ROWS = 256  # of a decode batch: then a cluster of CTAs shares a row, for it takes one CTA long


@operation()
def rerank(
    q: torch.Tensor,
    weights: torch.Tensor,
    candidates: torch.Tensor,
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    cu_rows: torch.Tensor,
    lengths: torch.Tensor,
    topk: int,
    *,
    init_tokens: int = 0,
    local_tokens: int = 0,
    output: str = "positions",
    offsets: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The second stage of hierarchical MISA: scores the candidates with all heads and keeps the best `topk`.

    Args:
        candidates: int32 [T, m], positions in ascending order, padded with -1; m at most 16384.
        topk, init_tokens, local_tokens, output, offsets: as for `topk_prefill`.

    Returns:
        int32 [T, topk], ascending by position, padded with -1.

    Raises:
        ValueError: a dtype, a shape or a number is wrong.
    """
    checks.queries(q, weights, lengths)
    rows, num_heads, _ = q.shape
    checks.tensor("candidates", candidates, torch.int32, (rows, None))
    num_candidates = candidates.shape[1]
    checks.require(
        num_candidates <= MAX_TOPK,
        f"candidates must be at most {MAX_TOPK} a row, not {num_candidates}",
    )
    checks.cache(index_k)
    checks.sequences(page_table, cu_rows)
    out = checks.selection(lengths, topk, output, offsets)
    if launching(q):
        batch, max_pages = page_table.shape
        _chain(
            num_heads,
            init_tokens=init_tokens,
            local_tokens=local_tokens,
            form=FORMS[output],
            rows=rows,
            pages=index_k.shape[0],
            batch=batch,
            max_pages=max_pages,
            table_stride=page_table.stride(0),
            num_candidates=num_candidates,
            topk=topk,
        )(
            q,
            weights,
            candidates,
            index_k,
            page_table,
            cu_rows,
            lengths,
            no_offsets(lengths) if offsets is None else offsets,
            out,
        )
    return out


@functools.lru_cache(maxsize=SHAPES)
def _chain(num_heads: int, **numbers: int) -> Chain:
    return Chain(TENSORS, step(num_heads, **numbers), inside=KEYS_AND_SCALES)


def step(num_heads: int, **numbers: int) -> Step:
    """The launch, of "candidates", for a batch's shapes: `numbers` are the kernel's."""
    capacity = next(x for x in RERANK_CAPACITIES if x >= numbers["num_candidates"])
    ranks = max(RERANK_RANKS) if numbers["rows"] <= FEW_ROWS else min(RERANK_RANKS)
    return Step(f"rerank_{num_heads}_{capacity}_{ranks}", numbers)
