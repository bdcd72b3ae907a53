"""Selection for extend batches: sample, threshold, score, select.

The fp32 scores of rows x context are never written. A strided sample of the keys gives three thresholds a row, two of which
bracket its k-th score; scoring leaves two bits a token; selection scores what lies between these two once more and is exact
whatever the thresholds were.
"""

from typing import Optional

import torch
from sgl_kernel_misa import checks
from sgl_kernel_misa.constants import (
    FORMS,
    PAGE_BYTES,
    PAGE_SIZE,
    SELECT_CAPACITIES,
    SPAN,
    rows_per_tile,
)
from sgl_kernel_misa.device import num_sms
from sgl_kernel_misa.library import launch
from sgl_kernel_misa.registration import launching, operation
from sgl_kernel_misa.tensors import keys_and_scales, no_offsets, slots

# Rows are taken in chunks, so that the workspace does not grow with the batch. A constant: nothing may depend on how much
# memory happens to be free.
WORKSPACE_BYTES = 160 << 20
# One token in 16 is sampled, of short contexts one in 8: there the candidates that closer thresholds spare `select` are
# more than the samples cost.
SAMPLE_SHIFT, SHORT_SAMPLE_SHIFT, SHORT_CONTEXT = 4, 3, 16 << 10


@operation()
def topk_prefill(
    q: torch.Tensor,
    weights: torch.Tensor,
    heads: Optional[torch.Tensor],
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    cu_rows: torch.Tensor,
    lengths: torch.Tensor,
    topk: int,
    *,
    max_context: Optional[int] = None,
    shared_q: Optional[torch.Tensor] = None,
    shared_scale: Optional[torch.Tensor] = None,
    init_tokens: int = 0,
    local_tokens: int = 0,
    output: str = "positions",
    offsets: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The `topk` tokens of highest score of every row of an extend batch.

    I[t,s] = k_scale[s] * (sum over the row's heads of weights[t,j] * relu(q[t,j] . k[s]) + shared_scale[t] * (shared_q[t] . k[s]))
    Equal scores are broken in favour of the lower position. Rows that see at most `topk` tokens select all of them.

    Args:
        topk: a multiple of 64 up to 16384.
        max_context: bound on `lengths` that the host knows, which bounds the workspace; P * 64 by default.
        shared_q, shared_scale: the shared head, as `route_sampled` makes it; both or neither.
        init_tokens, local_tokens: so many tokens at the start and at the end of what a row sees score +inf.
        output: "positions"; "slots" of the cache, page_table[b, p // 64] * 64 + p % 64; "ragged", p + offsets[t].
        offsets: int32 [T], for "ragged".

    Returns:
        int32 [T, topk], ascending by position, padded with -1; padding rows hold -1 only.

    Raises:
        ValueError: a dtype, a shape or a number is wrong.
    """
    checks.queries(q, weights, lengths)
    checks.heads(heads, q, shared_q, shared_scale)
    checks.cache(index_k)
    checks.sequences(page_table, cu_rows)
    batch, max_pages = page_table.shape
    context = max_pages * PAGE_SIZE if max_context is None else max_context
    checks.context(context)
    checks.require(
        context <= max_pages * PAGE_SIZE,
        f"max_context must be at most the {max_pages * PAGE_SIZE} tokens of page_table, not {context}",
    )
    out = checks.selection(lengths, topk, output, offsets)
    if not launching(q):
        return out

    rows = q.shape[0]
    spans = max(1, -(-context // SPAN))
    words = spans * SPAN // 32
    sms = num_sms(q.device)
    scoring, slots_of = slots(q, weights, heads, shared_q, shared_scale)
    tile_rows = rows_per_tile(scoring)
    keys, scales = keys_and_scales(index_k)
    rows_of = dict(cu_rows=cu_rows, lengths=lengths)
    queries = dict(
        q=q,
        weights=weights,
        **slots_of,
        rows=rows,
    )
    table = dict(page_table=page_table, batch=batch, table_stride=page_table.stride(0))

    shift = SHORT_SAMPLE_SHIFT if context <= SHORT_CONTEXT else SAMPLE_SHIFT
    sample_pages = max(1, -(-context // (PAGE_SIZE << shift)))
    samples = index_k.new_empty(batch, sample_pages, PAGE_BYTES)
    launch(
        "sample",
        index_k=index_k,
        out=samples,
        **rows_of,
        **table,
        rows=rows,
        pages=index_k.shape[0],
        max_pages=max_pages,
        sample_pages=sample_pages,
        sample_shift=shift,
    )
    sample_keys, sample_scales = keys_and_scales(samples.view(-1, PAGE_BYTES))

    # Sequences begin new tiles, padding rows form one more sequence.
    tiles = rows // tile_rows + batch + 1
    slot_bytes = sample_pages * PAGE_SIZE * 4 + 2 * words * 4
    chunk = max(1, WORKSPACE_BYTES // (slot_bytes * tile_rows))
    chunk = min(chunk, tiles)
    row_slots = chunk * tile_rows
    sampled = weights.new_empty(row_slots, sample_pages * PAGE_SIZE)
    thresholds = weights.new_empty(row_slots, 3)
    planes = lengths.new_empty(row_slots, 2, words)

    # A CTA begins by collecting its queries, which takes as long as several pages: two waves of CTAs, one for samples.
    span_pages = SPAN // PAGE_SIZE
    split_pages = -(-spans // max(1, 2 * sms // chunk)) * span_pages
    split_sample_pages = -(-sample_pages // max(1, sms // chunk))
    small, large = SELECT_CAPACITIES
    capacity = small if topk <= 8192 else large
    for first in range(0, tiles, chunk):
        count = min(chunk, tiles - first)
        launch(
            f"score_samples_{scoring}",
            **queries,
            **rows_of,
            **table,
            keys=sample_keys,
            scales=sample_scales,
            pages=batch * sample_pages,
            max_pages=sample_pages,
            thresholds=thresholds,
            out=sampled,
            slots=row_slots,
            width=sample_pages * PAGE_SIZE,
            first_tile=first,
            tiles=count,
            splits=-(-sample_pages // split_sample_pages),
            split_pages=split_sample_pages,
            sample_shift=shift,
            topk=topk,
            init_tokens=0,
            local_tokens=0,
        )
        launch(
            "threshold",
            samples=sampled,
            **rows_of,
            out=thresholds,
            batch=batch,
            first_tile=first,
            tile_rows=tile_rows,
            topk=topk,
            sample_shift=shift,
            room=capacity >> shift,
            # Too many above the high threshold all become candidates: little is lost while they fit.
            deviations=2 if topk + topk // 4 <= capacity else 3,
            rows=rows,
            bounds=batch + 1,
            slots=count * tile_rows,
            width=sample_pages * PAGE_SIZE,
        )
        launch(
            f"score_planes_{scoring}",
            **queries,
            **rows_of,
            **table,
            keys=keys,
            scales=scales,
            pages=index_k.shape[0],
            max_pages=max_pages,
            thresholds=thresholds,
            out=planes,
            slots=row_slots,
            width=words,
            first_tile=first,
            tiles=count,
            splits=-(-spans * span_pages // split_pages),
            split_pages=split_pages,
            sample_shift=shift,
            topk=topk,
            init_tokens=init_tokens,
            local_tokens=local_tokens,
        )
        launch(
            f"select_{scoring}_{capacity}",
            **queries,
            **rows_of,
            **table,
            keys=keys,
            scales=scales,
            pages=index_k.shape[0],
            max_pages=max_pages,
            thresholds=thresholds,
            planes=planes,
            offsets=no_offsets(lengths) if offsets is None else offsets,
            out=out,
            first_tile=first,
            tile_rows=tile_rows,
            init_tokens=init_tokens,
            local_tokens=local_tokens,
            form=FORMS[output],
            slots=count * tile_rows,
            width=words,
            topk=topk,
        )
    return out
