"""With trained weights: mini-DSA finds what a long text has told it, through a server, and MISA selects much like DSA; both families.

The reduced version of what `docs/quality.md` reports. Prompts are as long as a CPU allows for: beyond the 2048 tokens that are
selected, so that a selection which loses the needle loses the answer.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from houses import run_lm_eval, write_data, write_table

ROOT = Path(__file__).parents[2]
QUALITY = ROOT / "benchmark" / "quality"

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.evaluation.selections import random_heads
from sglang.srt.layers.misa.testing.recall import share_of_dsa
from sglang_misa.server import chain, misa_args, serve

CHECKPOINTS = ROOT / "scripts" / "mini_dsa"
CONTEXTS = (4096,)
DEPTHS = (10,)
TOPK, ROWS = 2048, 16
DRAFTS = 3
POOLED = MisaConfig("pooled", block_size=1024)
# The default on a CPU re-ranks as many candidates as these prompts have tokens.
SHARED = MisaConfig()
# Each server's checkpoint, what a result says of it, and its arguments. The last one drafts with the NextN layer too.
VARIANTS = {
    "dsa": ("checkpoint", {"variant": "dsa", "active_heads": 0}, ()),
    "misa": (
        "checkpoint",
        {"variant": "misa", "active_heads": 8, "block_size": 1024},
        misa_args(POOLED),
    ),
    "glm": (
        "checkpoint-glm",
        {"variant": "misa", "active_heads": 8, "block_size": 0, "router": "sampled"},
        (*misa_args(SHARED), *chain(DRAFTS)),
    ),
}


# One worker runs all the tests of a server.
SERVERS = {
    name: pytest.param(name, marks=pytest.mark.xdist_group(f"mini-dsa-{name}"))
    for name in VARIANTS
}


@pytest.fixture(scope="module", params=SERVERS.values())
def server(request, tmp_path_factory):
    name, _, args = VARIANTS[request.param]
    # A record holds positions.
    env = {"SGLANG_DSA_FUSE_TOPK": "false"}
    folder, checkpoint = tmp_path_factory.mktemp("server"), CHECKPOINTS / name
    if torch.cuda.is_available() and "--speculative-algorithm" in args:
        wide = folder / "wide"
        command = [sys.executable, "-m", "mini_dsa.widen", checkpoint, wide]
        subprocess.run(command, cwd=CHECKPOINTS.parent, check=True)
        checkpoint = wide
    with serve(checkpoint, folder, *args, "--disable-cuda-graph", env=env) as running:
        running.name = request.param
        yield running


def test_needles_are_found(server, tmp_path):
    _, variant, _ = VARIANTS[server.name]
    (tmp_path / "hay.txt").write_text("".join(topics.values()))
    output = tmp_path / "niah.json"
    server.reset()
    command = [sys.executable, QUALITY / "niah.py"]
    command += ["--url", server.url, "--haystack", tmp_path / "hay.txt"]
    command += ["--output", output, "--needles", "2", "--trials", "1"]
    command += ["--parallel", "1", "--contexts", *map(str, CONTEXTS)]
    subprocess.run([*command, "--depths", *map(str, DEPTHS)], check=True)
    records = server.records()
    results = json.loads(output.read_text())
    expected = variant | {"metric": "niah", "value": 1, "n": 2}
    for result in results:
        assert result | expected == result
    cells = {(result["context"], result["depth"]) for result in results}
    assert cells == set(itertools.product(CONTEXTS, DEPTHS))

    # The last rows of the longest prompt, in the last layer.
    *_, record = (
        record
        for record in records
        if record["layer_id"] == 3 and len(record["k"]) >= CONTEXTS[-1] - 1
        if len(record["q"]) > 1 and not record["draft"] and not record["decode"]
    )
    share = share_of_dsa(record, TOPK, ROWS)
    q, weights, lengths = (record[name][-ROWS:] for name in ("q", "weights", "lengths"))
    heads = random_heads(lengths, q.shape[1], POOLED.active_heads)
    by_chance = reference.dsa(
        *reference.of_heads(q, weights, heads),
        *(record["k"], record["k_scale"], lengths, TOPK),
    )
    control = share_of_dsa(record, TOPK, ROWS, by_chance)
    print(f"recall {share:.3f}, of heads by chance {control:.3f}")
    if variant["variant"] == "dsa":
        assert share > 0.999
    else:
        assert share > 0.85 and share > control + 0.05


@pytest.mark.parametrize("server", [SERVERS["glm"]], indirect=True)
def test_drafts_are_taken(server, tmp_path):
    """Trained, the NextN layer drafts what the model says next, as a layer of random weights does not."""
    output = tmp_path / "perplexity.json"
    (tmp_path / "text.txt").write_text("".join(topics.values()))
    command = [sys.executable, QUALITY / "perplexity.py", "--url", server.url]
    command += ["--text", tmp_path / "text.txt", "--output", output]
    command += "--contexts 512 --scored 256 --windows 2 --new-tokens 64".split()
    subprocess.run(command, check=True)
    perplexity, drafted = json.loads(output.read_text())
    assert (drafted["metric"], drafted["drafts"]) == ("accept_length", DRAFTS)
    # Of at most 4 tokens a step; 1 is the model's own. Untrained, the perplexity would be 256.
    assert drafted["value"] > 1.7 and perplexity["value"] < 4


@pytest.mark.parametrize("server", [SERVERS["misa"]], indirect=True)
def test_lm_eval(server, tmp_path):
    """SGLang's own API: every task gets a number, next to none for what mini-DSA was not trained on."""
    output = tmp_path / "result.json"
    arguments = (
        "--tasks ruler_fwe ruler_qa_squad longbench_hotpotqa longbench_trec "
        "--lengths 2560 --limit 1"
    )
    data_dir = write_data(tmp_path / "data")
    server.reset()
    run_lm_eval(server, output, data_dir, arguments, check=True)
    longest = max(record["lengths"].max() for record in server.records())
    results = json.loads(output.read_text())
    assert 2048 < longest <= 2560 + 50
    assert [r["task"] for r in results] == [
        "longbench_hotpotqa",
        "longbench_trec",
        "ruler_fwe",
        "ruler_qa_squad",
    ]
    # One answer has no standard error.
    named = VARIANTS["misa"][1] | {"n": 1, "ci95": None}
    assert all(r | named == r for r in results)
    *zeros, words, squad = (r["value"] for r in results)
    # One of three words can be right by chance, and one of three colours.
    assert zeros == [0, 0] and words in (0, 1 / 3) and squad in (0, 1)
    table = write_table(output)
    assert "| | DSA | HISA | MISA h 8, B 1024 | hierarchical MISA |" in table
    assert f"| ruler_fwe | - | - | {100 * words:.1f} | - |" in table
