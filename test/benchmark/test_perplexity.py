"""The perplexity runner: its windows, its arithmetic, and that it asks SGLang for what it says."""

import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from fake_server import FakeServer

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmark" / "quality"
from perplexity import summarize, window_ends

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.environment import EVAL_SELECTION
from sglang_misa.server import misa_args, serve

BOS = 300


@pytest.mark.parametrize("tokens", [160, 1000])
def test_windows(tokens):
    ends = window_ends(tokens, longest=100, scored=20, windows=4)
    assert ends[0] == 100 and ends[-1] == tokens
    assert all(later - end >= 20 for end, later in zip(ends, ends[1:]))
    assert window_ends(tokens, 100, 20, 1) == [100]


def test_a_text_that_is_too_short():
    with pytest.raises(ValueError, match="has 159 tokens, not 160"):
        window_ends(159, longest=100, scored=20, windows=4)


def test_summary():
    def answers(variant, heads, nlls):
        fields = {"active_heads": heads, "block_size": 0, "rerank_candidates": 0}
        same = {"variant": variant, **fields, "context": 64, "scored": 8, "text": "a"}
        return [same | {"end": end, "nll": nll} for end, nll in nlls.items()]

    dsa = answers("dsa", 0, {100: 1.0, 200: 2.0, 300: 3.0})
    # One window is DSA's alone, one this variant's alone.
    misa = answers("misa", 8, {400: 9.0, 200: 2.1, 300: 3.3})
    first, second, ratio = summarize(dsa + misa)
    assert first["value"] == pytest.approx(math.exp(2))
    # Student's t of two degrees of freedom, below of one.
    assert first["ci95"] == pytest.approx(math.exp(2) * 4.3026527 / 3**0.5)
    assert (first["metric"], first["n"], first["variant"]) == ("perplexity", 3, "dsa")
    assert second["value"] == pytest.approx(math.exp(mean([9, 2.1, 3.3])))
    assert ratio["value"] == pytest.approx(math.exp(0.2)) and ratio["n"] == 2
    error = 12.7062047 * math.exp(0.2) * stdev([0.1, 0.3]) / 2**0.5
    assert ratio["ci95"] == pytest.approx(error)
    assert (ratio["metric"], ratio["active_heads"]) == ("perplexity_ratio", 8)
    # Another text has other windows.
    _, _ = summarize(dsa + [answer | {"text": "b"} for answer in misa])


def logprob(tokens, i, worse):
    """The fake model's: that of the token by itself, better with a longer context, worse in some servers."""
    return -(tokens[i] % 7) - 100 / len(tokens) - worse


@pytest.fixture
def scorer():
    def answer(server, path, body):
        if path == "/tokenize":
            special = [BOS] * body["add_special_tokens"]
            return {"tokens": special + list(body["prompt"].encode())}
        assert path == "/generate" and body["return_logprob"]
        ids, start = body["input_ids"], body["logprob_start_len"]
        server.asked.append(ids)
        worse = 0.5 * bool(server.info.get("enable_misa"))
        rows = [[None, ids[start], None]]
        for i in range(start + 1, len(ids)):
            rows.append([logprob(ids, i, worse), ids[i], None])
        new_tokens = body["sampling_params"]["max_new_tokens"]
        meta_info = {"input_token_logprobs": rows}
        if new_tokens > 1:  # else there is no step in which drafts could be taken
            meta_info["spec_accept_length"] = new_tokens / len(ids)
        return {"meta_info": meta_info}

    with FakeServer(answer, asked=[]) as server:
        yield server


def test_command(scorer, tmp_path):
    text, output = (ROOT / "LICENSE").read_bytes(), tmp_path / "perplexity.json"
    command = [sys.executable, BENCHMARK / "perplexity.py", "--url", scorer.url]
    command += ["--text", ROOT / "LICENSE", "--output", output]
    command += "--contexts 512 1024 --scored 100 --windows 5".split()
    subprocess.run(command, check=True)
    assert len(scorer.asked) == 10
    ends = window_ends(len(text), 1023, 100, 5)
    results = json.loads(output.read_text())
    for context, result in zip((512, 1024), results):
        windows = [[BOS, *text[end - context + 1 : end]] for end in ends]
        assert sorted(windows) == sorted(x for x in scorer.asked if len(x) == context)
        nlls = [
            -mean(logprob(window, i, 0) for i in range(context - 100, context))
            for window in windows
        ]
        assert result["value"] == pytest.approx(math.exp(mean(nlls)))
        assert (result["context"], result["n"], result["variant"]) == (
            context,
            5,
            "dsa",
        )
    assert results[1]["value"] < results[0]["value"] and len(results) == 2

    # Nothing is asked twice; what was not asked yet is.
    kept = output.with_suffix(".jsonl")
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:-2]))
    subprocess.run(command, check=True)
    assert len(scorer.asked) == 12
    assert json.loads(output.read_text()) == results

    # Another variant gets the same windows, and is compared window by window.
    scorer.info = {
        "enable_misa": True,
        "misa": {
            "router": "pooled",
            "active_heads": 8,
            "block_size": 1024,
            "rerank_candidates": 0,
        },
    }
    subprocess.run(command, check=True)
    assert sorted(scorer.asked[12:]) == sorted(scorer.asked[:10])
    ratios = [
        r
        for r in json.loads(output.read_text())
        if r["metric"] == "perplexity_ratio" and r["variant"] == "misa"
    ]
    assert len(ratios) == 2
    for ratio in ratios:
        # The windows differ much, and all in the same way.
        assert ratio["value"] == pytest.approx(math.exp(0.5))
        assert ratio["ci95"] < 1e-9

    for options, message in (
        ("--windows 500", "LICENSE: the text has"),
        ("--scored 512", "every context has to be longer"),
    ):
        failed = subprocess.run(
            [*command, *options.split()], stderr=subprocess.PIPE, text=True
        )
        assert failed.returncode and message in failed.stderr


