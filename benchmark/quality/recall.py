"""How much of DSA's selection other selections find, and of the attention, on what a server's layers were given:

    SGLANG_MISA_CAPTURE_DIR=capture python -m sglang.launch_server ... --disable-cuda-graph    # and send it prompts
    python benchmark/quality/recall.py capture --output recall.json

The queries, keys and weights are those of the server, with or without --enable-misa; every selection is computed from them
by its definition (`reference.py`), on the GPU if there is one. Of each prompt the same spread of rows that see more than
`--topk` tokens is taken in every layer. Two metrics:

    recall            the share of the tokens that DSA selects
    attention_mass    the share of the attention, averaged over its heads, that dense attention would give the selected tokens

The means are over layers and rows; ci95 is half the width of the interval over prompts, since the rows and layers of a prompt
depend on each other and n counts prompts (null for one). `<output>_by_layer_and_position.json` has the same by `layer` and
`position`: there a row sees at most that many tokens and more than half of them. A record without these two is of all.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Callable, Dict, Iterator, List, NamedTuple, Tuple

import torch
from results import Variant, ci95, show
from tqdm import tqdm

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.evaluation.capture import ATTENTION_STRIDE
from sglang.srt.layers.misa.evaluation.selections import heaviest_heads, random_heads
from sglang.srt.layers.misa.testing.recall import recall

ACTIVE_HEADS = (1, 2, 4, 8, 16, 32, 64)
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048)
RERANK_CANDIDATES = (4096, 8192, 16384)
# With the shared head: candidates, and how much of the selection is taken from them as it is.
SHARED_RERANK_CANDIDATES = (2560, 3072, 4096, 5120, 6144)
SHARED_TAKEN = (0, 0.25, 0.375, 0.5)
CONTROL_HEADS = 8


class Rows(NamedTuple):
    """Queries of one sequence in one layer, as `reference` takes them."""

    q: torch.Tensor
    weights: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    lengths: torch.Tensor


class Observation(NamedTuple):
    """One number, of one row."""

    variant: Variant
    context: int
    metric: str
    layer: int
    position: int
    prompt: str
    value: float


def selected_by(rows: Rows, heads: torch.Tensor, topk: int) -> torch.Tensor:
    """The selection -> int64 [T, topk] by the scores of some heads of each query, int64 [T, h]."""
    q, weights, k, k_scale, lengths = rows
    scored = reference.of_heads(q, weights, heads)
    return reference.dsa(*scored, k, k_scale, lengths, topk)


def future_means(rows: Rows, topk: int, count: int, block_size: int) -> torch.Tensor:
    """A shortcut of the authors' code in prefill: the mean of a query's last block counts the keys after the query too."""
    ends = -(-rows.lengths // block_size) * block_size
    means = reference.page_means(rows.k, rows.k_scale)
    estimates = reference.head_estimates(
        rows.q, rows.weights, means, ends.clamp(max=len(rows.k)), block_size
    )
    return selected_by(rows, reference.best_heads(estimates, count), topk)


def own_key(rows: Rows, topk: int, count: int) -> torch.Tensor:
    """The other one, in decode: heads are routed on the key of the query's own token alone."""
    last = rows.lengths - 1
    keys = rows.k.float()[last] * rows.k_scale[last, None]
    dots = torch.einsum("thd,td->th", rows.q.float(), keys)
    estimates = (rows.weights * dots.relu()).abs()
    return selected_by(rows, reference.best_heads(estimates, count), topk)


