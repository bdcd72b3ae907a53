"""RULER and LongBench about the colours of houses: data in the benchmarks' own formats, and the commands that ask it."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

BENCHMARK = Path(__file__).parents[2] / "benchmark" / "quality"
ESSAY = "It is as it is, and so we go on. " * 400
COLOURS = ("red", "green", "blue")


def colour(house):
    return COLOURS[house % 3]


def question(house):
    return f"What is the colour of house {house}?"


def told(house):
    return f"The colour of house {house} is {colour(house)}."


def longbench_row(house, question, context, classes=None):
    return {
        "input": question,
        "context": context,
        "answers": [colour(house)],
        "length": len(context.split()),
        "dataset": "trec" if classes else "narrativeqa",
        "language": "en",
        "all_classes": classes,
        "_id": str(house),
    }


def write_data(folder: Path) -> Path:
    """Write what local_data.py describes, and return the folder."""
    from nltk import data
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    punkt = folder / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
    # NLTK writes to its data path alone.
    with mock.patch.object(data, "path", [str(folder / "nltk_data")]):
        save_punkt_params(PunktTrainer(ESSAY).get_params(), dir=str(punkt))

    (folder / "ruler").mkdir()
    essays = folder / "ruler" / "PaulGrahamEssays.json"
    essays.write_text(json.dumps({"text": ESSAY}))
    # RULER asks 500 questions.
    paragraphs = [
        {
            "context": told(house),
            "qas": [
                {
                    "question": question(house),
                    "is_impossible": False,
                    "answers": [{"text": colour(house)}],
                }
            ],
        }
        for house in range(500)
    ]
    squad = {"data": [{"paragraphs": [paragraph]} for paragraph in paragraphs]}
    (folder / "ruler" / "squad.json").write_text(json.dumps(squad))

    # A line separator inside of a string ends no row.
    context = "\u2028".join(told(house) for house in range(20))
    rows = {
        "narrativeqa": [longbench_row(i, question(i), context) for i in range(3)],
        "hotpotqa": [longbench_row(i, question(i), context) for i in range(3)],
        "trec": [
            longbench_row(i, f"Question: {question(i)}\nType:", context, COLOURS)
            for i in (10, 11, 12)
        ],
    }
    (folder / "longbench").mkdir()
    for name, of in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of)
        (folder / "longbench" / f"{name}.jsonl").write_text(lines)
    return folder


def run_lm_eval(server, output, data_dir, arguments, **options):
    command = [sys.executable, BENCHMARK / "run_lm_eval.py", "--url", server.url]
    command += ["--output", output, "--data-dir", data_dir, *arguments.split()]
    return subprocess.run(command, **options)


def write_table(results):
    output = results.with_name("table.md")
    command = [sys.executable, BENCHMARK / "table.py", results, "--output", output]
    subprocess.run(command, check=True)
    return output.read_text()
