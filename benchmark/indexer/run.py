"""One case on one kind of keys: all variants side by side, and their records."""

import sys
import traceback

import torch

from . import misa, production, profile, report, timing, work
from .cases import Case
from .check import Sample, all_right, check_ours, check_production, outcome
from .data import layer_bytes, layers_needed, make_layers, make_step

TOPK = 2048
# The variants of ours: their router, and how many candidates all heads re-rank.
OURS: dict[str, tuple[str | None, int]] = {
    "misa": ("sampled", 0),
    "misa-hierarchical": ("sampled", 4096),
    "misa-pooled": ("pooled", 0),
    "misa-pooled-hierarchical": ("pooled", 8192),
    "dsa-misa-select": (None, 0),
}
VARIANTS = ("dsa", *OURS)


def settings(variant: str, heads: int, args) -> dict:
    """Router (None: all heads score), active heads, candidates and block size of a variant."""
    router, candidates = OURS.get(variant, (None, 0))
    return {
        "router": router,
        "active_heads": min(args.active_heads, heads) if router else heads,
        "rerank_candidates": candidates and (args.rerank_candidates or candidates),
        "block_size": args.block_size if router == "pooled" else 0,
    }


def make_variant(name: str, step, layers, args):
    if name == "dsa":
        return production.make(step, layers, TOPK)
    return misa.Misa(name, step, layers, TOPK, **settings(name, step.case.heads, args))


class CaseRun:
    """All variants of one case: `errors` and `checks` by variant, `times` by (variant, stage)."""

    def __init__(self, case: Case, keys: str, args, text=None):
        self.case, self.args = case, args
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        count = layers_needed(case, l2_bytes)
        self.layers = make_layers(case, keys, count, args.seed, text)
        self.step = make_step(case, self.layers)
        self.variants, self.errors = {}, {}
        self.checks, self.workspace, self.extras = {}, {}, {}
        self.runs, self.times = {}, {}
        self.host: dict = {}

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
        self.checks[name] = checker(variant, self.sample)
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
        if self.case.mode == "prefill":
            calls = {name: self.runs[name, "total"] for name in self.variants}
            self.host = timing.host_times(calls, self.args.iterations)
        for name in list(self.variants):
            run = self.runs[name, "total"]
            if name != "dsa" and isinstance(run, timing.Graph):
                last = self.variants[name].total(len(self.layers) - 1)
                same = torch.equal(run.output, last)
                self.checks[name]["graph_replay_equal"] = same

    def run(self, names) -> None:
        for name in names:
            self.attempt(name, self.prepare)
        self.sample = Sample(self.layers[0], self.args.samples)
        for name in list(self.variants):
            self.attempt(name, self.check)
        for name in list(self.variants):
            self.attempt(name, self.warm_up)
        self.measure()

    def host_ms(self, name: str) -> float | None:
        """The host's time for a call; a graph takes none."""
        return self.host[name].median if name in self.host else None

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


def describe(case: Case, keys: str, name: str, args, device: dict) -> dict:
    """What a record says before anything has run."""
    ours = settings(name, case.heads, args)
    return {
        "case": case.name,
        "mode": case.mode,
        "variant": name,
        "keys": keys,
        "rows": case.rows,
        "batch": case.batch,
        "rows_per_seq": case.rows_per_seq,
        "context": case.context,
        "heads": case.heads,
        **ours,
        "topk": TOPK,
    } | device


def failure(description: dict, error: str) -> dict:
    """The record of a variant that raised."""
    return description | {"error": error, "exact": False, "outcome": "failed"}


def record(run: CaseRun, description: dict, args) -> dict:
    """One record of the JSON; without times and with `error` if the variant failed."""
    name = description["variant"]
    if name in run.errors:
        return failure(description, run.errors[name])
    baseline = run.times_of("dsa") if "dsa" in run.variants else {}
    mine = run.times_of(name)
    total = mine["total"].median
    speedup = baseline["total"].median / total if baseline else None
    checks = run.checks[name]
    baseline_checks = run.checks.get("dsa") if baseline else None
    ours = settings(name, run.case.heads, args)
    operations = work.operations(run.case, **ours)
    moved = work.bytes_moved(run.case, ours["router"], TOPK)
    return description | {
        "baseline": run.variants["dsa"].path if baseline else None,
        "baseline_ms": medians(baseline),
        "baseline_spread_ms": limits(baseline),
        "ms": medians(mine),
        "spread_ms": limits(mine),
        "uncounted_ms": medians(run.times_of(name, extras=True)),
        "host_ms": run.host_ms(name),
        "baseline_host_ms": run.host_ms("dsa"),
        "speedup": speedup,
        **work.rates(operations, moved, total, description["copy_gbps"]),
        "workspace_bytes": run.workspace[name],
        "baseline_workspace_bytes": run.workspace["dsa"] if baseline else None,
        "exact": all_right(checks),
        "outcome": outcome(name, checks),
        "baseline_exact": all_right(baseline_checks) if baseline else None,
        "checks": checks,
        "layers_in_rotation": len(run.layers),
        "layer_bytes": layer_bytes(run.case),
        "iterations": args.iterations,
    }


def run_case(case: Case, keys: str, args, device: dict, text=None) -> list:
    """Measure one case on one kind of keys and print its table -> its records."""
    names = ["dsa"] + [v for v in args.variants if v != "dsa"]
    descriptions = [describe(case, keys, name, args, device) for name in names]
    print(
        f"\n{case.name}, {keys} keys: {case.rows} rows, {case.batch} sequences",
        end="",
        flush=True,
    )
    try:
        run = CaseRun(case, keys, args, text)
        print(
            f", {len(run.layers)} layers of {report.size(layer_bytes(case))} in rotation",
            flush=True,
        )
        run.run(names)
        records = [record(run, description, args) for description in descriptions]
    except Exception as error:
        traceback.print_exc()
        problem = f"{type(error).__name__}: {error}"
        records = [failure(description, problem) for description in descriptions]
    print(report.HEADER)
    for result in records:
        print(report.line(result))
        if result["outcome"] in ("wrong", "production inexact"):
            print(report.why_not_exact(result))
    sys.stdout.flush()
    return records


def profile_case(case: Case, keys: str, args, device: dict, text=None) -> list:
    """Print the kernels of one call of every variant, on one layer -> a record of each call."""
    layers = make_layers(case, keys, 1, args.seed, text)
    step = make_step(case, layers)
    records = []
    for name in args.variants:
        kernels = timing.profile(make_variant(name, step, layers, args).total)
        numbers = settings(name, case.heads, args)
        del numbers["router"]
        call = profile.Call(case, topk=TOPK, **numbers)
        found = profile.describe(kernels, call, device)
        print(f"\n{case.name} {name}, {keys} keys\n{profile.HEADER}")
        print(*map(profile.line, found), sep="\n", flush=True)
        records.append(describe(case, keys, name, args, device) | {"kernels": found})
    return records
