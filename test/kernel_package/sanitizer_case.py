"""Every op once on small inputs, for compute-sanitizer:

compute-sanitizer --tool memcheck python sanitizer_case.py
compute-sanitizer --tool racecheck python sanitizer_case.py
"""

import sgl_kernel_misa
import torch
from kernel_ops import (
    rerank,
    route,
    route_sampled,
    route_sampled_topk_decode,
    route_sampled_topk_prefill,
    route_topk_decode,
    topk_decode,
    topk_prefill,
)

from sglang.srt.layers.misa.testing.batches import (
    DEVICE,
    make_batch,
    random_heads,
    write_batch,
)
from sglang.srt.layers.misa.testing.inputs import make_inputs
from sglang.srt.layers.misa.testing.score_inputs import distributed


def run(batch, rows_per_seq: int) -> None:
    slots = torch.arange(len(batch.index_k) * 64, device=batch.q.device)
    sgl_kernel_misa.update_pooled_keys(batch.index_k, slots, batch.pooled_keys)
    heads = route(batch, 8, 128)
    for scoring in (heads, random_heads(batch, 1), None):
        topk_prefill(batch, scoring, 64, output="slots")
        if rows_per_seq:
            topk_decode(batch, scoring, 64, init_tokens=1, local_tokens=2)
    if rows_per_seq:
        route_topk_decode(batch, 8, 128, 64)
    for active_heads in (1, 4, 8):
        heads, *shared = route_sampled(batch, active_heads)
        options = dict(zip(("shared_q", "shared_scale"), shared))
        topk_prefill(batch, heads, 64, output="slots", **options)
        for candidates in (0, 256):
            route_sampled_topk_prefill(
                batch, active_heads, 64, rerank_candidates=candidates
            )
        if rows_per_seq:
            topk_decode(batch, heads, 64, **options)
            route_sampled_topk_decode(batch, active_heads, 64)
    heads = route(batch, 8, 128)
    candidates = topk_prefill(batch, heads, 256)
    rerank(batch, candidates, 64)
    torch.cuda.synchronize()


def of_any_lengths(rows: int, num_heads: int):
    """Two sequences whose rows have each its own length, at edges of pages and of the 64 tokens that are selected."""
    tokens = [1, 63, 64, 65, 127, 128, 129, 700]
    inputs = make_inputs("equal", rows, num_heads, 700, device=DEVICE)
    sequences = [
        inputs._replace(lengths=inputs.lengths.new_tensor(lengths))
        for lengths in (tokens[:rows], tokens[-rows:])
    ]
    return write_batch(sequences)


def main() -> None:
    sgl_kernel_misa.check_device()
    for num_heads in (32, 64):
        specs = [(1, 1), (33, 700), (3, 64), (5, 65)]
        run(make_batch("random", specs, num_heads, padded_rows=3), 0)
        run(make_batch("random", [(3, 700), (3, 3), (3, 65)], num_heads), 3)
        for rows in (5, 6, 8):
            run(of_any_lengths(rows, num_heads), rows)
        # Equal scores, and scores that a sample of them misjudges.
        run(make_batch("equal", [(2, 700), (2, 100)], num_heads), 2)
        # Estimates and scores that are not numbers, in a row between others.
        batch = make_batch("random", [(3, 700), (3, 100)], num_heads)
        batch.weights[1] = float("nan")
        run(batch, 3)
        for name in ("every 16th is tiny", "every 16th is huge"):
            run(write_batch([distributed(name, 4, num_heads, 1500, 64)]), 4)
    print("all ops ran")


if __name__ == "__main__":
    main()
