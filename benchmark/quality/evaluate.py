"""Everything here for one model with one command, a server for each variant, one after another:

    python benchmark/quality/evaluate.py --model-path deepseek-ai/DeepSeek-V3.2 --text book.txt --output quality -- --tp 8

What is behind `--` goes to every server. The folder then holds `niah.json`, `perplexity.json`, `lm_eval.json`, `recall.json`, the
paper's table in `table.md`, and the servers' logs. The same line goes on with a run that was broken off. For recall, DSA is
served again while its indexer is recorded, some gigabytes for every prompt of 32K tokens, which are deleted afterwards; the
attention is recorded too where the cache is not quantized (--kv-cache-dtype bfloat16).
"""

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, Optional

from niah import DEPTHS
from run_lm_eval import SUITES

from sglang.srt.layers.misa.environment import CAPTURE_DIR, EVAL_SELECTION, SELECTIONS
from sglang.srt.utils.network import is_port_available
from sglang_misa.server import StartError, launch

HERE = Path(__file__).parent
SHORTEST_RULER = 4096  # tokens; the paper's too

# The arguments and the environment of each server.
# Every row is to be selected by what is measured, in decode too where that is not SGLang's own by default.
MISA = "--enable-misa", "--misa-min-context", "0"
PAPER = *MISA, "--misa-router", "pooled", "--misa-decode", "misa"
VARIANTS = {
    "dsa": ((), {}),
    "misa": ((*MISA, "--misa-rerank-candidates", "0"), {}),
    "misa-hierarchical": ((*MISA, "--misa-rerank-candidates", "4096"), {}),
    "misa-pooled": (PAPER, {}),
    "misa-pooled-hierarchical": ((*PAPER, "--misa-rerank-candidates", "8192"), {}),
    **{
        name: (("--enable-misa", "--misa-decode", "misa", "--disable-cuda-graph"), env)
        for name, env in ((name, {EVAL_SELECTION: name}) for name in SELECTIONS)
    },
}
DEFAULT_VARIANTS = ("dsa", "misa", "misa-hierarchical", "hisa")


def run(script: str, *options) -> None:
    """One of the scripts beside this one; ends this one if that fails."""
    command = [sys.executable, HERE / script, *map(str, options)]
    if code := subprocess.run(command).returncode:
        raise SystemExit(code)


@contextmanager
def serve(
    args: argparse.Namespace, name: str, *options: str, env: Optional[Dict] = None
) -> Iterator[str]:
    """The URL of a server that runs while the context is open; its log is `<name>.log`.

    Raises:
        SystemExit: it did not start, or another one has the port.
    """
    if not is_port_available(args.port):
        raise SystemExit(f"evaluate: --port {args.port} is taken; give a free one")
    command = [sys.executable, "-m", "sglang.launch_server"]
    command += ["--model-path", args.model_path, "--port", str(args.port)]
    command += [*args.server_args, *options]
    print(f"{name}: {' '.join(command[1:])}", flush=True)
    log, env = args.output / f"{name}.log", {**os.environ, **(env or {})}
    try:
        with launch(command, args.port, log, env) as server:
            yield server.url
    except StartError as error:
        raise SystemExit(f"evaluate: {name}: {error}")


def ask(args: argparse.Namespace, url: str) -> None:
    """What the server of a variant is asked."""
    run(
        *("niah.py", "--url", url, "--haystack", args.text),
        *("--output", args.output / "niah.json", "--trials", args.trials),
        *("--contexts", *args.contexts, "--depths", *args.depths),
        *("--alike", *args.alike),
    )
    run(
        *("perplexity.py", "--url", url, "--text", args.text),
        *("--output", args.output / "perplexity.json", "--windows", args.windows),
        *("--contexts", *[n for n in args.contexts if n > args.scored]),
        *("--scored", args.scored),
    )
    if args.suite:
        lengths = [n for n in args.contexts if n >= SHORTEST_RULER]
        run(
            *("run_lm_eval.py", "--url", url),
            *("--output", args.output / "lm_eval.json", "--suite", *args.suite),
            *(("--lengths", *lengths) if "ruler" in args.suite else ()),
            *(("--data-dir", args.data_dir) if args.data_dir else ()),
            *(("--limit", args.limit) if args.limit else ()),
        )


def measure_recall(args: argparse.Namespace) -> None:
    """Serve DSA to record what its layers are given, and compute every selection from it."""
    with tempfile.TemporaryDirectory(dir=args.output) as folder:
        capture = Path(folder) / "capture"
        # Records hold positions, and what runs in a CUDA graph leaves none.
        env = {CAPTURE_DIR: str(capture), "SGLANG_DSA_FUSE_TOPK": "false"}
        with serve(args, "recorded", "--disable-cuda-graph", env=env) as url:
            run(
                *("perplexity.py", "--url", url, "--text", args.text),
                *("--output", Path(folder) / "sent.json", "--parallel", 1),
                *("--contexts", max(args.contexts), "--scored", args.scored),
                *("--windows", args.recall_prompts),
            )
        run(
            *("recall.py", capture, "--output", args.output / "recall.json"),
            *("--topk", args.topk),
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model-path", required=True)
    add("--text", type=Path, required=True, help="a long text, not trained on")
    add("--output", type=Path, required=True, help="a folder")
    add("--port", type=int, default=30000, help="of the servers")
    add("--variants", nargs="+", choices=VARIANTS, default=DEFAULT_VARIANTS)
    add("--contexts", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    add("--depths", type=int, nargs="+", default=DEPTHS, help="of needles, in percent")
    add("--trials", type=int, default=10, help="needles of every context and depth")
    add("--alike", type=int, nargs="*", default=[], help="needles of one key, beside")
    add("--windows", type=int, default=32, help="of perplexity, for every context")
    add("--scored", type=int, default=2048, help="tokens at the end of a window")
    add("--recall-prompts", type=int, default=8, help="of the longest context")
    add("--topk", type=int, default=2048, help="the model's index_topk")
    add(
        "--suite",
        nargs="*",
        choices=SUITES,
        default=list(SUITES),
        help="of lm-eval; may be empty",
    )
    add("--data-dir", type=Path, help="lm-eval's data, else from the hub")
    add("--limit", type=int, help="questions of an lm-eval task; without it all")
    add("server_args", nargs="*", help="further arguments of SGLang, after --")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if max(args.contexts) <= args.scored:
        raise SystemExit("evaluate: no --contexts is longer than --scored")
    if "ruler" in args.suite and max(args.contexts) < SHORTEST_RULER:
        raise SystemExit(
            f"evaluate: RULER starts at {SHORTEST_RULER} tokens: add such --contexts, or leave it out of --suite"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.variants:
        options, env = VARIANTS[name]
        with serve(args, name, *options, env=env) as url:
            ask(args, url)
    if not (args.output / "recall.json").exists():
        measure_recall(args)
    names = ("lm_eval.json", "niah.json", "perplexity.json", "recall.json")
    files = [file for name in names if (file := args.output / name).exists()]
    run("table.py", *files, "--output", args.output / "table.md")
    print((args.output / "table.md").read_text())


if __name__ == "__main__":
    main()
