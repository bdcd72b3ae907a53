"""Whole servers, DSA beside MISA: time to first token, time per output token, throughput, memory.

    python benchmark/bench_serving_misa.py --model-path slices/deepseek-v3.2-tp8-4l
    python benchmark/bench_serving_misa.py --model-path ... --variants misa --sweep misa-active-heads=4,8,16,32,64
    python benchmark/bench_serving_misa.py --model-path ... --profile

What is behind `--` goes to every server. The requests and what is counted are those of `sglang.bench_serving`. The same line goes
on with a run that was broken off. README.md says what is measured and how.
"""

import argparse
import datetime
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from indexer import report
from serving import records
from serving.client import load_bench_serving, measure, warm_up
from serving.configurations import (
    BASELINE,
    VARIANTS,
    Configuration,
    Session,
    Workload,
    make_groups,
    make_sessions,
    parse_sweep,
)
from serving.memory import used_bytes, watched
from serving.profile import profile, profiled, shorten, show
from tqdm import tqdm

from sglang_misa.client import Client
from sglang_misa.server import launch, reserved_port

# What --quick changes: minutes instead of an hour.
QUICK = {
    "variants": [BASELINE, "misa-default", "misa"],
    "contexts": [8192, 32768, 131072],
    "outputs": [64],
    "concurrency": [1],
    "cached_contexts": [32768],
    "extends": [64, 2048],
    "prompts": 4,
    "warm_ups": 1,
}


@dataclass
class Running:
    """A server that is up, and the bytes of the GPU that are its own when nothing runs."""

    configuration: Configuration
    client: Client
    idle_bytes: Optional[int]
    log: Path

    @property
    def room(self) -> float:
        """Tokens that it can keep: HiCache has the device's on the host too, and more."""
        info = self.client.info
        hierarchical = info.get("enable_hierarchical_cache")
        ratio = max(1, info["hicache_ratio"]) if hierarchical else 1
        return info["max_total_num_tokens"] * ratio

    def measure(self, session: Session) -> Tuple[List[Dict], Optional[int]]:
        """What bench_serving writes of each workload, and the most memory that the server had."""
        self.client.flush_cache()  # so that what was kept for the last session is given back
        with watched() as peak:
            before = peak.bytes
            answers = measure(self.client, session, self.log)
        if self.idle_bytes is None:
            return answers, None
        return answers, self.idle_bytes + peak.bytes - before