def shared_selections(
    rows: Rows, topk: int
) -> Iterator[Tuple[Variant, Callable[[], torch.Tensor]]]:
    """Those of MISA with a shared head, and of its controls.

    The controls choose the routed heads by chance, or take 1/2 for the slope of every head.
    """
    q, weights, k, k_scale, lengths = rows
    slopes, estimates = reference.slopes_and_estimates(*rows)

    # `reference.misa_shared`, but what the router samples is computed once for all numbers of heads.
    def select(heads, slopes=slopes, **rerank) -> torch.Tensor:
        shared = reference.shared_query(q, weights, slopes, heads)
        scored = reference.of_heads(q, weights, heads)
        scores = reference.token_scores(*scored, k, k_scale, *shared)
        return reference.best_of(scores, *rows, topk, **rerank)

    for count in ACTIVE_HEADS:
        if count < q.shape[1]:  # all heads are DSA
            heads = reference.best_heads(estimates, count - 1)
            variant = Variant("misa", count, router="sampled")
            yield variant, lambda heads=heads: select(heads)
    heads = reference.best_heads(estimates, CONTROL_HEADS - 1)
    for candidates in SHARED_RERANK_CANDIDATES:
        for share in SHARED_TAKEN:
            rerank = {"rerank_candidates": candidates, "taken": int(share * topk)}
            yield (
                Variant("misa-hierarchical", 8, **rerank, router="sampled"),
                lambda rerank=rerank: select(heads, **rerank),
            )
    by_chance = random_heads(lengths, q.shape[1], CONTROL_HEADS - 1)
    yield Variant("random-heads-shared", CONTROL_HEADS), lambda: select(by_chance)
    halves = torch.full_like(slopes, 0.5)
    yield Variant("half-slopes", CONTROL_HEADS), lambda: select(heads, halves)


def selections(
    rows: Rows, topk: int, heaviest: torch.Tensor
) -> Iterator[Tuple[Variant, Callable[[], torch.Tensor]]]:
    """Every selection that is measured, as a function that computes it -> int64 [T, topk], -1 padded.

    `heaviest`, int64 [h], are the heads of the largest average weight in the layer, over all queries, and the same for all.
    """
    total = rows.q.shape[1]
    yield Variant("dsa"), lambda: reference.dsa(*rows, topk)
    means = reference.page_means(rows.k, rows.k_scale)
    for block in BLOCK_SIZES:
        # `reference.misa`, but what the router estimates is computed once for all numbers of heads.
        estimates = reference.head_estimates(
            rows.q, rows.weights, means, rows.lengths, block
        )
        for heads in sorted({min(heads, total) for heads in ACTIVE_HEADS}):
            yield (
                Variant("misa", heads, block, router="pooled"),
                lambda e=estimates, h=heads: selected_by(
                    rows, reference.best_heads(e, h), topk
                ),
            )
    for candidates in RERANK_CANDIDATES:
        numbers = {"active_heads": 8, "block_size": 1024}
        numbers["rerank_candidates"] = candidates
        yield (
            Variant("misa-hierarchical", **numbers, router="pooled"),
            lambda numbers=numbers: reference.misa(*rows, topk, **numbers),
        )
    yield from shared_selections(rows, topk)
    yield Variant("hisa", 0, 128), lambda: reference.hisa(*rows, topk)
    for name, heads in (
        ("random-heads", random_heads(rows.lengths, total, CONTROL_HEADS)),
        ("heaviest-heads", heaviest.expand(len(rows.q), -1)),
    ):
        yield (
            Variant(name, heads.shape[1]),
            lambda heads=heads: selected_by(rows, heads, topk),
        )
    yield Variant("future-means", 8, 1024), lambda: future_means(rows, topk, 8, 1024)
    yield Variant("own-key", 8), lambda: own_key(rows, topk, 8)


def dense_attention(record: Dict, lengths: torch.Tensor) -> torch.Tensor:
    """What dense attention gives each token, averaged over the heads -> float32 [T, S], rows that sum to 1.

    Args:
        record: an attention record of `capture.Recorder`, of T rows.
        lengths: int64 [T], the rows to take from it.
    """
    device = lengths.device
    rows = torch.searchsorted(record["lengths"].to(device), lengths)
    q, k = (x.to(device).float() for x in (record["q"], record["k"]))
    hidden = ~reference.visible(lengths, len(k))
    total = torch.zeros(len(lengths), len(k), device=device)
    for head in range(q.shape[1]):
        logits = q[rows, head] @ k.T * record["scaling"]
        total += logits.masked_fill_(hidden, float("-inf")).softmax(1)
    return total / q.shape[1]


