"""SGLang's own benchmark of a server, called as its command line is, in this process: a start of Python for every run would
take longer than the run."""

import json
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, List
from unittest import mock

from sglang_misa.client import Client

from .configurations import Session, Workload

WARM_UP_OUTPUT = 32  # tokens, as in bench_serving's own warm-up


def load_bench_serving() -> Callable[[], None]:
    """The command line of `sglang.bench_serving`. On a CPU it can be imported only where the CPU engine's variables are set.

    Raises:
        ImportError: something that it takes is not installed.
    """
    from sglang.benchmark.serving import cli_main

    return cli_main


def bench_serving(
    url: str,
    log: Path,
    *,
    context: int,
    output: int,
    prompts: int,
    concurrency: int,
    seed: int,
) -> Dict:
    """Run `sglang.bench_serving` on random ids and return what it writes of them.

    Prompts of the same seed begin with the same tokens, whatever their length.

    Raises:
        RuntimeError: a request failed.
    """
    cli_main = load_bench_serving()
    with tempfile.TemporaryDirectory() as folder, log.open("a") as file:
        result = Path(folder) / "result.jsonl"
        command = [
            "bench_serving",
            *("--backend", "sglang", "--base-url", url, "--seed", str(seed)),
            *("--dataset-name", "random-ids", "--tokenize-prompt"),
            *("--random-range-ratio", "1.0", "--random-input-len", str(context)),
            *("--random-output-len", str(output), "--num-prompts", str(prompts)),
            *("--max-concurrency", str(concurrency), "--warmup-requests", "0"),
            *("--cache-report", "--disable-tqdm"),
            *("--output-file", str(result), "--output-details"),
        ]
        with mock.patch.object(sys, "argv", command), redirect_stdout(file):
            try:
                cli_main()
            except SystemExit as end:
                raise RuntimeError(f"bench_serving ended with {end.code}; see {log}")
        answer = json.loads(result.read_text())
    if answer["completed"] < prompts:
        error = next(error for error in answer["errors"] if error)
        lost = prompts - answer["completed"]
        raise RuntimeError(f"{lost} of {prompts} requests failed: {error}")
    return answer


def check_cached(workload: Workload, cached: List[int]) -> None:
    """Raise RuntimeError where the cache did not hold what it should: prefixes of a workload, or nothing.

    Two random prompts may begin with the same token; that tenth is for those.
    """
    mean = sum(cached) / len(cached)
    if abs(mean - workload.cached) > 0.1 * (workload.context - workload.cached):
        raise RuntimeError(
            f"{workload}: {mean:.0f} tokens of a prompt were cached instead of {workload.cached}"
        )


def measure(server: Client, session: Session, log: Path, seed: int = 1) -> List[Dict]:
    """What `bench_serving` writes of each workload.

    Raises:
        RuntimeError: a request failed, or the cache was not as it should be.
    """
    server.flush_cache()
    same = {"prompts": session.prompts, "seed": seed}
    if session.fill:
        bench_serving(
            server.url, log, context=session.fill, output=1, concurrency=1, **same
        )
    answers = []
    for workload in session.workloads:
        answer = bench_serving(
            server.url,
            log,
            context=workload.context,
            output=workload.output,
            concurrency=workload.concurrency,
            **same,
        )
        check_cached(workload, answer["cached_tokens"])
        answers.append(answer)
    return answers


def warm_up(server: Client, session: Session, log: Path, times: int) -> None:
    """The same with `times` as many prompts as are sent at once, other ones, and short answers."""
    workloads = tuple(
        replace(workload, output=min(workload.output, WARM_UP_OUTPUT))
        for workload in session.workloads
    )
    prompts = times * workloads[-1].concurrency
    short = replace(session, workloads=workloads, prompts=prompts)
    measure(server, short, log, seed=0)
