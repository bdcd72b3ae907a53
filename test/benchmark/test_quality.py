"""With trained weights: mini-DSA finds what a long text has told it, through a server, and MISA selects much like DSA.

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
from houses import run_lm_eval, write_data, write_table

ROOT = Path(__file__).parents[2]
QUALITY = ROOT / "benchmark" / "quality"

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.evaluation.selections import random_heads
from sglang.srt.layers.misa.testing.recall import share_of_dsa
from sglang_misa.server import misa_args, serve

CHECKPOINT = ROOT / "scripts" / "mini_dsa" / "checkpoint"
CONTEXTS = (4096,)
DEPTHS = (10, 60)
TOPK, ROWS = 2048, 16
MISA = MisaConfig("pooled", block_size=1024)
# What a result says of a server, and the arguments of that.
VARIANTS = {
    "dsa": ({"variant": "dsa", "active_heads": 0}, ()),
    "misa": (
        {"variant": "misa", "active_heads": 8, "block_size": 1024},
        misa_args(MISA),
    ),
}


# One worker runs all the tests of a server.
SERVERS = {
    name: pytest.param(name, marks=pytest.mark.xdist_group(f"mini-dsa-{name}"))
    for name in VARIANTS
}


@pytest.fixture(scope="module", params=SERVERS.values())
def server(request, tmp_path_factory):
    _, args = VARIANTS[request.param]
    # A record holds positions.
    env = {"SGLANG_DSA_FUSE_TOPK": "false"}
    folder = tmp_path_factory.mktemp("server")
    with serve(CHECKPOINT, folder, *args, "--disable-cuda-graph", env=env) as running:
        running.name = request.param
        yield running


def test_needles_are_found(server, tmp_path):
    variant, _ = VARIANTS[server.name]
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
        if len(record["q"]) > 1
    )
    share = share_of_dsa(record, TOPK, ROWS)
    q, weights, lengths = (record[name][-ROWS:] for name in ("q", "weights", "lengths"))
    heads = random_heads(lengths, q.shape[1], MISA.active_heads)
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


@pytest.mark.parametrize("server", [SERVERS["misa"]], indirect=True)
def test_lm_eval(server, tmp_path):
    """SGLang's own API: every task gets a number, 0 for what mini-DSA was not trained on."""
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
    named = VARIANTS["misa"][0] | {"n": 1, "ci95": None}
    assert all(r | named == r for r in results)
    *zeros, squad = (r["value"] for r in results)
    # One of three colours can be right by chance.
    assert zeros == [0, 0, 0] and squad in (0, 1)
    table = write_table(output)
    assert "| | DSA | HISA | MISA h 8, B 1024 | hierarchical MISA |" in table
    assert "| ruler_fwe | - | - | 0.0 | - |" in table