def attention_mass(selected: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """What of the `attention`, float32 [T, S], is on the positions `selected`, bool [T, S or more] -> float32 [T]."""
    return (attention * selected[:, : attention.shape[1]]).sum(1)


def spread_lengths(longest: int, topk: int, count: int) -> torch.Tensor:
    """The lengths, int64, of at most `count` rows that see more than `topk` tokens, evenly spread; there may be none.

    They are multiples of ATTENTION_STRIDE: those rows whose attention is recorded.
    """
    first, end = topk // ATTENTION_STRIDE + 1, longest // ATTENTION_STRIDE + 1
    all_of = torch.arange(first, max(first, end)) * ATTENTION_STRIDE
    chosen = torch.linspace(0, len(all_of) - 1, min(len(all_of), count))
    return all_of[chosen.round().long()]


def some_rows(record: Dict, wanted: torch.Tensor, device: str) -> Rows:
    """The rows of a record that see as many tokens as are `wanted`, int64 [N]; there may be none."""
    chosen = torch.isin(record["lengths"], wanted).nonzero()[:, 0]
    rows = Rows(
        record["q"][chosen],
        record["weights"][chosen],
        record["k"],
        record["k_scale"],
        record["lengths"][chosen],
    )
    return Rows(*(x.to(device) for x in rows))


def heaviest_by_layer(paths: List[Path]) -> Dict[int, torch.Tensor]:
    """The CONTROL_HEADS of the largest average weight in each layer, int64, over all rows of some records."""
    totals: Dict[int, torch.Tensor] = {}
    for path in paths:
        record = torch.load(path, mmap=True)
        total = record["weights"].abs().sum(0, keepdim=True, dtype=torch.float64)
        totals[record["layer_id"]] = totals.get(record["layer_id"], 0) + total
    return {
        layer: heaviest_heads(total, CONTROL_HEADS) for layer, total in totals.items()
    }


def observe(capture: Path, topk: int, count: int, device: str) -> Iterator[Observation]:
    """Everything that is measured of the prompts in a capture; `context` is a prompt's length in whole thousands of 1024."""
    paths = sorted(capture.glob("*.pt"))
    longest: Dict[str, int] = defaultdict(int)
    for path in paths:
        record = torch.load(path, mmap=True)
        longest[record["rid"]] = max(longest[record["rid"]], len(record["k"]))
    heaviest = heaviest_by_layer(paths)
    for path in tqdm(paths, unit="record"):
        record = torch.load(path, mmap=True)
        layer, prompt = record["layer_id"], record["rid"]
        wanted = spread_lengths(longest[prompt], topk, count)
        rows = some_rows(record, wanted, device)
        if not len(rows.q):
            continue
        tokens, attention = len(rows.k), None
        if (beside := path.with_suffix(".attention")).exists():
            attention = dense_attention(torch.load(beside), rows.lengths)
        all_of = reference.members(reference.dsa(*rows, topk), tokens)
        context = round(longest[prompt] / 1024) * 1024
        positions = [1 << (n - 1).bit_length() for n in rows.lengths.tolist()]
        for variant, select in selections(rows, topk, heaviest[layer].to(device)):
            selected = reference.members(select(), tokens)
            values = {"recall": recall(selected, all_of)}
            if attention is not None:
                values["attention_mass"] = attention_mass(selected, attention)
            for metric, shares in values.items():
                for position, share in zip(positions, shares.tolist()):
                    at = variant, context, metric, layer, position
                    yield Observation(*at, prompt, share)


def summarize(observations: List[Observation], by: Tuple[str, ...] = ()) -> List[Dict]:
    """Records of the result: the mean by variant, context and metric, and `by` these fields of an observation."""
    groups: Dict[Tuple, Dict[str, List[float]]] = {}
    for o in observations:
        key = o.variant, o.context, o.metric, *(getattr(o, name) for name in by)
        groups.setdefault(key, {}).setdefault(o.prompt, []).append(o.value)
    results = []
    for (variant, context, metric, *place), prompts in groups.items():
        means = [mean(values) for values in prompts.values()]
        results.append(
            {
                **variant._asdict(),
                "context": context,
                "metric": metric,
                **dict(zip(by, place)),
                "value": mean(means),
                "ci95": ci95(means),
                "n": len(means),
            }
        )
    return results


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
    observations = list(observe(args.capture, args.topk, args.rows, device))
    if not observations:
        parser.error(
            f"{args.capture} holds no rows that see more than {args.topk} tokens"
        )
    results = summarize(observations)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    cells = args.output.with_name(f"{args.output.stem}_by_layer_and_position.json")
    by_place = summarize(observations, ("layer", "position"))
    cells.write_text(json.dumps(by_place, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
