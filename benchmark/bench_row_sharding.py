"""One layer's selection for the rows of a prompt, by one rank and shared among more, gathering included:

    torchrun --nproc-per-node 4 benchmark/bench_row_sharding.py --output benchmark/results/row_sharding_h100.json

Times 1, 2, 4 .. ranks, as many as there are processes. README.md says what is measured and how.
"""

import argparse
import datetime
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed
from indexer import report, timing
from indexer.cases import Case, prefill
from indexer.data import USUAL, Step, layers_needed, make_layers, make_step

from sglang.srt.layers.misa.batch import Batch, bounds_of
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.indexer import MisaIndexer
from sglang.srt.layers.misa.row_sharding import gather, pays, share_of

TOPK = 2048
VARIANTS = {
    "misa": MisaConfig(),
    "misa-hierarchical": MisaConfig(rerank_candidates=4096),
}
# Rows and thousands of tokens: the usual chunk, and shapes on both sides of where rows begin to be shared.
SHAPES = ("8192x128", "2048x128", "512x128", "256x128", "2048x32", "2048x16", "1024x16")


def shape(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"(\d+)x(\d+)", text)):
        raise argparse.ArgumentTypeError(f"{text} is not ROWSxTHOUSANDS")
    rows, context_k = map(int, found.groups())
    return rows, context_k


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", nargs="+", type=shape, default=[shape(x) for x in SHAPES])
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--heads", type=int, choices=(32, 64), default=64)
    add("--iterations", type=int, default=30, help="timed rounds")
    add("--output", type=Path, help="JSON")
    return parser.parse_args(arguments)


@dataclass
class Rank:
    """One rank's part of a step, of layers in rotation."""

    step: Step
    layers: list
    config: MisaConfig
    ranks: int
    rank: int

    def __post_init__(self) -> None:
        case = self.step.case
        self.misa = MisaIndexer(config=self.config, topk=TOPK)
        spans = [
            range(context - case.rows_per_seq + 1, context + 1)
            for context in case.contexts
        ]
        self.batch = Batch(
            page_table=self.step.page_table,
            cu_rows=self.step.cu_rows,
            lengths=self.step.lengths,
            rows=[len(span) for span in spans],
            bounds=bounds_of(spans),
            spans=spans,
        )

    def select(self, i: int) -> torch.Tensor:
        """The share of the rows of layer i -> int32 [its rows, TOPK]."""
        rows = share_of(self.step.case.rows, self.ranks, self.rank)
        layer, batch = self.layers[i], self.batch
        if self.ranks > 1:
            batch = batch.part(batch.within(rows))
        return self.misa.select(
            q=layer.q[rows],
            weights=layer.weights[rows],
            index_k=layer.index_k,
            pooled_keys=None,
            batch=batch,
            output="ragged",
            offsets=self.step.offsets[rows],
        ).indices


@dataclass
class Shared:
    """The selection of a step by the ranks of a group: `select`, `gather`, or both, `total`."""

    mine: Rank
    group: object

    def total(self, i: int) -> torch.Tensor:
        """The rows of all ranks of layer i -> int32 [rows, TOPK]."""
        own = self.mine.select(i)
        return own if self.mine.ranks == 1 else self.gather(own)

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        return gather(own, self.mine.step.case.rows, self.group)

    def runs(self) -> dict:
        runs = {"total": self.total}
        if self.mine.ranks > 1:
            own = self.mine.select(0)
            runs |= {"select": self.mine.select, "gather": lambda _: self.gather(own)}
        count = len(self.mine.layers)
        return {name: timing.Eager(run, count) for name, run in runs.items()}


def measure(runs: dict, iterations: int, start_together) -> dict:
    """Milliseconds of this rank, by run and round; the ranks begin each run together -> {key: [iterations]}."""
    events = {key: [] for key in runs}
    for round in range(iterations):
        for n, (key, run) in enumerate(runs.items()):
            # The host gets ahead of each run, as it is in a server, however long it took for the last.
            torch.cuda._sleep(2 * timing.HEAD_START_CYCLES)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start_together()
            start.record()
            run(round + n)
            end.record()
            events[key].append((start, end))
    torch.cuda.synchronize()
    return {key: [a.elapsed_time(b) for a, b in pairs] for key, pairs in events.items()}


def slowest(of_ranks: list) -> dict:
    """{key: [iterations]} of every rank -> {key: Spread} of the rank that took longest in each round."""
    return {
        key: timing.spread([max(times) for times in zip(*(x[key] for x in of_ranks))])
        for key in of_ranks[0]
    }


