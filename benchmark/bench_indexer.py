"""The whole indexer, from the quantized query to the selected indices, in variants side by side:

    dsa                       what SGLang 0.5.17 runs (DeepGEMM logits, then its top-k)
    misa                      the sampled router; score with the routed heads and the shared one, select
    misa-hierarchical         the same for 4096 candidates, re-ranked by all heads
    misa-pooled               the paper's router; score with the routed heads, select
    misa-pooled-hierarchical  the same for 8192 candidates, re-ranked by all heads
    dsa-misa-select           all heads, no routing, through our kernels

README.md says what is measured and how.
"""

import argparse
import datetime
import gc
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import torch
from indexer import report, timing
from indexer.cases import CASES, select
from indexer.data import KEYS, USUAL
from indexer.run import TOPK, VARIANTS, profile_case, run_case
from indexer.text import Text


def parse_arguments(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", nargs="+", default=[], metavar="GLOB", help="names or patterns")
    add("--variants", nargs="+", default=["*"], metavar="GLOB", help="dsa always runs")
    add(
        "--keys",
        nargs="+",
        default=[USUAL],
        metavar="GLOB",
        help=f"what the keys look like, '*' for all: {', '.join(KEYS)}",
    )
    add("--text", type=Path, help="for keys text, instead of Python's own reference")
    add("--heads", type=int, choices=(32, 64), help="heads in all cases")
    add("--active-heads", type=int, default=8)
    add("--block-size", type=int, default=1024, help="tokens of a pooled block")
    add("--rerank-candidates", type=int, help="other than those of the variants")
    add("--iterations", type=int, default=30, help="timed rounds")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="5 rounds, fewer rows checked")
    add("--list", action="store_true", help="name the cases and stop")
    add(
        "--profile",
        metavar="GLOB",
        help="print the kernels of one call of these cases and stop; --output keeps them",
    )
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
    unknown = [p for p in args.keys if not any(fnmatch(k, p) for k in KEYS)]
    if unknown:
        parser.error(f"--keys {unknown[0]}: there are {', '.join(KEYS)}")
    args.keys = [k for k in KEYS if any(fnmatch(k, p) for p in args.keys)]
    args.cases_chosen = select(
        [args.profile] if args.profile else args.cases, args.heads
    )
    if not args.cases_chosen:
        parser.error(f"no such case; there are: {', '.join(c.name for c in CASES)}")
    if args.block_size < 64 or args.block_size % 64:
        parser.error("--block-size: a multiple of 64")
    candidates = args.rerank_candidates or TOPK
    if candidates < TOPK or candidates % 64:
        parser.error(f"--rerank-candidates: a multiple of 64, at least {TOPK}")
    return args


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


def describe_device() -> dict:
    return {
        "device": torch.cuda.get_device_name(),
        "copy_gbps": round(timing.copy_gbps(), 1),
        "versions": report.versions(),
        "date": datetime.date.today().isoformat(),
    }


def run_all(args, device: dict, text: Text | None, output: Path | None) -> list:
    """All cases on all kinds of keys -> the records, which are written after each of them."""
    records = []
    for n, case in enumerate(args.cases_chosen):
        for keys in args.keys:
            results = run_case(case, keys, args, device, text)
            records += results
            if output:
                report.write(results, output)
            try:
                free_memory()
            except RuntimeError:
                restart(args.cases_chosen[n + 1 :], output)
    return records


def main() -> None:
    args = parse_arguments()
    if args.list:
        print("\n".join(case.name for case in args.cases_chosen))
        return
    if not torch.cuda.is_available():
        sys.exit("bench_indexer: needs an NVIDIA Hopper GPU, and torch sees none")
    torch.cuda.set_device(0)
    text = None
    if "text" in args.keys:
        rows = max(case.rows_per_seq for case in args.cases_chosen)
        text = Text.capture(rows, args.text)
    device = describe_device()
    free_memory()
    print(f"{device['device']}, copies at {device['copy_gbps']:.0f} GB/s")
    print(", ".join(f"{k} {v}" for k, v in device["versions"].items()))
    if args.profile:
        device["fp8_tflops"] = round(timing.fp8_tflops(), 1)
        print(f"FP8 matrix products at {device['fp8_tflops']:.0f} TFLOPS")
        for case in args.cases_chosen:
            for keys in args.keys:
                records = profile_case(case, keys, args, device, text)
                if args.output:
                    report.write(records, args.output)
                free_memory()
        return

    output = args.output
    if output is None and len(sys.argv) == 1:
        output = report.default_output(device["device"])
    records = run_all(args, device, text, output)
    print(report.worst_keys(records, USUAL))
    if output:
        print(f"\nwrote {len(records)} records to {output}")
    failed = report.failures(records)
    for r in failed:
        print(f"failed: {r['case']}, {r['keys']} keys, {r['variant']}: {r['outcome']}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
