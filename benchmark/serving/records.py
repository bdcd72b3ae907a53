"""Records for programs, and a table for people."""

import json
import statistics
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

from .configurations import BASELINE, Configuration, Workload

# What is kept of a run, by its name in bench_serving. Of several rounds the median is kept.
VALUES = {
    "ttft_ms": "median_ttft_ms",
    "tpot_ms": "median_tpot_ms",
    "itl_p99_ms": "p99_itl_ms",
}
PERCENTILES = {
    "ttft_p90_ms": "p90_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "tpot_p90_ms": "p90_tpot_ms",
    "tpot_p99_ms": "p99_tpot_ms",
}
THROUGHPUT = "throughput_tok_s"
# A record is that of another one's place if these are equal.
IDENTITY = (
    "model",
    "variant",
    "options",
    "server_args",
    "context",
    "output",
    "concurrency",
    "cache_hit",
    "speculative",
)
# What a record says of its baseline.
COMPARED = (*VALUES, *PERCENTILES, THROUGHPUT, "spread_ms", "peak_memory_bytes")


def identity(record: Dict) -> str:
    return json.dumps([record[name] for name in IDENTITY])


def about(
    model: str,
    configuration: Configuration,
    server_args: Sequence[str],
    workload: Workload,
) -> Dict:
    """The fields that say what a record is of: known before it is measured."""
    return {
        "model": model,
        "variant": configuration.variant,
        "options": list(configuration.options),
        "server_args": list(server_args),
        "context": workload.context,
        "output": workload.output,
        "concurrency": workload.concurrency,
        "cache_hit": workload.cached,
        "speculative": configuration.speculative,
    }


def figures(rounds: List[Dict], peak: Optional[int], gpus: int) -> Dict:
    """The measured fields, from what bench_serving wrote in each round."""

    def median(name: str) -> float:
        return statistics.median(answer[name] for answer in rounds)

    ttfts = [answer[VALUES["ttft_ms"]] for answer in rounds]
    tpots = [answer[VALUES["tpot_ms"]] for answer in rounds]
    return {
        **{ours: median(name) for ours, name in (VALUES | PERCENTILES).items()},
        THROUGHPUT: median("total_throughput") / gpus,
        "spread_ms": {
            "ttft_ms": [min(ttfts), max(ttfts)],
            "tpot_ms": [min(tpots), max(tpots)],
        },
        "rounds": len(rounds),
        "requests": sum(answer["completed"] for answer in rounds),
        "accept_length": rounds[-1].get("accept_length"),
        "peak_memory_bytes": peak,
    }


def compare(record: Dict, baseline: Dict) -> Dict:
    """The record with its baseline and the speed-up over it: times of the baseline over ours, or throughput of ours over its."""

    def ratio(over: float, under: float) -> Optional[float]:
        return over / under if under else None

    speedup = {
        name: ratio(baseline[name], record[name]) for name in ("ttft_ms", "tpot_ms")
    }
    speedup[THROUGHPUT] = ratio(record[THROUGHPUT], baseline[THROUGHPUT])
    of_baseline = {name: baseline[name] for name in COMPARED}
    return record | {"baseline": of_baseline, "speedup": speedup}


def read(path: Path) -> List[Dict]:
    return json.loads(path.read_text()) if path.exists() else []


def write(records: Iterable[Dict], path: Path) -> None:
    """Put records into a file, in the place of those that are of the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {identity(record): record for record in [*read(path), *records]}
    written = path.with_suffix(".new")
    written.write_text(json.dumps(list(merged.values()), indent=1) + "\n")
    written.replace(path)  # a run may be ended at any time


def _of(record: Dict, name: str, baseline: bool = False) -> str:
    value = (record["baseline"] if baseline else record)[name]
    return f"{value:.4g}"


def _with_ratio(record: Dict, name: str) -> str:
    if not record["speedup"] or record["speedup"][name] is None:
        return _of(record, name)
    ratio = f"{record['speedup'][name]:.2f}"
    return f"{_of(record, name)} of {_of(record, name, True)}, **{ratio}**"


HEADINGS = (
    "variant",
    "prompt (cached) / output x concurrency",
    "TTFT, ms",
    "TPOT, ms",
    "ITL p99, ms",
    "tokens/s a GPU",
    "peak memory, GB",
)


def table(records: Sequence[Dict]) -> str:
    """Markdown: a table for each model, with the value of each record, DSA's in the same run and the speed-up."""
    lines: List[str] = []
    for model in dict.fromkeys(map(served, records)):
        mine = [record for record in records if served(record) == model]
        lines += ["", f"{model}, {mine[-1]['device']}", ""]
        lines += [f"| {' | '.join(HEADINGS)} |", "| --- " * len(HEADINGS) + "|"]
        for record in sorted(mine, key=_order):
            lines.append(f"| {' | '.join(_cells(record))} |")
    return "\n".join(lines).strip() + "\n"


def _order(record: Dict) -> Tuple:
    place = [record[name] for name in ("context", "output", "concurrency")]
    return (record["cache_hit"], *place, record["variant"] != BASELINE)


def served(record: Dict) -> str:
    """The model of a record with what all its servers were given."""
    return " ".join([record["model"], *record["server_args"]])


def label(record: Dict) -> str:
    """What a record's server was, in words."""
    accepted = record["speculative"]
    return Configuration(record["variant"], tuple(record["options"]), accepted).label


def _cells(record: Dict) -> Tuple[str, ...]:
    cached = record["cache_hit"]
    workload = Workload(
        record["context"], record["output"], record["concurrency"], cached
    )
    peak = record["peak_memory_bytes"]
    return (
        label(record),
        str(workload),
        _with_ratio(record, "ttft_ms"),
        _with_ratio(record, "tpot_ms"),
        _of(record, "itl_p99_ms"),
        _with_ratio(record, THROUGHPUT),
        f"{peak / 1e9:.1f}" if peak else "-",
    )