def test_what_drafts_are_worth(scorer, tmp_path):
    output = tmp_path / "perplexity.json"
    command = [sys.executable, BENCHMARK / "perplexity.py", "--url", scorer.url]
    command += ["--text", ROOT / "LICENSE", "--output", output]
    command += "--contexts 512 1024 --scored 100 --windows 2".split()
    subprocess.run(command, check=True)
    without = json.loads(output.read_text())

    command += "--new-tokens 64".split()
    failed = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert failed.returncode and "the server drafts nothing" in failed.stderr

    # Answers without new tokens do not count as such with them; the perplexity is the same.
    scorer.info = {"speculative_num_draft_tokens": 4}
    for _ in range(2):
        subprocess.run(command, check=True)
        assert len(scorer.asked) == 8
    results = json.loads(output.read_text())
    assert results[:2] == without
    drafted = {"metric": "accept_length", "drafts": 3, "new_tokens": 64, "n": 2}
    for context, result in zip((512, 1024), results[2:], strict=True):
        assert result | drafted | {"context": context} == result
        assert result["value"] == 64 / context and result["ci95"] == 0


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="its index_topk is the CPU engine's alone"
)
def test_a_server(tiny_model, tmp_path):
    """SGLang's own API scores the tokens that are asked for, with the context that is asked for; and selects as it is to.

    Its processes are spawned, as on a GPU, so that each reads what is to select.
    """
    from sglang_cpu_engine.launch import SPAWNS

    output, scored, context, topk = tmp_path / "perplexity.json", 60, 700, 256
    text = (ROOT / "LICENSE").read_bytes()
    with serve(
        tiny_model("deepseek_v32", 2, topk),
        tmp_path,
        *misa_args(MisaConfig(active_heads=4, decode="misa")),
        *("--chunked-prefill-size", "512"),
        env={EVAL_SELECTION: "heaviest-heads", **SPAWNS},
    ) as server:
        command = [sys.executable, BENCHMARK / "perplexity.py", "--url", server.url]
        command += ["--text", ROOT / "LICENSE", "--output", output]
        command += f"--contexts {context} --scored {scored} --windows 2".split()
        subprocess.run(command, check=True)
        nlls = []
        for end in window_ends(len(text), context, scored, 2):
            window = list(text[end - context : end])
            answer = server.generate(
                window, 3, return_logprob=True, logprob_start_len=0
            )
            rows = answer["meta_info"]["input_token_logprobs"][-scored:]
            nlls.append(-mean(row[0] for row in rows))
        records, log = server.records(), server.log.read_text()
    (result,) = json.loads(output.read_text())
    assert result["value"] == pytest.approx(math.exp(mean(nlls)), rel=1e-3)
    assert (result["variant"], result["active_heads"]) == ("heaviest-heads", 4)
    assert max(record["lengths"].max() for record in records) >= context
    # The server did select so: by the same heads throughout a layer, and not by those of another. A prompt of a server's own
    # is so short that all of it is selected, by whichever heads.
    long = [record for record in records if record["lengths"].max() > topk]
    chosen = [
        torch.cat([r["heads"] for r in long if r["layer_id"] == layer]).unique(dim=0)
        for layer in range(2)
    ]
    assert chosen[0].shape == chosen[1].shape == (1, 4)
    assert not torch.equal(*chosen)
    # Prefill in chunks, and decode, select what the reference does by those heads.
    assert "MISA is NOT what selects" in log and f"{EVAL_SELECTION}=heaviest" in log
    assert "MISA is on" not in log
    assert {512, 188, 1} <= {len(record["q"]) for record in records}
    for record in records:
        q, weights, lengths, heads, positions = (
            record[name][::16]
            for name in ("q", "weights", "lengths", "heads", "positions")
        )
        scored = reference.of_heads(q, weights, heads.long())
        wanted = reference.dsa(*scored, record["k"], record["k_scale"], lengths, topk)
        assert torch.equal(positions.long(), wanted)