class Benchmark:
    """A run: `failed` has a line for all that went wrong."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.failed = args, []
        self.model = args.name or Path(args.model_path).name
        self.sessions = list(
            make_sessions(
                args.contexts,
                args.outputs,
                args.concurrency,
                args.prompts,
                () if args.profile else args.cached_contexts,
                args.extends,
                args.extend_output,
            )
        )
        self.until = time.monotonic() + 60 * args.minutes
        self.logs = args.logs or Path(tempfile.mkdtemp(prefix="serving-"))
        self.logs.mkdir(parents=True, exist_ok=True)
        self.meta = {
            "device": device(),
            "versions": report.versions(),
            "date": datetime.date.today().isoformat(),
        }
        self.done = {records.identity(r) for r in records.read(args.output)}

    # What is left.

    def about(self, configuration: Configuration, session: Session) -> List[Dict]:
        """What each record of a session is of."""
        return [
            records.about(self.model, configuration, self.args.server_args, workload)
            for workload in session.workloads
        ]

    def left(self, configuration: Configuration) -> List[Session]:
        """The sessions that have no record yet."""
        return [
            session
            for session in self.sessions
            if self.args.again
            or not self.done.issuperset(
                map(records.identity, self.about(configuration, session))
            )
        ]

    def in_time(self) -> bool:
        return time.monotonic() < self.until

    # Servers.

    def start(self, stack: ExitStack, configuration: Configuration) -> Running:
        """A server that runs until the stack is closed.

        Raises:
            StartError: it did not start.
        """
        port = stack.enter_context(reserved_port())
        command = [sys.executable, "-m", "sglang.launch_server"]
        command += ["--model-path", str(self.args.model_path), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--nccl-port", str(port + 1)]
        # Equal caches, so that what differs in memory is what the indexer takes.
        command += ["--max-total-tokens", str(max(s.room for s in self.sessions))]
        command += [*self.args.server_args, *configuration.arguments]
        name = configuration.label.replace(" ", "_")
        env = {**os.environ, **configuration.env}
        before = used_bytes()
        log = self.logs / f"{name}.log"
        client = stack.enter_context(launch(command, port, log, env))
        after = used_bytes()
        idle = None if before is None or after is None else after - before
        return Running(configuration, client, idle, self.logs / f"{name}.bench.log")

    def try_to(self, what: str, action, *arguments):
        """The action's result; None where it fails, which is noted."""
        try:
            return action(*arguments)
        except (RuntimeError, OSError, ValueError) as error:
            self.failed.append(f"{what}: {error}")
            tqdm.write(f"failed: {self.failed[-1]}")
            return None

    # Measurements.

    def room_for(self, session: Session, servers: Sequence[Running]) -> bool:
        """Whether all servers' caches can hold a session; says so if not."""
        room = min(server.room for server in servers)
        if room < session.room:
            what = ", ".join(map(str, session.workloads))
            tqdm.write(
                f"skipped: {what} needs {session.room} tokens of cache, there are {room:.0f}"
            )
        return room >= session.room

    def compare(self, session: Session, servers: Sequence[Running], bar: tqdm) -> None:
        """Measure a session on servers in the order A B .. B A, and write the records; A is the baseline."""
        for server in servers:
            bar.set_postfix_str(f"{server.configuration.label}: warm-up")
            warm_up(server.client, session, server.log, self.args.warm_ups)
        rounds: Dict[Configuration, List] = {s.configuration: [] for s in servers}
        for server in [*servers, *reversed(servers)]:
            name = server.configuration
            bar.set_postfix_str(f"{name.label}: {session.workloads[0]}")
            rounds[name].append(server.measure(session))
            bar.update()
        baseline: List[Dict] = []
        for server in servers:
            mine = self.make_records(server, session, rounds[server.configuration])
            if baseline:
                mine = [records.compare(*pair) for pair in zip(mine, baseline)]
            baseline = baseline or mine
            records.write(mine, self.args.output)

    def make_records(
        self, server: Running, session: Session, rounds: List[Tuple]
    ) -> List[Dict]:
        """A record of each workload, without a baseline, from what `Running.measure` returned in each round."""
        info, variant = server.client.info, server.client.variant()
        gpus = info.get("tp_size", 1) * info.get("pp_size", 1)
        peaks = [peak for _, peak in rounds]
        peak = None if None in peaks else max(peaks)
        return [
            {
                **about,
                "active_heads": variant["active_heads"],
                "rerank_candidates": variant["rerank_candidates"],
                **records.figures([answers[n] for answers, _ in rounds], peak, gpus),
                "baseline": None,
                "speedup": None,
                **self.meta,
            }
            for n, about in enumerate(self.about(server.configuration, session))
        ]

    def plan(self) -> List[Tuple[Configuration, List[Tuple[Sequence, List[Session]]]]]:
        """What is left: for each baseline the configurations that are up beside it at a time, and their sessions."""
        args, plan = self.args, []
        for baseline, others in make_groups(
            args.variants, args.sweep, args.speculative
        ):
            left = {c: self.left(c) for c in (baseline, *others)}
            wanted = [c for c in others if left[c]]
            batches = [
                (some, [s for s in self.sessions if any(s in left[c] for c in some)])
                for some in batched(wanted, args.together)
            ]
            if not others and left[baseline]:
                batches = [((), left[baseline])]
            if batches:
                plan.append((baseline, batches))
        return plan

    def run(self) -> None:
        """Measure what is left, as far as the time goes."""
        plan = self.plan()
        total = sum(
            2 * (1 + len(some)) * len(sessions)
            for _, batches in plan
            for some, sessions in batches
        )
        with tqdm(total=total, unit="run") as bar:
            for baseline, batches in plan:
                if self.in_time():
                    what = baseline.label
                    self.try_to(what, self.run_batches, baseline, batches, bar)
        if not self.in_time():
            print("The time was up; the same command goes on from here.")

    def run_batches(self, baseline: Configuration, batches: List, bar: tqdm) -> None:
        """Compare configurations with their baseline, which stays up."""
        with ExitStack() as stack:
            first = self.start(stack, baseline)
            for some, sessions in batches:
                if not self.in_time():
                    return
                with ExitStack() as beside:
                    others = [self.try_to(c.label, self.start, beside, c) for c in some]
                    servers = [first, *filter(None, others)]
                    if some and len(servers) == 1:
                        continue
                    self.run_sessions(servers, sessions, bar)

    def run_sessions(
        self, servers: List[Running], sessions: List[Session], bar: tqdm
    ) -> None:
        for session in sessions:
            if self.in_time() and self.room_for(session, servers):
                what = f"{servers[-1].configuration.label}, {session.workloads[0]}"
                self.try_to(what, self.compare, session, servers, bar)

    def run_profiles(self) -> None:
        """Print and keep where the time of a chunk and of a decode step goes, for each variant by itself."""
        args = self.args
        context, sequences = max(args.contexts), max(args.concurrency)
        for baseline, others in make_groups(args.variants, args.sweep):
            for configuration in (baseline, *others):
                with ExitStack() as stack:
                    server = self.try_to(
                        configuration.label, self.start, stack, configuration
                    )
                    if server is None:
                        continue
                    chunk = server.client.info["chunked_prefill_size"]
                    chunk = min(chunk, context // 2)
                    found = self.try_to(
                        configuration.label,
                        profile,
                        *(server.client, context, chunk, sequences),
                    )
                    if found:
                        print(show(configuration.label, found), flush=True)
                        workloads = profiled(context, chunk, sequences)
                        self.keep(configuration, found, workloads)

    def keep(
        self,
        configuration: Configuration,
        found: Dict[str, Dict],
        workloads: Dict[str, Workload],
    ) -> None:
        """Write the profiles of a server's steps."""
        kept = []
        for stage, trace in found.items():
            about = records.about(
                self.model, configuration, self.args.server_args, workloads[stage]
            )
            kept.append(about | {"stage": stage, **shorten(trace), **self.meta})
        records.write(kept, self.args.output)


def batched(items: Sequence, count: int) -> Iterator[Sequence]:
    for begin in range(0, len(items), count):
        yield items[begin : begin + count]


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def sweep(text: str):
    try:
        return parse_sweep(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error))


