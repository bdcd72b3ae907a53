"""How much of DSA's selection other selections find, on what a server's indexer was given:

    SGLANG_MISA_CAPTURE_DIR=capture python -m sglang.launch_server ... --disable-cuda-graph    # and send it prompts
    python benchmark/quality/recall.py capture --output recall.json

The queries, keys and weights are those of the server, with or without --enable-misa; every selection is computed from them
by its definition (`reference.py`), on the GPU if there is one. Of each prompt a spread of the rows that see more than
`--topk` tokens is taken, in every layer.
"""

import argparse
import json
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Tuple

import torch
from tqdm import tqdm

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.capture import load_records

ACTIVE_HEADS = (1, 2, 4, 8, 16, 32, 64)
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048)
RERANK_CANDIDATES = (4096, 8192, 16384)


class Rows(NamedTuple):
    """Queries of one sequence in one layer, as `reference` takes them."""

    q: torch.Tensor
    weights: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    lengths: torch.Tensor


class Variant(NamedTuple):
    """What a record of the result is about; 0 where a selection has no such number."""

    variant: str
    active_heads: int = 0
    block_size: int = 0
    rerank_candidates: int = 0


def selected_by(rows: Rows, estimates: torch.Tensor, count: int, topk: int):
    """The selection -> int64 [T, topk] by the `count` heads of each query with the largest estimates, [T, H]."""
    q, weights, k, k_scale, lengths = rows
    heads = reference.best_heads(estimates, count)
    routed = reference.of_heads(q, weights, heads)
    scores = reference.token_scores(*routed, k, k_scale)
    return reference.top_positions(scores, reference.visible(lengths, len(k)), topk)


def random_heads(rows: Rows, topk: int, count: int) -> torch.Tensor:
    """A control: for every query other heads, by chance."""
    rng = torch.Generator().manual_seed(0)
    estimates = torch.rand(rows.weights.shape, generator=rng).to(rows.q.device)
    return selected_by(rows, estimates, count, topk)


def heaviest_heads(rows: Rows, topk: int, count: int) -> torch.Tensor:
    """A control: the heads of the largest average weight, the same for all queries."""
    average = rows.weights.abs().mean(0).expand_as(rows.weights)
    return selected_by(rows, average, count, topk)


def future_means(rows: Rows, topk: int, count: int, block_size: int) -> torch.Tensor:
    """A shortcut of the authors' code in prefill: the mean of a query's last block counts the keys after the query too."""
    ends = -(-rows.lengths // block_size) * block_size
    means = reference.page_means(rows.k, rows.k_scale)
    estimates = reference.head_estimates(
        rows.q, rows.weights, means, ends.clamp(max=len(rows.k)), block_size
    )
    return selected_by(rows, estimates, count, topk)


def own_key(rows: Rows, topk: int, count: int) -> torch.Tensor:
    """The other one, in decode: heads are routed on the key of the query's own token alone."""
    last = rows.lengths - 1
    keys = rows.k.float()[last] * rows.k_scale[last, None]
    dots = torch.einsum("thd,td->th", rows.q.float(), keys)
    return selected_by(rows, (rows.weights * dots.relu()).abs(), count, topk)


def selections(
    rows: Rows, topk: int
) -> Iterator[Tuple[Variant, Callable[[], torch.Tensor]]]:
    """Every selection that is measured, as a function that computes it -> int64 [T, topk], -1 padded."""
    total = rows.q.shape[1]
    means = reference.page_means(rows.k, rows.k_scale)
    for block in BLOCK_SIZES:
        # `reference.misa`, but what the router estimates is computed once for all numbers of heads.
        estimates = reference.head_estimates(
            rows.q, rows.weights, means, rows.lengths, block
        )
        for heads in sorted({min(heads, total) for heads in ACTIVE_HEADS}):
            yield (
                Variant("misa", heads, block),
                lambda e=estimates, h=heads: selected_by(rows, e, h, topk),
            )
    for candidates in RERANK_CANDIDATES:
        numbers = {"active_heads": 8, "block_size": 1024}
        numbers["rerank_candidates"] = candidates
        yield (
            Variant("misa-hierarchical", **numbers),
            lambda numbers=numbers: reference.misa(*rows, topk, **numbers),
        )
    yield Variant("hisa", total, 128), lambda: reference.hisa(*rows, topk)
    yield Variant("random-heads", 8), lambda: random_heads(rows, topk, 8)
    yield Variant("heaviest-heads", 8), lambda: heaviest_heads(rows, topk, 8)
    yield Variant("future-means", 8, 1024), lambda: future_means(rows, topk, 8, 1024)
    yield Variant("own-key", 8), lambda: own_key(rows, topk, 8)


def recall(selected: torch.Tensor, wanted: torch.Tensor, tokens: int) -> torch.Tensor:
    """The share of the positions `wanted` that are `selected`: float32 [T] of two int64 [T, k], -1 padded."""
    found, all_of = (reference.members(x, tokens) for x in (selected, wanted))
    return (found & all_of).sum(1) / all_of.sum(1)


def some_rows(record: Dict, topk: int, count: int, device: str) -> Rows:
    """At most `count` of the rows of a record that see more than `topk` tokens, evenly spread; there may be none."""
    chosen = (record["lengths"] > topk).nonzero()[:, 0]
    spread = torch.linspace(0, len(chosen) - 1, min(len(chosen), count)).long()
    chosen = chosen[spread]
    rows = Rows(
        record["q"][chosen],
        record["weights"][chosen],
        record["k"],
        record["k_scale"],
        record["lengths"][chosen],
    )
    return Rows(*(x.to(device) for x in rows))


def summarize(variant: Variant, context: int, values: List[torch.Tensor]) -> Dict:
    """One record of the result: the mean over layers and rows, and half the width of its 95% confidence interval."""
    values = torch.cat(values).double()
    return {
        **variant._asdict(),
        "context": context,
        "metric": "recall",
        "value": values.mean().item(),
        "ci95": 1.96 * values.std().item() / len(values) ** 0.5,
        "n": len(values),
    }


def measure(records: List[Dict], topk: int, count: int, device: str) -> List[Dict]:
    """Recall by variant and context: the tokens of the longest row of a prompt, in whole thousands of 1024."""
    found: Dict[Tuple[Variant, int], List[torch.Tensor]] = {}
    for record in tqdm(records, unit="record"):
        rows = some_rows(record, topk, count, device)
        if len(rows.q) < 2:
            continue
        context = round(len(rows.k) / 1024) * 1024
        wanted = reference.dsa(*rows, topk)
        for variant, select in selections(rows, topk):
            share = recall(select(), wanted, len(rows.k)).cpu()
            found.setdefault((variant, context), []).append(share)
    return [summarize(*key, values) for key, values in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("capture", type=Path, help="what SGLANG_MISA_CAPTURE_DIR named")
    add("--output", type=Path, required=True, help="the result, JSON")
    add("--topk", type=int, default=2048, help="the model's index_topk")
    add("--rows", type=int, default=64, help="rows of a prompt and layer, at most")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = measure(load_records(args.capture), args.topk, args.rows, device)
    if not results:
        parser.error(
            f"{args.capture} holds no rows that see more than {args.topk} tokens"
        )
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    for result in results:
        print(
            "{variant:18} h {active_heads:2}  B {block_size:4}  m {rerank_candidates:5}  context {context:6}  "
            "recall {value:.4f} +- {ci95:.4f}".format(**result)
        )


if __name__ == "__main__":
    main()
