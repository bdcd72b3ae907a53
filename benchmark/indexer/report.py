"""Records for programs, tables for people."""

import importlib
import json
import re
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent.parent / "results"

DISTRIBUTIONS = {
    "sglang": "sglang",
    "deep_gemm": "sgl-deep-gemm",
    "sgl_kernel": "sglang-kernel",
    "sgl_kernel_misa": "sgl-kernel-misa",
}


def versions() -> dict:
    """Versions of all that took part, None where it cannot be told."""
    found = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = version_of_module(name)
    return found


def version_of_module(name: str) -> str | None:
    try:
        return getattr(importlib.import_module(name), "__version__", None)
    except ImportError:
        return None


def default_output(device: str, what: str = "indexer") -> Path:
    """results/<what>_<gpu>.json, <gpu> being h100 of "NVIDIA H100 80GB HBM3"."""
    known = re.search(r"\b([A-Z]+\d+)\b", device)
    gpu = known.group(1) if known else re.sub(r"\W+", "-", device)
    return RESULTS / f"{what}_{gpu.lower()}.json"


def write(records: list, path: Path) -> None:
    """Put records into a file, in the place of those of the same case, keys and variant with the same numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else []
    names = ("case", "variant", "keys", "router")
    names += ("active_heads", "block_size", "rerank_candidates")
    merged = {tuple(r[name] for name in names): r for r in kept + records}
    path.write_text(json.dumps(list(merged.values()), indent=1) + "\n")


def time(milliseconds: float) -> str:
    if milliseconds < 1:
        return f"{milliseconds * 1e3:.1f} us"
    return f"{milliseconds:.3f} ms"


def size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


HEADER = (
    f"  {'variant':18} {'total':>10}  {'[p10 - p90]':<23} {'speed-up':>8} {'host':>9} {'TFLOPS':>6} {'GB/s':>6} {'of copy':>7} "
    f"{'workspace':>10}  {'exact':5}  stages"
)


def line(record: dict) -> str:
    """One row of the table."""
    if "error" in record:
        return f"  {record['variant']:18} ERROR {record['error'].splitlines()[0][:120]}"
    ms, spread = record["ms"], record["spread_ms"]["total"]
    between = f"[{time(spread[0])} - {time(spread[1])}]"
    speedup = f"{record['speedup']:.2f}x" if record["speedup"] else "-"
    host = "-" if record["host_ms"] is None else time(record["host_ms"])
    stages = ", ".join(f"{k} {time(v)}" for k, v in ms.items() if k != "total")
    extras = "".join(f", ({k} {time(v)})" for k, v in record["uncounted_ms"].items())
    exact = "yes" if record["exact"] else "NO"
    return (
        f"  {record['variant']:18} {time(ms['total']):>10}  {between:<23} {speedup:>8} {host:>9} "
        f"{record['tflops']:6.0f} {record['gbps']:6.0f} {record['copy_share']:7.0%} "
        f"{size(record['workspace_bytes']):>10}  {exact:5}  {stages}{extras}"
    )


def why_not_exact(record: dict) -> str:
    return f"    {record['outcome']}: " + ", ".join(
        f"{k} {v}" for k, v in record["checks"].items() if v is not None
    )


def failures(records: list) -> list:
    """Those in which something is wrong with us, or did not run at all."""
    return [r for r in records if r["outcome"] in ("wrong", "failed")]


def worst(records: list, usual: str) -> dict:
    """The kind of keys on which each variant takes longest, beside the usual kind.

    Returns:
        {(case, variant, router): (record of the usual kind, record of the slowest)}, where both and at least two kinds were
        measured.
    """
    groups = {}
    for r in records:
        if r["outcome"] != "failed":
            group = groups.setdefault((r["case"], r["variant"], r["router"]), {})
            group[r["keys"]] = r
    return {
        key: (group[usual], max(group.values(), key=lambda r: r["ms"]["total"]))
        for key, group in groups.items()
        if usual in group and len(group) > 1
    }


def lowest_speedups(records: list) -> list:
    """Of every case, variant and router with several kinds of keys, the record with the lowest speed-up over production."""
    groups = {}
    for r in records:
        if r.get("speedup"):
            key = r["case"], r["variant"], r["router"]
            groups.setdefault(key, []).append(r)
    return [
        min(group, key=lambda r: r["speedup"])
        for group in groups.values()
        if len(group) > 1
    ]


def worst_keys(records: list, usual: str) -> str:
    """A line for each case and variant: the worst kind of keys beside the usual one; empty if one kind alone was measured."""
    found = worst(records, usual)
    if not found:
        return ""
    lines = [f"\nThe slowest keys, beside {usual} ones:"]
    for (case, variant, _), (base, slow) in found.items():
        ratio = slow["ms"]["total"] / base["ms"]["total"]
        lines.append(
            f"  {case:24} {variant:18} {slow['keys']:9} {time(slow['ms']['total']):>10} = {ratio:5.2f} times "
            f"{time(base['ms']['total']):>10}; speed-up {figure(slow['speedup'])} instead of {figure(base['speedup'])}"
        )
    return "\n".join(lines)


def figure(speedup: float | None) -> str:
    return f"{speedup:.2f}" if speedup else "-"
