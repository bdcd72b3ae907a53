"""RULER and LongBench through a running SGLang server, by lm-eval's own tasks:

    pip install 'lm_eval[longbench,ruler]==0.4.13' tenacity
    python benchmark/quality/run_lm_eval.py --url http://127.0.0.1:30000 --output lm_eval.json
    python benchmark/quality/table.py lm_eval.json --output table.md

lm-eval makes the prompts, asks for them and scores the answers; all are greedy. What the server runs (DSA, MISA and its
numbers) is read from the server, and every variant is asked the same questions. Results and answers are kept in a folder
beside the output, so a run that was broken off goes on, and several servers of one model can be asked one after another into
the same file. Data comes from the hub, or with --data-dir from that folder alone (see `local_data.py`).
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Dict, List, Optional

import local_data
from tqdm import tqdm

from sglang_misa.client import REQUEST_SECONDS, Client

SUITES = {
    "ruler": [
        *(f"niah_single_{i}" for i in (1, 2, 3)),
        *(f"niah_multikey_{i}" for i in (1, 2, 3)),
        *("niah_multiquery", "niah_multivalue"),
        *("ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa_squad", "ruler_qa_hotpot"),
    ],
    "longbench": [
        f"longbench_{name}"
        for name in (
            *("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
            *("hotpotqa", "2wikimqa", "musique", "dureader"),
            *("gov_report", "qmsum", "multi_news", "vcsum"),
            *("trec", "triviaqa", "samsum", "lsht"),
            *("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
            *("lcc", "repobench-p"),
        )
    ],
}
TASKS = [task for tasks in SUITES.values() for task in tasks]
# RULER's lengths leave out the beginning of the answer, special tokens and, in one task, the answer.
UNCOUNTED_TOKENS = 256


@dataclass(frozen=True)
class Cell:
    """One number of the table. context: tokens of RULER's prompts; 0 for LongBench, whose texts are as long as they are."""

    suite: str
    task: str
    context: int


def cells(suites: List[str], tasks: List[str], lengths: List[int]) -> List[Cell]:
    """What is asked, in the order of the suites; `tasks`: only these, if there are any."""
    return [
        Cell(suite, task, context)
        for suite in suites
        for context in (lengths if suite == "ruler" else [0])
        for task in SUITES[suite]
        if not tasks or task in tasks
    ]


def evaluate(
    cell: Cell,
    server: Client,
    tokenizer: str,
    cache: Path,
    parallel: int,
    limit: Optional[int],
    data_dir: Optional[Path],
) -> Dict:
    """Ask and score one task by lm-eval -> metric, task, context, value (0 to 1), ci95 and n.

    ci95 is half the width of the 95% confidence interval, from lm-eval's standard error; None where n is 1.

    Args:
        tokenizer: its folder or its name on the hub; the server is sent token ids.
        cache: the answers so far; those are not asked for again.
    """
    import lm_eval
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    # Its random numbers would go on where the last task of this process left them, and tasks depend on what ran before.
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)
    name, changes = "score", {"task": cell.task}
    if cell.suite == "ruler":
        # Its own list has but some lengths, and a mean of its own making without a standard error.
        name = str(cell.context)
        mean = {"metric": name, "aggregation": "mean", "higher_is_better": True}
        changes["metric_list"] = [mean]
    if data_dir:
        changes |= local_data.changes(cell.task, data_dir)
    folder = Path(lm_eval.__file__).parent / "tasks" / cell.suite
    # What it would say of this environment, for every task, takes a second and is not kept.
    evaluator.add_env_info = lambda _: None
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "default",
            "base_url": f"{server.url}/v1/completions",
            "tokenizer": tokenizer,
            "tokenizer_backend": "huggingface",
            "add_bos_token": True,
            "max_length": server.info["max_req_input_len"],
            "num_concurrent": parallel,
            "timeout": REQUEST_SECONDS,
        },
        # A task alone takes no changes, one in a group does.
        tasks=[{"group": cell.suite, "task": [changes]}],
        task_manager=TaskManager(
            include_path=str(folder),
            include_defaults=False,
            metadata={"tokenizer": tokenizer, "max_seq_lengths": [cell.context]},
        ),
        use_cache=str(cache),
        limit=limit,
        # LongBench's tasks say a temperature of 1 beside do_sample, which this API does not know.
        gen_kwargs={"temperature": 0},
        log_samples=False,
    )
    scores = results["results"][cell.task]
    stderr = scores[f"{name}_stderr,none"]
    return {
        "context": cell.context,
        "metric": cell.suite,
        "task": cell.task,
        "value": scores[f"{name},none"],
        "ci95": None if stderr == "N/A" else 1.96 * stderr,
        "n": results["n-samples"][cell.task]["effective"],
    }


