"""Recall and attention mass over heads and over length: python benchmark/quality/plot_recall.py recall.json recall.png"""

import argparse
from pathlib import Path
from typing import Dict, List, Tuple

import matplotlib
from results import Variant, read

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METRICS = {
    "recall": "of DSA's tokens",
    "attention_mass": "of the attention",
}
# With the pooled router, this one stands for all block sizes where they are not the subject.
BLOCK_SIZE = 1024


def name(variant: Variant) -> str:
    shown = variant.variant + f" ({variant.router})" * bool(variant.router)
    numbers = zip("hm", (variant.active_heads, variant.rerank_candidates))
    return ", ".join([shown, *(f"{letter} = {n}" for letter, n in numbers if n)])


def over_heads(axis, records: List[Dict]) -> None:
    """Single-stage MISA at the longest context, a curve a block size and one with the shared head; DSA as a line."""
    longest = max(r["context"] for r in records)
    records = [r for r in records if r["context"] == longest]
    blocks = sorted({r["block_size"] for r in records if r["variant"] == "misa"})
    for place, block in enumerate(blocks):
        points = sorted(
            (r["active_heads"], r["value"])
            for r in records
            if r["variant"] == "misa" and r["block_size"] == block
        )
        color = plt.cm.viridis(place / max(1, len(blocks) - 1))
        shown = {"marker": ".", "color": color, "label": f"pooled, B = {block}"}
        if block == 0:  # the sampled router has no blocks
            shown |= {"color": "tab:red", "label": "sampled: shared head"}
        axis.plot(*zip(*points), **shown)
    for r in records:
        if r["variant"] == "dsa":
            axis.axhline(r["value"], color="black", linestyle=":", label="DSA")
    axis.set_xscale("log", base=2)
    ticks = sorted({r["active_heads"] for r in records if r["variant"] == "misa"})
    axis.set_xticks(ticks, ticks)
    axis.set(title=f"single-stage, {longest // 1024}K tokens", xlabel="active heads h")
    axis.legend(title="router", fontsize="small")


def over_length(axis, records: List[Dict], single_stage: bool) -> None:
    """A curve a variant: single-stage MISA, or all that is re-ranked or another method."""
    curves: Dict[Variant, List[Tuple[int, float]]] = {}
    for r in records:
        variant = Variant.of(r)
        if (variant.variant == "misa") == single_stage and not variant.taken:
            if variant.block_size in (0, BLOCK_SIZE) or variant.variant == "hisa":
                curves.setdefault(variant, []).append((r["context"], r["value"]))
    colors = plt.cm.tab20.colors
    for place, (variant, points) in enumerate(sorted(curves.items())):
        served = (variant.router, variant.active_heads) == ("sampled", 8)
        served = served and variant.rerank_candidates in (0, 4096)
        shown = {
            "marker": ".",
            "linestyle": "--" if variant.router == "pooled" else "-",
            "linewidth": 3 if served else 1,
            "color": colors[place % len(colors)],
            "label": name(variant) + ", the default" * (served and not single_stage),
        }
        axis.plot(*zip(*sorted(points)), **shown)
    ticks = sorted({r["context"] for r in records})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{n // 1024}K" for n in ticks])
    title = "single-stage" if single_stage else "re-ranked, other methods, controls"
    axis.set(title=title, xlabel="tokens of a prompt")
    axis.legend(fontsize="x-small")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("image", type=Path)
    args = parser.parse_args()
    results = read([args.result])
    # There is no attention where the cache is quantized.
    metrics = [x for x in METRICS if any(r["metric"] == x for r in results)]
    figure, axes = plt.subplots(
        *(len(metrics), 3),
        figsize=(20, 7 * len(metrics)),
        squeeze=False,
        layout="constrained",
    )
    for (heads, single, other), metric in zip(axes, metrics):
        records = [r for r in results if r["metric"] == metric]
        over_heads(heads, records)
        over_length(single, records, single_stage=True)
        over_length(other, records, single_stage=False)
        heads.set(ylabel=f"{metric.replace('_', ' ')}: share {METRICS[metric]}")
    figure.savefig(args.image, dpi=80)


if __name__ == "__main__":
    main()
