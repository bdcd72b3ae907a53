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

ROOT = Path(__file__).parents[2]
QUALITY = ROOT / "benchmark" / "quality"

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.evaluation.selections import random_heads
from sglang.srt.layers.misa.testing.recall import share_of_dsa
from sglang_misa.server import misa_args, serve

CHECKPOINT = ROOT / "scripts" / "mini_dsa" / "checkpoint"
CONTEXTS = (2560, 4096)
DEPTHS = (10, 60)
TOPK, ROWS = 2048, 16
MISA = MisaConfig("pooled", block_size=1024)


@pytest.mark.parametrize(
    "variant, args",
    [
        pytest.param({"variant": "dsa", "active_heads": 0}, (), id="dsa"),
        pytest.param(
            {"variant": "misa", "active_heads": 8, "block_size": 1024},
            misa_args(MISA),
            id="misa",
        ),
    ],
)
def test_needles_are_found(variant, args, tmp_path):
    (tmp_path / "hay.txt").write_text("".join(topics.values()))
    output = tmp_path / "niah.json"
    # A record holds positions.
    env = {"SGLANG_DSA_FUSE_TOPK": "false"}
    args = (*args, "--disable-cuda-graph")
    with serve(CHECKPOINT, tmp_path, *args, env=env) as server:
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
