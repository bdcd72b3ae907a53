"""Draws the speed-up over production from what bench_indexer.py wrote, into a PNG beside it.

Left: prefill, over the context length. Right: decode and verify, one group of bars a case. Both on Gaussian keys; where other kinds
of keys were measured, what the worst of them leaves of the speed-up is drawn beside it, with its name.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import plotting
from indexer.data import USUAL
from indexer.report import lowest_speedups

COLORS = {
    "misa": "tab:blue",
    "misa-hierarchical": "tab:orange",
    "misa-pooled": "lightsteelblue",
    "misa-pooled-hierarchical": "navajowhite",
    "dsa-misa-select": "tab:green",
}


def draw_prefill(axes, records: list) -> None:
    """Lines over the context: cases of one sequence and the most usual number of rows."""
    counts = [r["rows"] for r in records]
    usual = max(set(counts), key=counts.count, default=0)
    records = [r for r in records if r["rows"] == usual]
    gaussian = [r for r in records if r["keys"] == USUAL]
    slow = lowest_speedups(records)
    for heads, style in ((64, "o-"), (32, "s--")):
        for variant, color in COLORS.items():

            def points(chosen):
                mine = [
                    r for r in chosen if r["heads"] == heads and r["variant"] == variant
                ]
                mine.sort(key=lambda r: r["context"])
                x = [r["context"] // 1024 for r in mine]
                return mine, x, [r["speedup"] for r in mine]

            mine, x, y = points(gaussian)
            if mine:
                label = f"{variant}, {heads} heads"
                axes.plot(x, y, style, color=color, label=label)
            mine, x, y = points(slow)
            if mine:
                label = f"{variant}, {heads} heads, worst keys"
                axes.plot(x, y, style[0] + ":", color=color, mfc="white", label=label)
            for r, *place in zip(mine, x, y):
                axes.annotate(r["keys"], place, fontsize=6, color=color)
    ticks = sorted({r["context"] // 1024 for r in records})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick}K" for tick in ticks])
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("speed-up over SGLang's indexer")
    axes.set_title(f"prefill, {usual} rows at the end of the context")


def draw_decode(axes, records: list) -> None:
    """Bars: one group a case, by context, batch and rows a sequence; a black line where the worst keys are."""
    cases = list(dict.fromkeys(r["case"] for r in records))
    measured = {r["variant"] for r in records}
    variants = [variant for variant in COLORS if variant in measured]
    width = 0.8 / max(1, len(variants))

    def place(r):
        n = variants.index(r["variant"])
        return cases.index(r["case"]) + (n - (len(variants) - 1) / 2) * width

    for variant in variants:
        mine = [r for r in records if r["variant"] == variant and r["keys"] == USUAL]
        axes.bar(
            [place(r) for r in mine],
            [r["speedup"] for r in mine],
            width,
            color=COLORS[variant],
            label=variant,
        )
    for r in lowest_speedups(records):
        x, y = place(r), r["speedup"]
        axes.hlines(y, x - width / 2, x + width / 2, color="black")
        axes.annotate(r["keys"], (x, y), fontsize=6, rotation=90, ha="center")
    axes.set_xticks(range(len(cases)), cases, rotation=40, ha="right", fontsize=8)
    axes.set_title("decode and speculative verify")


def draw(records: list, output: Path) -> None:
    device = next((r["device"] for r in records), "")
    records = [r for r in records if r.get("speedup") and r["variant"] in COLORS]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(14, 5.5), width_ratios=(1, 1.4), sharey=True
    )
    draw_prefill(
        left, [r for r in records if r["mode"] == "prefill" and r["batch"] == 1]
    )
    draw_decode(right, [r for r in records if r["mode"] == "decode"])
    for axes in (left, right):
        axes.axhline(1, color="black", linewidth=1)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=8)
    left.set_ylim(bottom=0)
    figure.suptitle(f"Indexer on {device}")
    figure.tight_layout()
    figure.savefig(output, dpi=150)


if __name__ == "__main__":
    plotting.main(__doc__, "benchmark/results/indexer_<gpu>.json", draw)
