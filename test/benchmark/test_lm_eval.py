"""RULER and LongBench by lm-eval, on local data in the benchmarks' own formats, against a real server and one that can read;
and the table."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmark" / "quality"
MINI_DSA = ROOT / "scripts" / "mini_dsa" / "checkpoint"
from fake_server import FakeServer
from table import markdown, with_tasks
from tiny_model import write_tokenizer

from sglang.srt.layers.misa.config import MisaConfig
from sglang_misa.server import misa_args, serve

ESSAY = "It is as it is, and so we go on. " * 400
COLOURS = ("red", "green", "blue")
MISA = {
    "enable_misa": True,
    "misa": {
        "router": "pooled",
        "active_heads": 8,
        "block_size": 1024,
        "rerank_candidates": 0,
    },
}


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


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """The folder that local_data.py describes."""
    from nltk import data
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    folder = tmp_path / "data"
    monkeypatch.setattr(data, "path", [str(folder / "nltk_data")])
    punkt = folder / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
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


def read(text):
    """The answer to a question of RULER or LongBench, found in its text; wrong for house 0."""
    if found := re.search(r"magic number for (\S+) mentioned in the provided", text):
        return re.search(f"for {found[1]} is: (\\d+)", text)[1]
    if "10 most common words" in text:
        words = Counter(re.findall(r"\d+\. (\S+)", text)).most_common(10)
        return " ".join(word for word, _ in words)
    house = re.findall(r"colour of house (\d+)\?", text)[-1]
    if house == "0":
        return "pink"
    return re.search(f"colour of house {house} is (\\w+)", text)[1]


@pytest.fixture
def reader(tmp_path):
    """A server that answers so, and fails when it has no `patience` left; `asked`: the requests that it answered."""

    def answer(server, path, body):
        if path == "/tokenize":
            return {"tokens": list(body["prompt"].encode())}
        if server.patience == 0:
            return None
        server.patience -= 1
        (tokens,) = body["prompt"]
        body["prompt"] = bytes(tokens).decode()
        server.asked.append(body)
        return {"choices": [{"index": 0, "text": f" {read(body['prompt'])}"}]}

    write_tokenizer(tmp_path / "model")
    model = str(tmp_path / "model")
    info = {"model_path": model, "tokenizer_path": model, "max_req_input_len": 16000}
    with FakeServer(answer, asked=[], patience=-1, info=info) as server:
        yield server


def run(server, output, data_dir, arguments, **options):
    command = [sys.executable, BENCHMARK / "run_lm_eval.py", "--url", server.url]
    command += ["--output", output, "--data-dir", data_dir, *arguments.split()]
    return subprocess.run(command, **options)


def write_table(results):
    output = results.with_name("table.md")
    command = [sys.executable, BENCHMARK / "table.py", results, "--output", output]
    subprocess.run(command, check=True)
    return output.read_text()


def test_reader(reader, data_dir, tmp_path):
    """Right answers count, wrong ones do not; nothing is asked twice; all variants are asked the same questions."""
    output = tmp_path / "result.json"
    tasks = (
        "--tasks niah_single_2 ruler_cwe ruler_qa_squad longbench_narrativeqa "
        "longbench_trec --limit 3 --lengths "
    )
    run(reader, output, data_dir, tasks + "2048 3000", check=True)
    asked = reader.asked
    assert len(asked) == 8 * 3
    assert all(body["temperature"] == 0 for body in asked)
    results = json.loads(output.read_text())
    assert [(r["task"], r["context"]) for r in results] == [
        ("longbench_narrativeqa", 0),
        ("longbench_trec", 0),
        ("niah_single_2", 2048),
        ("ruler_cwe", 2048),
        ("ruler_qa_squad", 2048),
        ("niah_single_2", 3000),
        ("ruler_cwe", 3000),
        ("ruler_qa_squad", 3000),
    ]
    wrong = ("longbench_narrativeqa", "ruler_qa_squad")
    for result in results:
        score = 2 / 3 if result["task"] in wrong else 1
        assert result["value"] == pytest.approx(score)
        # The standard error of 1, 1, 0 is a third.
        assert result["ci95"] == pytest.approx(1.96 / 3 if score < 1 else 0)
        assert result["n"] == 3 and result["variant"] == "dsa"
    # The essays are those of the folder, and fill the longer context.
    niah = [body["prompt"] for body in asked if "magic number" in body["prompt"]]
    assert sum(text.count("and so we go on. It is as it is") > 40 for text in niah) == 3
    assert max(len(body["prompt"]) for body in asked) <= 3000

    run(reader, output, data_dir, tasks + "2048 3000", check=True)
    assert len(asked) == 8 * 3 and json.loads(output.read_text()) == results

    # Another variant, in another order, one request at a time, broken off within a task.
    reader.info |= MISA
    reader.asked, reader.patience = [], 5
    other = tasks + "3000 2048 --suite longbench ruler --parallel 1"
    assert run(reader, output, data_dir, other, stderr=subprocess.PIPE).returncode
    assert len(reader.asked) == 5
    reader.patience = -1
    run(reader, output, data_dir, other, check=True)
    assert Counter(body["prompt"] for body in reader.asked) == Counter(
        body["prompt"] for body in asked
    )
    both = json.loads(output.read_text())
    assert [r for r in both if r["variant"] == "dsa"] == results
    numbers = {"variant": "misa", "active_heads": 8, "block_size": 1024}
    assert [r for r in both if r["variant"] == "misa"] == [
        result | numbers for result in results
    ]

    table = write_table(output)
    assert "| | DSA | HISA | MISA h 8, B 1024 | hierarchical MISA |" in table
    assert "| ruler_cwe | 100.0 ± 0.0 | - | 100.0 ± 0.0 | - |" in table
    assert "| longbench_narrativeqa | 66.7 ± 65.3 | - | 66.7 ± 65.3 | - |" in table
    # The mean of 2/3 and 1, and half the width of the one that has any.
    average = "| average | 83.3 ± 32.7 | - | 83.3 ± 32.7 | - |"
    assert table.index("## LongBench") < table.index(average) < table.index("## RULER")
    assert table.count("## RULER, 2048 tokens") == table.count("## RULER, 3000") == 1
    assert json.loads(output.with_name("table.json").read_text()) == both


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--tasks longbench_lcc", "longbench/lcc.jsonl"),
        ("--tasks ruler_fwe --lengths 4096 16000", "--lengths 16000 and 256 tokens"),
        ("--tasks ruler_vt --lengths 8192", "ruler_vt needs a tokenizer of words"),
        ("--tasks longbench_trec --tokenizer other", "name another --output"),
    ],
)
def test_refusals(arguments, message, reader, data_dir, tmp_path):
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "settings.json").write_text('{"tokenizer": "one"}')
    failed = run(
        *(reader, tmp_path / "result.json", data_dir, arguments),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert failed.returncode and message in failed.stderr
    assert not reader.asked


def record(metric, variant=("dsa", 0, 0, 0), context=4096, value=0.5, n=100, **rest):
    names = ("variant", "active_heads", "block_size", "rerank_candidates")
    fields = {"context": context, "metric": metric, "value": value, "n": n}
    return dict(zip(names, variant)) | fields | {"ci95": 0.04} | rest


def test_table():
    misa, hierarchical = ("misa", 8, 1024, 0), ("misa-hierarchical", 8, 1024, 8192)
    records = [
        record("ruler", task="ruler_vt"),
        record("ruler", task="ruler_cwe", value=0.7, ci95=0.03),
        record("ruler", misa, task="ruler_vt", ci95=None),
        record("ruler", ("random-heads", 8, 0, 0), task="ruler_vt", value=0),
        record("niah", misa, depth=0, needles=4, value=1.0),
        record("niah", misa, depth=50, needles=4, n=300),
        record("recall", misa, value=0.9),
        record("recall", ("misa", 4, 1024, 0), value=0.8),
        record("recall", ("hisa", 0, 128, 0), value=0.6),
        record("recall", hierarchical, value=0.95),
        record("perplexity", value=7.25),
        record("longbench", ("hisa", 0, 128, 0), context=0, task="longbench_lcc"),
    ]
    table = with_tasks(records)
    lines = markdown(table).splitlines()
    assert lines[2] == (
        "| | DSA | HISA B 128 | MISA h 8, B 1024 | hierarchical MISA | random-heads h 8 |"
    )
    assert "| ruler_vt | 50.0 ± 4.0 | - | 50.0 | - | 0.0 ± 4.0 |" in lines
    # There is no average where a task is missing.
    assert "| average | 60.0 ± 2.5 | - | - | - | - |" in lines
    # 250 of 400 over both depths; the Wilson interval is 0.577 to 0.671.
    assert "| 4096 tokens, needles: 4 | - | - | 62.5 ± 4.7 | - | - |" in lines
    # Recall of what was served.
    assert "| 4096 tokens | - | 60.0 ± 4.0 | 90.0 ± 4.0 | - | - |" in lines
    assert "| 4096 tokens | 7.250 ± 0.040 | - | - | - | - |" in lines
    assert all(x["task"] for x in table) and len(table) == 9

    alone = markdown(with_tasks([x for x in records if x["metric"] == "recall"]))
    assert "| 4096 tokens | - | 60.0 ± 4.0 | 90.0 ± 4.0 | 95.0 ± 4.0 |" in alone
    with pytest.raises(ValueError, match="no place for speed"):
        with_tasks([record("speed")])


def test_a_server_with_misa(data_dir, tmp_path):
    """SGLang's own API: every task gets a number, 0 for what mini-DSA was not trained on; the second time nothing is asked."""
    output = tmp_path / "result.json"
    arguments = (
        "--tasks ruler_fwe ruler_qa_squad longbench_hotpotqa longbench_trec "
        "--lengths 2560 --limit 1"
    )
    config = MisaConfig("pooled", 4, block_size=256)
    args = (*misa_args(config), "--disable-cuda-graph")
    env = {"SGLANG_DSA_FUSE_TOPK": "false"}
    with serve(MINI_DSA, tmp_path / "server", *args, env=env) as server:
        run(server, output, data_dir, arguments, check=True)
        longest = max(record["lengths"].max() for record in server.records())
        results = json.loads(output.read_text())
        server.forget()
        run(server, output, data_dir, arguments, check=True)
        assert not server.records()
    assert json.loads(output.read_text()) == results
    assert 2048 < longest <= 2560 + 50
    assert [r["task"] for r in results] == [
        "longbench_hotpotqa",
        "longbench_trec",
        "ruler_fwe",
        "ruler_qa_squad",
    ]
    # One answer has no standard error.
    named = {"variant": "misa", "active_heads": 4, "block_size": 256}
    named |= {"n": 1, "ci95": None}
    assert all(r | named == r for r in results)
    *zeros, squad = (r["value"] for r in results)
    # One of three colours can be right by chance.
    assert zeros == [0, 0, 0] and squad in (0, 1)
    table = write_table(output)
    assert "| | DSA | HISA | MISA h 4, B 256 | hierarchical MISA |" in table
    assert "| ruler_fwe | - | - | 0.0 | - |" in table
