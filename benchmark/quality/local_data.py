"""lm-eval's RULER and LongBench tasks on data from a folder, without a network:

    ruler/PaulGrahamEssays.json      {"text": ...}, as RULER's download_paulgraham_essay.py writes it
    ruler/squad.json                 SQuAD 2.0's dev-v2.0.json, under the name that RULER gives it
    ruler/hotpotqa.json              HotpotQA's hotpot_dev_distractor_v1.json, the same
    nltk_data/tokenizers/punkt_tab/  python -m nltk.downloader -d nltk_data punkt_tab
    longbench/<dataset>.jsonl        the files of LongBench's data.zip: input, context, answers, all_classes, ...

Only what the tasks that are asked for need has to be there. RULER's other tasks make up their texts.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, Dict, Iterable, List

QA = {"ruler_qa_squad": "squad.json", "ruler_qa_hotpot": "hotpotqa.json"}
IN_ESSAYS = ("single_2", "single_3", "multikey_1", "multiquery", "multivalue")


def files(task: str, data_dir: Path) -> List[Path]:
    """What a task needs."""
    if task.startswith("longbench_"):
        return [data_dir / "longbench" / f"{task.removeprefix('longbench_')}.jsonl"]
    if task in QA:
        return [data_dir / "ruler" / QA[task]]
    if not task.startswith("niah_"):
        return []
    # lm-eval loads it for any of these tasks, and downloads it otherwise.
    punkt = [data_dir / "nltk_data" / "tokenizers" / "punkt_tab" / "english"]
    essays = [data_dir / "ruler" / "PaulGrahamEssays.json"]
    return punkt + essays * task.endswith(IN_ESSAYS)


def missing(tasks: Iterable[str], data_dir: Path) -> List[Path]:
    """What is not there of what the tasks need."""
    needed = {file for task in tasks for file in files(task, data_dir)}
    return sorted(file for file in needed if not file.exists())


def environment(data_dir: Path) -> Dict[str, str]:
    """To be set before lm-eval is imported."""
    return {"HF_HUB_OFFLINE": "1", "NLTK_DATA": str(data_dir / "nltk_data")}


def changes(task: str, data_dir: Path) -> Dict:
    """The changes of a task's configuration with which it reads its data from the folder."""
    if task.startswith("longbench_"):
        return {"custom_dataset": longbench(*files(task, data_dir))}
    if task in QA:
        from lm_eval.tasks.ruler import qa_utils

        # The tasks load this module anew, so they are given its functions too.
        qa_utils.download_json = lambda url: json.loads(
            (data_dir / "ruler" / QA[task]).read_text()
        )
        load = qa_utils.get_squad if "squad" in task else qa_utils.get_hotpotqa
        return {"custom_dataset": load}
    if task.endswith(IN_ESSAYS):
        from lm_eval.tasks.ruler import prepare_niah

        # All that it takes from `datasets` are the essays.
        text = json.loads((data_dir / "ruler" / "PaulGrahamEssays.json").read_text())
        prepare_niah.datasets = SimpleNamespace(
            load_dataset=lambda *_, **__: {"text": [text["text"]]}
        )
    return {}


def longbench(file: Path) -> Callable:
    """A function that loads one of LongBench's own files as lm-eval's tasks expect it."""
    import datasets

    def load(**_):
        with file.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        # The copy on the hub that lm-eval reads calls it so.
        rows = [{"question": row["input"]} | row for row in rows]
        return {"test": datasets.Dataset.from_list(rows)}

    return load
