"""Recall and attention mass over heads and block sizes: python benchmark/quality/plot_recall.py recall.json recall.png"""

import argparse
from pathlib import Path
from typing import Dict, List

import matplotlib
from results import Variant, read

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METRICS = {
    "recall": "of DSA's tokens",
    "attention_mass": "of the attention",
}


def name(record: Dict) -> str:
    variant = Variant.of(record)
    shown = variant.variant + ", shared head" * (variant.router == "sampled")
    numbers = zip("ma", (variant.rerank_candidates, variant.taken))
    return ", ".join([shown, *(f"{letter} = {n}" for letter, n in numbers if n)])


def curves(axis, records: List[Dict]) -> None:
    """Single-stage MISA over the heads, a curve a block size and one with the shared head; DSA as a line."""
    blocks = sorted({r["block_size"] for r in records if r["variant"] == "misa"})
    for place, block in enumerate(blocks):
        points = sorted(
            (r["active_heads"], r["value"], r["ci95"] or 0)
            for r in records
            if r["variant"] == "misa" and r["block_size"] == block
        )
        heads, values, errors = zip(*points)
        color = plt.cm.viridis(place / max(1, len(blocks) - 1))
        shown = {"marker": ".", "color": color, "label": block}
        if block == 0:  # the sampled router has no blocks
            shown |= {"color": "tab:red", "label": "none: shared head"}
        axis.errorbar(heads, values, errors, **shown)
    for r in records:
        if r["variant"] == "dsa":
            axis.axhline(r["value"], color="black", linestyle=":", label="DSA")
    axis.set_xscale("log", base=2)
    ticks = sorted({r["active_heads"] for r in records if r["variant"] == "misa"})
    axis.set_xticks(ticks, ticks)
    axis.set(xlabel="active heads h")
    axis.legend(title="block size B")


def bars(axis, records: List[Dict]) -> None:
    """All variants, MISA as it is by default."""
    shown = [
        r
        for r in records
        if r["variant"] != "misa"
        or (r["active_heads"] == 8 and r["block_size"] in (0, 1024))
    ]
    values = [r["value"] for r in shown]
    axis.barh([name(r) for r in shown], values, xerr=[r["ci95"] or 0 for r in shown])
    axis.bar_label(axis.containers[-1], fmt=" {:.3f}", label_type="center")
    axis.invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("image", type=Path)
    args = parser.parse_args()
    panels: Dict[tuple, List[Dict]] = {}
    for record in read([args.result]):
        if record["metric"] in METRICS:
            panel = record["context"], record["metric"]
            panels.setdefault(panel, []).append(record)
    figure, axes = plt.subplots(
        *(len(panels), 2),
        figsize=(12, 4 * len(panels)),
        squeeze=False,
        layout="constrained",
    )
    order = sorted(panels, key=lambda panel: (panel[0], list(METRICS).index(panel[1])))
    for (left, right), (context, metric) in zip(axes, order):
        records = panels[context, metric]
        title = f"{metric.replace('_', ' ')}, prompts of {context // 1024}K tokens"
        curves(left, records)
        bars(right, records)
        left.set(title=title, ylabel=f"share {METRICS[metric]}")
        right.set(title="at h = 8, B = 1024", xlabel=f"share {METRICS[metric]}")
        right.set(xlim=(0, 1.02))
    figure.savefig(args.image, dpi=120)


if __name__ == "__main__":
    main()
