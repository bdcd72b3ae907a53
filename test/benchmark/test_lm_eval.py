"""RULER and LongBench by lm-eval, on local data in the benchmarks' own formats, against a server that can read; and the table.

`test_quality.py` asks a real server.
"""

import json
import re
import subprocess
from collections import Counter

import pytest
from fake_server import FakeServer
from houses import run_lm_eval, write_data, write_table
from table import markdown, with_tasks
from tiny_model import write_tokenizer

MISA = {
    "enable_misa": True,
    "misa": {
        "router": "pooled",
        "active_heads": 8,
        "block_size": 1024,
        "rerank_candidates": 0,
    },
}


@pytest.fixture
def data_dir(tmp_path):
    return write_data(tmp_path / "data")


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


def test_reader(reader, data_dir, tmp_path):
    """Right answers count, wrong ones do not; nothing is asked twice; all variants are asked the same questions."""
    output = tmp_path / "result.json"
    tasks = (
        "--tasks niah_single_2 ruler_cwe ruler_qa_squad longbench_narrativeqa "
        "longbench_trec --limit 3 --lengths "
    )
    run_lm_eval(reader, output, data_dir, tasks + "2048 3000", check=True)
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

    run_lm_eval(reader, output, data_dir, tasks + "2048 3000", check=True)
    assert len(asked) == 8 * 3 and json.loads(output.read_text()) == results

    # Another variant, in another order, one request at a time, broken off within a task.
    reader.info |= MISA
    reader.asked, reader.patience = [], 5
    other = tasks + "3000 2048 --suite longbench ruler --parallel 1"
    assert run_lm_eval(
        reader, output, data_dir, other, stderr=subprocess.PIPE
    ).returncode
    assert len(reader.asked) == 5
    reader.patience = -1
    run_lm_eval(reader, output, data_dir, other, check=True)
    assert Counter(body["prompt"] for body in reader.asked) == Counter(
        body["prompt"] for body in asked
    )
    both = json.loads(output.read_text())
    assert [r for r in both if r["variant"] == "dsa"] == results
    numbers = {"variant": "misa", "active_heads": 8, "block_size": 1024}
    numbers["router"] = "pooled"
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
    failed = run_lm_eval(
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
