"""The paper's table from the results of `run_lm_eval.py`, `niah.py`, `perplexity.py` and `recall.py`, as Markdown and JSON:

    python benchmark/quality/table.py lm_eval.json niah.json recall.json --output table.md    # and table.json

A table for each benchmark and length: a row for each task, a column for each variant, in percent (but for perplexity) with half
the width of the 95% confidence interval, and the average. NIAH is averaged over depths. Of what recall.py computes there are
the variants that were served, or those with the paper's numbers if there is nothing else. A column that lacks a task has no
average.
"""

import argparse
import json
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from niah import summarize
from results import Variant, read

NAMES = {
    "dsa": "DSA",
    "hisa": "HISA",
    "misa": "MISA",
    "misa-hierarchical": "hierarchical MISA",
}
HEADINGS = {
    "ruler": "RULER, {} tokens",
    "longbench": "LongBench",
    "niah": "Needle in a haystack",
    "perplexity": "Perplexity",
    "perplexity_ratio": "Perplexity over DSA's",
    "recall": "Recall of DSA's selection",
    "attention_mass": "Share of the attention that is selected",
}
COMPUTED = ("recall", "attention_mass")  # not served


def heading(variant: Variant) -> str:
    numbers = zip("hBma", variant[1:])
    shown = [f"{letter} {number}" for letter, number in numbers if number]
    name = NAMES.get(variant.variant, variant.variant)
    name += " with a shared head" if variant.router == "sampled" else ""
    return f"{name} {', '.join(shown)}".strip()


PAPER = (
    Variant("dsa"),
    Variant("hisa", 0, 128),
    Variant("misa", 8, 1024, router="pooled"),
    Variant("misa-hierarchical", 8, 1024, 8192, router="pooled"),
)


def with_tasks(records: List[Dict]) -> List[Dict]:
    """The records of all files as those of the table: a variant, context, metric, task, value, ci95 and n each.

    Raises:
        ValueError: a metric that the table has no place for.
    """
    served, needles, computed = [], [], []
    for record in records:
        if record["metric"] not in HEADINGS:
            raise ValueError(f"the table has no place for {record['metric']}")
        context = f"{record['context']} tokens"
        if record["metric"] == "niah":
            found = round(record["value"] * record["n"])
            answer = Variant.of(record)._asdict() | {"context": record["context"]}
            alike = ", alike" if record.get("alike") else ""
            answer["task"] = f"{context}, needles: {record['needles']}{alike}"
            answer["found"] = [True] * found + [False] * (record["n"] - found)
            needles.append(answer)
        elif record["metric"] in COMPUTED:
            computed.append(record | {"task": context})
        else:
            served.append({"task": context} | record)
    served += summarize(needles)
    there = {Variant.of(record) for record in served} or PAPER
    return served + [record for record in computed if Variant.of(record) in there]


def columns(records: List[Dict]) -> List[Variant]:
    """Those of the paper, also where there are no results, then others."""
    there = sorted({Variant.of(record) for record in records})
    names = [*NAMES, *dict.fromkeys(x.variant for x in there if x.variant not in NAMES)]
    return [
        found
        for name in names
        for found in [x for x in there if x.variant == name] or [Variant(name)]
    ]


def average(records: List[Optional[Dict]]) -> Optional[Dict]:
    """The mean of independent records, and half the width of its confidence interval; None if one is missing."""
    if None in records:
        return None
    widths, count = [record["ci95"] for record in records], len(records)
    return {
        "metric": records[0]["metric"],
        "value": sum(record["value"] for record in records) / count,
        "ci95": (
            None if None in widths else sum(width**2 for width in widths) ** 0.5 / count
        ),
    }


def cell(record: Optional[Dict]) -> str:
    if record is None:
        return "-"
    scale, digits = (1, 3) if record["metric"].startswith("perplexity") else (100, 1)
    value, width = record["value"], record["ci95"]
    shown = f"{scale * value:.{digits}f}"
    return shown if width is None else f"{shown} ± {scale * width:.{digits}f}"


def markdown(records: List[Dict]) -> str:
    """The tables."""
    heads = columns(records)
    sections: Dict[str, Dict[str, Dict[Variant, Dict]]] = {}
    for record in records:
        title = HEADINGS[record["metric"]].format(record["context"])
        rows = sections.setdefault(title, {})
        rows.setdefault(record["task"], {})[Variant.of(record)] = record
    lines: List[str] = []
    for title, rows in sections.items():
        table: List[Tuple[str, List[Optional[Dict]]]] = [
            (task, [found.get(head) for head in heads]) for task, found in rows.items()
        ]
        means = [average(list(values)) for values in zip(*(row for _, row in table))]
        lines += [f"## {title}", ""]
        lines += [f"| | {' | '.join(map(heading, heads))} |"]
        lines += ["| --- " * (len(heads) + 1) + "|"]
        for name, values in [*table, ("average", means)]:
            lines += [f"| {' | '.join([name, *map(cell, values)])} |"]
        lines += [""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("results", type=Path, nargs="+", help="JSON files of the four, in any order")
    add("--output", type=Path, required=True, help="Markdown; JSON is put beside it")
    args = parser.parse_args()
    records = with_tasks(read(args.results))
    args.output.write_text(markdown(records))
    args.output.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
