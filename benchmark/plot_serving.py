"""Draws what bench_serving_misa.py wrote, a row of plots for each model, into a PNG beside it.

Time to first token and time per output token over the context, at the least concurrency; where several were measured, throughput over the
heads that score, and throughput a GPU against what a user sees, tokens a second, a line for each variant over the concurrency. Servers that
were measured at a single context are left out, if others were measured at several.
"""

import textwrap
from pathlib import Path
from typing import Dict, List

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import plotting
from serving.configurations import BASELINE
from serving.records import THROUGHPUT, label, served


def usual(records: List[Dict], name: str):
    """The most frequent value of a field."""
    values = [record[name] for record in records]
    return max(values, key=values.count)


def draw_over_context(axes, records: List[Dict], name: str, title: str) -> None:
    """Lines over the context, at the least concurrency and the usual output, nothing cached."""
    least = min(record["concurrency"] for record in records)
    output = usual(records, "output")
    records = [
        r for r in records if r["concurrency"] == least and r["output"] == output
    ]
    for variant in dict.fromkeys(map(label, records)):
        mine = [r for r in records if label(r) == variant]
        mine.sort(key=lambda r: r["context"])
        axes.plot(
            [r["context"] // 1024 for r in mine],
            [r[name] for r in mine],
            "o-",
            label=variant,
        )
    ticks = sorted({r["context"] // 1024 for r in records})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick}K" for tick in ticks])
    axes.set_xlabel(f"prompt (tokens), {output} new ones, {least} at once")
    axes.set_ylabel("ms")
    axes.set_title(title)


def draw_over_heads(axes, records: List[Dict]) -> None:
    """Lines over the heads that score, at the longest context; DSA is a horizontal line."""
    longest = max(record["context"] for record in records)
    records = [r for r in records if r["context"] == longest]
    output, most = usual(records, "output"), max(r["concurrency"] for r in records)
    records = [r for r in records if r["output"] == output and r["concurrency"] == most]
    for r in records:
        if r["variant"] == BASELINE:
            axes.axhline(r[THROUGHPUT], color="black", linewidth=1, label=label(r))
    lines: Dict[str, List[Dict]] = {}
    for r in records:
        if r["active_heads"]:
            lines.setdefault(r["variant"], []).append(r)
    for variant, mine in lines.items():
        mine.sort(key=lambda r: r["active_heads"])
        heads = [r["active_heads"] for r in mine]
        axes.plot(heads, [r[THROUGHPUT] for r in mine], "o-", label=variant)
    ticks = sorted({r["active_heads"] for r in records if r["active_heads"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_xlabel("heads that score")
    axes.set_ylabel("tokens/s a GPU, in and out")
    axes.set_title(f"throughput, {longest // 1024}K / {output}, {most} at once")


def draw_pareto(axes, records: List[Dict]) -> None:
    """A line for each variant over the concurrency, at the longest context."""
    longest = max(record["context"] for record in records)
    records = [r for r in records if r["context"] == longest and r["tpot_ms"]]
    for variant in dict.fromkeys(map(label, records)):
        mine = [r for r in records if label(r) == variant]
        mine.sort(key=lambda r: r["concurrency"])
        x = [1000 / r["tpot_ms"] for r in mine]
        axes.plot(x, [r[THROUGHPUT] for r in mine], "o-", label=variant)
    axes.set_xlabel("output tokens/s of a user")
    axes.set_ylabel("tokens/s a GPU, in and out")
    axes.set_title(f"interactivity and throughput, {longest // 1024}K")


def draw(records: List[Dict], output: Path) -> None:
    records = [record for record in records if not record["cache_hit"]]
    contexts: Dict[str, set] = {}
    for record in records:
        contexts.setdefault(served(record), set()).add(record["context"])
    models = [model for model, lengths in contexts.items() if len(lengths) > 1]
    models = models or list(contexts)
    figure = plt.figure(figsize=(22, 5.5 * len(models)), layout="constrained")
    figure.suptitle(f"Serving on {records[0]['device']}")
    rows = figure.subfigures(len(models), squeeze=False)[:, 0]
    for model, row in zip(models, rows):
        row.suptitle(textwrap.fill(model, 200), fontsize=9)
        mine = [record for record in records if served(record) == model]
        heads = {record["active_heads"] for record in mine if record["active_heads"]}
        users = {record["concurrency"] for record in mine}
        # What would be a point in the others is no plot.
        count = 2 + (len(heads) > 1) + (len(users) > 1)
        plots = iter(row.subplots(1, count))
        draw_over_context(next(plots), mine, "ttft_ms", "time to first token")
        draw_over_context(next(plots), mine, "tpot_ms", "time per output token")
        if len(heads) > 1:
            draw_over_heads(next(plots), mine)
        if len(users) > 1:
            draw_pareto(next(plots), mine)
        for axes in row.axes:
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", alpha=0.3)
            axes.legend(fontsize=7)
    figure.savefig(output, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    plotting.main(__doc__, "benchmark/results/serving_<gpu>.json", draw)