def records_of(
    case: Case, variant: str, spreads: dict, equal: dict, device: dict
) -> list:
    """A record for each number of ranks.

    Args:
        spreads: {(ranks, "total", "select" or "gather"): Spread}.
        equal: {ranks: whether they selected what one rank does}.
    """
    records = []
    alone = spreads[1, "total"].median
    for ranks in equal:
        mine = {stage: x for (n, stage), x in spreads.items() if n == ranks}
        record = {
            "case": case.name,
            "variant": variant,
            "keys": USUAL,
            "ranks": ranks,
            "rows": case.rows,
            "context": case.context,
            "heads": case.heads,
            "topk": TOPK,
            "shared": ranks > 1 and pays(case.rows, case.context, ranks),
            "ms": {stage: x.median for stage, x in mine.items()},
            "spread_ms": {stage: [x.p10, x.p90] for stage, x in mine.items()},
            "speedup": alone / mine["total"].median,
            "equal": equal[ranks],
        }
        records.append(record | device)
    return records


def line(record: dict) -> str:
    stages = ", ".join(f"{k} {report.time(v)}" for k, v in record["ms"].items())
    verdict = "shared" if record["shared"] else "not shared in a server"
    equal = "" if record["equal"] else ", NOT WHAT ONE RANK SELECTS"
    return (
        f"  {record['case']:24} {record['variant']:18} {record['ranks']} ranks: {stages}, "
        f"{record['speedup']:.2f} times as fast as one ({verdict}){equal}"
    )


def run_shape(case: Case, args, groups: dict, start_together, device: dict) -> list:
    """Measure one shape on all numbers of ranks, side by side -> its records."""
    count = layers_needed(case, torch.cuda.get_device_properties(0).L2_cache_size)
    # The same on every rank, as index K and the queries are in a server.
    layers = make_layers(case, USUAL, count, seed=0, text=None)
    step = make_step(case, layers)
    records = []
    for variant in args.variants:
        runs, equal = {}, {}
        expected = None
        for ranks, group in groups.items():
            mine = Rank(step, layers, VARIANTS[variant], ranks, group.rank_in_group)
            shared = Shared(mine, group)
            found = shared.total(0)
            expected = found if expected is None else expected
            equal[ranks] = torch.equal(found, expected)
            runs |= {(ranks, name): run for name, run in shared.runs().items()}
        measure(runs, 3, start_together)
        times = measure(runs, args.iterations, start_together)
        of_ranks = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, (times, equal))
        equal = {n: all(other[n] for _, other in of_ranks) for n in equal}
        spreads = slowest([times for times, _ in of_ranks])
        records += records_of(case, variant, spreads, equal, device)
    return records


def main() -> None:
    args = parse_arguments()
    rank, world, local = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    if world & (world - 1):
        raise SystemExit(f"bench_row_sharding: {world} processes are no power of two")
    torch.cuda.set_device(local)
    from sglang.srt.distributed.parallel_state import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        init_model_parallel_group,
    )

    init_distributed_environment(world, rank, "env://", local, "nccl")
    # SGLang's own groups. Of eight processes, two ranks are four pairs that all do the same at the same time.
    groups, ranks = {}, 1
    while ranks <= world:
        parts = [list(range(i, min(i + ranks, world))) for i in range(0, world, ranks)]
        groups[ranks] = init_model_parallel_group(
            parts, local, "nccl", use_custom_allreduce=False, group_name=f"rows{ranks}"
        )
        ranks *= 2
    token = torch.zeros(1, device="cuda")
    device = {
        "device": torch.cuda.get_device_name(),
        "processes": world,
        "versions": report.versions(),
        "date": datetime.date.today().isoformat(),
        "iterations": args.iterations,
    }
    records = []
    for rows, context_k in args.shapes:
        case = prefill(context_k, args.heads, rows)
        records += run_shape(
            case, args, groups, lambda: torch.distributed.all_reduce(token), device
        )
        torch.cuda.empty_cache()
        if rank == 0:
            print(*map(line, records[-len(args.variants) * len(groups) :]), sep="\n")
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(records, indent=1) + "\n")
    cleanup_dist_env_and_memory()
    if not all(record["equal"] for record in records):
        raise SystemExit(
            "bench_row_sharding: shared rows are not what one rank selects"
        )


if __name__ == "__main__":
    main()
