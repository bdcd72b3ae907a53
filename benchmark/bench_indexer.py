"""The whole indexer, from the quantized query to the selected indices, in four variants side by side:

    dsa                what SGLang 0.5.17 runs (DeepGEMM logits, then its top-k)
    misa               route, score with the active heads, select
    misa-hierarchical  the same for a larger number of candidates, re-ranked by all heads
    dsa-misa-select    all heads, no routing, through our kernels

README.md says what is measured and how.
"""

import argparse
import datetime
import gc
import subprocess
import sys
import traceback
from fnmatch import fnmatch
from pathlib import Path

import torch
from indexer import misa, production, report, timing
from indexer.cases import CASES, select
from indexer.check import Truth, well_formed
from indexer.data import (
    layer_bytes,
    layers_needed,
    make_layer,
    make_step,
)

TOPK = 2048
VARIANTS = ("dsa", "misa", "misa-hierarchical", "dsa-misa-select")


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", nargs="+", default=[], metavar="GLOB", help="names or patterns")
    add("--variants", nargs="+", default=["*"], metavar="GLOB", help="dsa always runs")
    add("--heads", type=int, choices=(32, 64), help="heads in all cases")
    add("--active-heads", type=int, default=8)
    add("--block-size", type=int, default=1024, help="tokens of a pooled block")
    add("--rerank-candidates", type=int, default=8192, help="misa-hierarchical's m")
    add("--iterations", type=int, default=30, help="timed rounds")
    add("--tolerance", type=float, default=5e-4, help="ties, relative to the top score")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="5 rounds, fewer rows checked")
    add("--list", action="store_true", help="name the cases and stop")
    add("--profile", metavar="CASE", help="print the kernels of one call and stop")
    add(
        "--output",
        type=Path,
        help="JSON (results/indexer_<gpu>.json if there are no options at all)",
    )
    args = parser.parse_args(arguments)
    if args.quick:
        args.iterations = 5
    args.samples = 4 if args.quick else 16
    args.variants = [v for v in VARIANTS if any(fnmatch(v, p) for p in args.variants)]
    args.cases_chosen = select(
        [args.profile] if args.profile else args.cases, args.heads
    )
    if not args.cases_chosen:
        parser.error(f"no such case; there are: {', '.join(c.name for c in CASES)}")
    if args.block_size < 64 or args.block_size % 64:
        parser.error("--block-size: a multiple of 64")
    if args.rerank_candidates < TOPK or args.rerank_candidates % 64:
        parser.error(f"--rerank-candidates: a multiple of 64, at least {TOPK}")
    return args


def settings(variant: str, heads: int, args) -> dict:
    """Active heads (None: all), candidates and block size of a variant of ours."""
    routed = variant.startswith("misa")
    hierarchical = variant == "misa-hierarchical"
    return {
        "active_heads": min(args.active_heads, heads) if routed else None,
        "rerank_candidates": args.rerank_candidates if hierarchical else 0,
        "block_size": args.block_size,
    }


def make_variant(name: str, step, layers, args):
    if name == "dsa":
        return production.make(step, layers, TOPK)
    return misa.Misa(name, step, layers, TOPK, **settings(name, step.case.heads, args))


def check_production(variant, truth: Truth) -> dict:
    positions = variant.positions(variant.total(0))
    return {"selection_error": truth.dsa_error(positions)}


def check_ours(variant, truth: Truth) -> dict:
    """Every claim on layer 0; errors are relative to a row's largest score, see check.py."""
    output = variant.total(0)
    positions = variant.positions(output)
    lengths = variant.step.lengths
    checks = {
        "well_formed": well_formed(positions, lengths),
        "deterministic": torch.equal(output, variant.total(0)),
    }
    heads = variant.route(0)
    if heads is None:
        return checks | {"selection_error": truth.dsa_error(positions)}
    checks["routing_error"] = truth.routing_error(heads, variant.block_size)
    checks["heads_ascend"] = bool((heads.diff(dim=1) > 0).all())
    if variant.candidates:
        candidates = variant.score_select(0, heads).long()
        checks["candidates_well_formed"] = well_formed(candidates, lengths)
        checks["candidates_error"] = truth.misa_error(candidates, heads)
        checks["selection_error"] = truth.dsa_error(positions, candidates)
    else:
        checks["selection_error"] = truth.misa_error(positions, heads)
    return checks


