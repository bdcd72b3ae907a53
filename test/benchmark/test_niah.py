"""The needle-in-a-haystack runner: its prompts, its counting, and that it goes on where it was broken off."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_server import FakeServer

BENCHMARK = Path(__file__).parents[2] / "benchmark" / "quality"
from mini_dsa import tasks
from niah import (
    ADJECTIVES,
    Trial,
    make_needles,
    make_prompts,
    question,
    summarize,
    tell,
)

HAY = "Nothing is said of numbers here. " * 400


def tokenize(text):
    return list(text.encode())


@pytest.mark.parametrize("needles, alike", [(1, False), (4, False), (8, True)])
@pytest.mark.parametrize("depth", [0, 37, 100])
@pytest.mark.parametrize("context", [700, 4096])
def test_prompts(context, depth, needles, alike):
    trial = Trial(context, depth, needles, 3, alike)
    told = make_needles(trial)
    prompts = make_prompts(trial, tokenize(HAY), tokenize)
    assert prompts == make_prompts(trial, tokenize(HAY), tokenize)
    assert len(prompts) == len(told) == needles
    for (tokens, value), (name, expected) in zip(prompts, told.items()):
        text = bytes(tokens).decode()
        # All names have as many letters, so all prompts have the length that was asked for.
        assert value == expected and len(tokens) == context
        assert text.endswith(question(name))
        for needle in told.items():
            assert text.count(tell(*needle)) == 1
    first, number = next(iter(told.items()))
    place = text.index(tell(first, number))
    if needles == 1:
        room = context - len(tell(first, number) + question(first))
        assert place == round(room * depth / 100)


def test_alike_needles_differ_in_what_the_question_names():
    told = make_needles(Trial(4096, 50, 8, 0, True))
    adjectives, keys = zip(*told)
    assert len(set(keys)) == 1 and len(set(adjectives)) == 8
    assert len(set(told.values())) == 8
    with pytest.raises(ValueError, match="at most 8 needles can be alike"):
        make_needles(Trial(4096, 50, 9, 0, True))


def test_needles_are_what_they_were():
    """Results of other days were asked the same."""
    (needle,) = make_needles(Trial(32768, 40, 1, 2)).items()
    assert tell(*needle) == "\nThe magic number of baganona is 4252980.\n"
    assert (
        question(needle[0])
        == "\nWhat is the magic number of baganona? The magic number of baganona is"
    )


def test_mini_dsa_knows_the_words():
    """It is trained on sentences of the same form."""
    assert set(ADJECTIVES) <= set(tasks.ADJECTIVES)
    name = "winter", "bakodi"
    assert tell(name, "17") == tasks.told(*name, "17")
    assert question(name) == tasks.asked(*name)


def test_needles_that_do_not_fit():
    with pytest.raises(ValueError, match="4 needles do not fit into 200 tokens"):
        make_prompts(Trial(200, 0, 4, 0), tokenize(HAY), tokenize)


def test_summary():
    cell = {"variant": "misa", "context": 2048, "depth": 10, "needles": 2}
    answers = [cell | {"number": i, "found": [True, i < 5]} for i in range(10)]
    answers.append(cell | {"depth": 20, "number": 0, "found": [False, False]})
    first, second = summarize(answers)
    assert (first["value"], first["n"], first["depth"]) == (0.75, 20, 10)
    # The Wilson interval of 15 of 20 is 0.531 to 0.888.
    assert first["ci95"] == pytest.approx((0.888 - 0.531) / 2, abs=1e-3)
    assert (second["value"], second["n"]) == (0, 2) and second["ci95"] > 0.2


@pytest.fixture
def finder():
    """A server that finds every needle in the first half of its prompt, and counts what it was asked."""

    def answer(server, path, body):
        if path == "/tokenize":
            return {"tokens": tokenize(body["prompt"])}
        server.asked += 1
        text = bytes(body["prompt"]).decode()
        *_, adjective, _, _, key, _ = text.split()
        found = re.search(
            f"{adjective} number of {key} is (\\d+)", text[: len(text) // 2]
        )
        return {"choices": [{"text": f" {found[1]}.\n" if found else " 42"}]}

    with FakeServer(answer, asked=0) as server:
        yield server


def test_command(finder, tmp_path):
    (tmp_path / "hay.txt").write_text(HAY)
    output = tmp_path / "niah.json"
    command = [
        sys.executable,
        BENCHMARK / "niah.py",
        "--url",
        finder.url,
    ]
    command += ["--haystack", tmp_path / "hay.txt", "--output", output]
    command += "--contexts 1024 2048 --depths 0 20 80 --trials 3".split()
    both_kinds = [*command, *"--needles --alike 2".split()]
    command += ["--needles", "1"]

    subprocess.run(command, check=True)
    assert finder.asked == 18
    results = json.loads(output.read_text())
    assert {(r["context"], r["depth"]): r["value"] for r in results} == {
        (context, depth): float(depth < 50)
        for context in (1024, 2048)
        for depth in (0, 20, 80)
    }
    assert {r["variant"] for r in results} == {"dsa"} and {r["n"] for r in results} == {
        3
    }

    # Nothing is asked twice; what was not asked yet is.
    kept = output.with_suffix(".jsonl")
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:-2]))
    subprocess.run(command, check=True)
    assert finder.asked == 20
    assert json.loads(output.read_text()) == results

    # Another variant is measured beside it.
    finder.info = {
        "enable_misa": True,
        "misa": {
            "router": "pooled",
            "active_heads": 8,
            "block_size": 1024,
            "rerank_candidates": 0,
        },
    }
    subprocess.run(command, check=True)
    assert finder.asked == 38
    both = json.loads(output.read_text())
    assert both[:6] == results
    assert {(r["variant"], r["active_heads"]) for r in both[6:]} == {("misa", 8)}

    # Needles that are alike are a cell of their own.
    subprocess.run(both_kinds, check=True)
    assert finder.asked == 38 + 36
    alike = json.loads(output.read_text())
    assert alike[:12] == both and len(alike) == 18
    assert {(r["needles"], r["alike"], r["n"]) for r in alike[12:]} == {(2, True, 6)}

    (tmp_path / "hay.txt").write_text(HAY[:1500])
    failed = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert failed.returncode and "fewer than --contexts 2048" in failed.stderr