def check_tokenizer(wanted: List[Cell], server: Client) -> None:
    """Refuse what lm-eval would try to make for ever: its generators shrink a text until it fits.

    Raises:
        SystemExit: tokens are too short, as bytes are.
    """
    words = "the quick brown fox jumps over the lazy dog"
    if len(server.tokenize(words)) < len(words) / 2:
        return
    # The example in front of `ruler_vt` has at most 500 tokens; `ruler_cwe` repeats its words more often from 4096 on.
    for cell in wanted:
        if cell.task == "ruler_vt":
            raise SystemExit(
                "run_lm_eval: ruler_vt needs a tokenizer of words; name the other --tasks"
            )
        if cell.task == "ruler_cwe" and 4096 <= cell.context < 8192:
            raise SystemExit(
                "run_lm_eval: ruler_cwe needs a tokenizer of words or --lengths of 8192"
            )


class Kept:
    """The folder of results: one file for each variant, task and length, and lm-eval's answers for each variant."""

    def __init__(self, folder: Path, variant: Dict, settings: Dict):
        """settings: what must be the same in all of the folder.

        Raises:
            SystemExit: they are not.
        """
        self.folder, self.variant = folder, variant
        self.own = folder / "-".join(str(x) for x in variant.values())
        self.own.mkdir(parents=True, exist_ok=True)
        file = folder / "settings.json"
        if not file.exists():
            file.write_text(json.dumps(settings, indent=1) + "\n")
        before = json.loads(file.read_text())
        if before != settings:
            raise SystemExit(
                f"run_lm_eval: {folder} holds results of {before}, not of {settings}; name another --output"
            )

    def file(self, cell: Cell) -> Path:
        return self.own / f"{cell.task}-{cell.context}.json"

    def has(self, cell: Cell, limit: Optional[int]) -> bool:
        file = self.file(cell)
        return file.exists() and json.loads(file.read_text())["limit"] == limit

    def write(self, cell: Cell, limit: Optional[int], result: Dict) -> None:
        kept = {"limit": limit, "result": self.variant | result}
        self.file(cell).write_text(json.dumps(kept, indent=1) + "\n")

    def results(self) -> List[Dict]:
        """Of all variants; tasks in the order of their suite."""
        files = sorted(self.folder.glob("*/*.json"))
        results = [json.loads(file.read_text())["result"] for file in files]
        return sorted(results, key=lambda x: (x["context"], TASKS.index(x["task"])))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", required=True, help="of the server")
    add("--output", type=Path, required=True, help="the result, JSON")
    add("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    add("--tasks", nargs="+", choices=TASKS, default=[], metavar="TASK")
    add("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    add("--data-dir", type=Path, help="take all data from here, not from the hub")
    add("--limit", type=int, help="questions of a task; without it all")
    add("--parallel", type=int, default=4, help="requests at once")
    add("--tokenizer", help="its folder or hub name; without it what the server names")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    server = Client(args.url)
    wanted = cells(args.suite, args.tasks, args.lengths)
    longest = max((cell.context for cell in wanted), default=0)
    if longest and longest + UNCOUNTED_TOKENS > server.info["max_req_input_len"]:
        raise SystemExit(
            f"run_lm_eval: --lengths {longest} and {UNCOUNTED_TOKENS} tokens more do not fit into the server's requests "
            f"of {server.info['max_req_input_len']}"
        )
    check_tokenizer(wanted, server)
    if args.data_dir:
        args.data_dir = args.data_dir.resolve()
        missing = local_data.missing({cell.task for cell in wanted}, args.data_dir)
        if missing:
            raise SystemExit(f"run_lm_eval: no {', '.join(map(str, missing))}")
        os.environ.update(local_data.environment(args.data_dir))
    tokenizer = args.tokenizer or server.info["tokenizer_path"]
    settings = {
        "model": server.info["model_path"],
        "tokenizer": tokenizer,
        "data_dir": str(args.data_dir) if args.data_dir else None,
        "lm_eval": version("lm_eval"),
    }
    kept = Kept(args.output.with_suffix(""), server.variant(), settings)
    progress = tqdm([cell for cell in wanted if not kept.has(cell, args.limit)])
    for cell in progress:
        progress.set_description(f"{cell.task} {cell.context or ''}")
        result = evaluate(
            cell,
            server,
            tokenizer,
            kept.own / "answers",
            args.parallel,
            args.limit,
            args.data_dir,
        )
        kept.write(cell, args.limit, result)
    args.output.write_text(json.dumps(kept.results(), indent=1) + "\n")


if __name__ == "__main__":
    main()