def passed(checks: dict, tolerance: float) -> bool:
    return all(
        value <= tolerance if key.endswith("_error") else value
        for key, value in checks.items()
    )


class CaseRun:
    """All variants of one case: `errors` and `checks` by variant, `times` by (variant, stage)."""

    def __init__(self, case, args):
        self.case, self.args = case, args
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self.step = make_step(case)
        self.layers = [
            make_layer(self.step) for _ in range(layers_needed(case, l2_bytes))
        ]
        self.variants, self.errors = {}, {}
        self.checks, self.workspace, self.extras = {}, {}, {}
        self.runs, self.times = {}, {}

    def attempt(self, name: str, action) -> None:
        """Run one part of a variant; if it raises, note it and leave the variant out of what follows."""
        try:
            action(name)
            torch.cuda.synchronize()
        except Exception as error:
            traceback.print_exc()
            self.errors[name] = f"{type(error).__name__}: {error}"
            self.variants.pop(name, None)
            self.runs = {key: run for key, run in self.runs.items() if key[0] != name}

    def prepare(self, name: str) -> None:
        self.variants[name] = make_variant(name, self.step, self.layers, self.args)
        self.variants[name].total(0)

    def check(self, name: str) -> None:
        variant = self.variants[name]
        checker = check_production if name == "dsa" else check_ours
        self.checks[name] = checker(variant, self.truth)
        self.workspace[name] = timing.workspace_bytes(variant.total)

    def warm_up(self, name: str) -> None:
        """Make the runs of a variant: its stages, what is timed but not counted, and the whole."""
        variant = self.variants[name]
        stages = variant.stages()
        extras = variant.extras()
        self.extras[name] = list(extras)
        kind = timing.Eager if self.case.mode == "prefill" else timing.Graph
        before = self.layers[0].pooled_keys.clone()
        for stage, call in (stages | {"total": variant.total}).items():
            self.runs[name, stage] = kind(call, len(self.layers))
        for stage, call in extras.items():
            try:
                self.runs[name, stage] = kind(call, len(self.layers))
            except Exception:  # a missing side figure is no reason to lose the others
                traceback.print_exc()
        if "update" in extras:
            same = torch.equal(before, self.layers[0].pooled_keys)
            self.checks[name]["pooled_keys_equal"] = same

    def measure(self) -> None:
        self.times = timing.measure(self.runs, self.args.iterations)
        for name in list(self.variants):
            run = self.runs[name, "total"]
            if name != "dsa" and isinstance(run, timing.Graph):
                last = self.variants[name].total(len(self.layers) - 1)
                same = torch.equal(run.output, last)
                self.checks[name]["graph_replay_equal"] = same

    def run(self, names) -> None:
        for name in names:
            self.attempt(name, self.prepare)
        self.truth = Truth(self.step, self.layers[0], self.args.samples)
        for name in list(self.variants):
            self.attempt(name, self.check)
        del self.truth
        for name in list(self.variants):
            self.attempt(name, self.warm_up)
        self.measure()

    def times_of(self, name: str, extras: bool = False) -> dict:
        """{stage: Spread} of a variant: what is counted, or what is not."""
        return {
            stage: times
            for (variant, stage), times in self.times.items()
            if variant == name and (stage in self.extras[name]) == extras
        }


def medians(times: dict) -> dict:
    return {stage: spread.median for stage, spread in times.items()}


def limits(times: dict) -> dict:
    return {stage: [spread.p10, spread.p90] for stage, spread in times.items()}


def describe(case, name: str, args, device: dict) -> dict:
    """What a record says before anything has run."""
    ours = settings(name, case.heads, args)
    return {
        "case": case.name,
        "mode": case.mode,
        "variant": name,
        "rows": case.rows,
        "batch": case.batch,
        "rows_per_seq": case.rows_per_seq,
        "context": case.context,
        "heads": case.heads,
        "active_heads": ours["active_heads"] or case.heads,
        "rerank_candidates": ours["rerank_candidates"],
        "block_size": args.block_size if ours["active_heads"] else 0,
        "topk": TOPK,
    } | device