def acceptance(text: str) -> Optional[float]:
    return None if text == "none" else float(text)


def parse_arguments(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model-path", required=True)
    add("--name", help="of the model in the records; that of its folder by default")
    add(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=[name for name in VARIANTS if name != "free"],
        help="dsa always runs",
    )
    add(
        "--sweep",
        nargs="+",
        type=sweep,
        default=[],
        metavar="NAME=VALUE,VALUE",
        help="a server argument and its values; all combinations are measured",
    )
    add(
        "--speculative",
        nargs="+",
        type=acceptance,
        default=[None],
        metavar="LENGTH",
        help="EAGLE 3-1-4 with this acceptance length, and none for without",
    )
    lengths = {"type": int, "nargs": "+", "metavar": "TOKENS"}
    add("--contexts", default=[8192, 32768, 65536, 131072], **lengths)
    add("--outputs", default=[1024], **lengths)
    add("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    add("--prompts", type=int, default=10, help="of a run, times the concurrency")
    add("--warm-ups", type=int, default=2, help="times the concurrency")
    lengths["nargs"] = "*"
    add("--cached-contexts", default=[32768, 131072], **lengths)
    add(
        "--extends",
        default=[64, 512, 2048],
        help="new tokens of each turn behind a cached context",
        **lengths,
    )
    add("--extend-output", type=int, default=32, help="tokens of a turn's answer")
    add("--together", type=int, default=1, help="variants that are up beside dsa")
    add("--quick", action="store_true", help="minutes: fewer of all that is not given")
    add("--minutes", type=float, default=float("inf"), help="then stop in order")
    add("--again", action="store_true", help="also measure what the output has")
    add(
        "--profile",
        action="store_true",
        help="print the kernels of two steps and stop; default output: results/serving_profile_<gpu>.json",
    )
    add("--logs", type=Path, help="the folder of the servers' logs")
    add("--output", type=Path, help="default: results/serving_<gpu>.json")
    add("server_args", nargs="*", help="further arguments of SGLang, after --")
    args = parser.parse_args(arguments)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(arguments)
    if args.together < 1:
        parser.error("--together: at least 1")
    what = "serving_profile" if args.profile else "serving"
    args.output = args.output or report.default_output(device(), what)
    return args


def main(arguments: Optional[Sequence[str]] = None) -> int:
    args = parse_arguments(arguments)
    try:
        load_bench_serving()  # not when servers have been started for minutes
    except ImportError as error:
        sys.exit(f"bench_serving_misa: sglang.bench_serving does not load: {error}")
    benchmark = Benchmark(args)
    print(f"The servers' logs are in {benchmark.logs}.", flush=True)
    if args.profile:
        benchmark.run_profiles()
    else:
        benchmark.run()
        found = records.read(args.output)
        print(records.table([r for r in found if r["model"] == benchmark.model]))
        print(f"{args.output} has {len(found)} records; plot_serving.py draws them.")
    for line in benchmark.failed:
        print(f"failed: {line}")
    return 1 if benchmark.failed else 0


if __name__ == "__main__":
    sys.exit(main())