def record(run: CaseRun, name: str, args, device: dict) -> dict:
    """One record of the JSON; without times and with `error` if the variant failed."""
    result = describe(run.case, name, args, device)
    if name in run.errors:
        return result | {"error": run.errors[name], "exact": False}
    baseline = run.times_of("dsa") if "dsa" in run.variants else {}
    mine = run.times_of(name)
    speedup = baseline["total"].median / mine["total"].median if baseline else None
    checks = run.checks[name]
    baseline_checks = run.checks.get("dsa") if baseline else None
    return result | {
        "baseline": run.variants["dsa"].path if baseline else None,
        "baseline_ms": medians(baseline),
        "baseline_spread_ms": limits(baseline),
        "ms": medians(mine),
        "spread_ms": limits(mine),
        "uncounted_ms": medians(run.times_of(name, extras=True)),
        "speedup": speedup,
        "workspace_bytes": run.workspace[name],
        "baseline_workspace_bytes": run.workspace["dsa"] if baseline else None,
        "exact": passed(checks, args.tolerance),
        "baseline_exact": (
            passed(baseline_checks, args.tolerance) if baseline else None
        ),
        "checks": {k: None if v == float("inf") else v for k, v in checks.items()},
        "layers_in_rotation": len(run.layers),
        "layer_bytes": layer_bytes(run.case),
        "iterations": args.iterations,
    }


def run_case(case, args, device: dict) -> list:
    """Measure one case and print its table -> its records."""
    names = ["dsa"] + [v for v in args.variants if v != "dsa"]
    print(
        f"\n{case.name}: {case.rows} rows, {case.batch} sequences", end="", flush=True
    )
    try:
        torch.manual_seed(args.seed)
        run = CaseRun(case, args)
        print(
            f", {len(run.layers)} layers of {report.size(layer_bytes(case))} in rotation",
            flush=True,
        )
        run.run(names)
        records = [record(run, name, args, device) for name in names]
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"
        records = [
            describe(case, name, args, device) | {"error": text, "exact": False}
            for name in names
        ]
    print(report.HEADER)
    for result in records:
        print(report.line(result))
        if "error" not in result and not result["exact"]:
            print(report.why_not_exact(result))
    sys.stdout.flush()
    return records


def print_profile(case, args) -> None:
    """Kernels of one call of every variant, on one layer."""
    step = make_step(case)
    layers = [make_layer(step)]
    for name in args.variants:
        print(f"\n{case.name} {name}")
        kernels = timing.profile(make_variant(name, step, layers, args).total)
        for kernel, count, microseconds in kernels:
            print(f"  {microseconds:10.1f} us  {count:3} x  {kernel[:120]}")


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def restart(cases: list, output: Path | None) -> None:
    """Leave a process whose CUDA context a fault has broken, and run the other cases in another one."""
    print("A fault has broken the CUDA context; going on in another process.")
    sys.stdout.flush()
    options = ["--output", str(output)] if output else []
    if cases:
        names = [case.name for case in cases]
        command = [sys.executable, *sys.argv, *options, "--cases", *names]
        subprocess.run(command, check=False)
    sys.exit(1)


def main() -> None:
    args = parse_arguments()
    if args.list:
        print("\n".join(case.name for case in args.cases_chosen))
        return
    if not torch.cuda.is_available():
        sys.exit("bench_indexer: needs an NVIDIA Hopper GPU, and torch sees none")
    torch.cuda.set_device(0)
    if args.profile:
        for case in args.cases_chosen:
            print_profile(case, args)
            free_memory()
        return

    device = {
        "device": torch.cuda.get_device_name(),
        "copy_gbps": round(timing.copy_gbps(), 1),
        "versions": report.versions(),
        "date": datetime.date.today().isoformat(),
    }
    free_memory()
    print(f"{device['device']}, copies at {device['copy_gbps']:.0f} GB/s")
    print(", ".join(f"{k} {v}" for k, v in device["versions"].items()))
    output = args.output
    if output is None and len(sys.argv) == 1:
        output = report.default_output(device["device"])

    records = []
    for n, case in enumerate(args.cases_chosen):
        results = run_case(case, args, device)
        records += results
        if output:
            report.write(results, output)
        try:
            free_memory()
        except RuntimeError:
            restart(args.cases_chosen[n + 1 :], output)
    if output:
        print(f"\nwrote {len(records)} records to {output}")
    failed = [
        r for r in records if "error" in r or (r["variant"] != "dsa" and not r["exact"])
    ]
    for r in failed:
        print(f"failed: {r['case']} {r['variant']}: {r.get('error', 'not exact')}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
