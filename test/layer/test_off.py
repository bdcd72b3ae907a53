"""Installed, but without --enable-misa: all is as if the plugin were not there. With all heads MISA selects the same."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checks import check_records, selections

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.config import MisaConfig
from sglang_misa.server import misa_args, serve, server_env, tokens

pytestmark = [
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="a program and a server of the CPU engine"
    ),
    # One worker: the program and the server without MISA run once.
    pytest.mark.xdist_group("off"),
]


@pytest.fixture(scope="module")
def cases():
    """(another plugin that replaces ServerArgs, whether MISA is installed) -> what the program sees."""
    program = Path(__file__).with_name("off_program.py")
    result = subprocess.run(
        [sys.executable, str(program)],
        env=server_env(),
        capture_output=True,
        text=True,
    )
    lines = [x for x in result.stdout.splitlines() if x.startswith("[")]
    assert len(lines) == 6, result.stderr[-3000:]
    return {(other, misa): found for other, misa, found in map(json.loads, lines)}


@pytest.mark.parametrize("other", ["none", "before", "after"])
def test_arguments_of_a_program(cases, other):
    without, installed = cases[other, False], cases[other, True]
    for name, expected in without.items():
        assert installed[name] == expected, name
    if other == "none":
        # Nothing fails, and what is spawned is what is pickled.
        assert all(isinstance(without[name], list) for name in without if ", " in name)
        for name in ("before", "after"):
            assert installed[f"{name}, spawned"] == installed[f"{name}, pickled"]


VOLATILE = {
    # Names of this run, and measurements. The command has the ports in it.
    *("random_seed", "port", "nccl_port", "launch_command"),
    *("internal_states", "startup_time"),
}

LAYERS, TOPK = 2, 256
PROMPT, NEW_TOKENS = 600, 12


@contextmanager
def served(tiny_model, folder, *args, **options):
    model = tiny_model("deepseek_v32", LAYERS, TOPK)
    args = "--enable-metrics", "--random-seed", "1", *args
    with serve(model, folder, *args, **options) as server:
        yield server


def facts(server):
    """What a server puts out, and what it says of itself."""
    answer = server.generate(tokens(700), 8)
    # A metric is there once its process has set it, which may be after the answer.
    names = set()
    while names != (names := set(server.metrics())):
        time.sleep(2)
    return answer["output_ids"], server.info, names


def chosen(server):
    """The output tokens of a prompt, the records, and the positions selected, in ascending order."""
    server.reset()
    answer, records = server.generate(tokens(PROMPT), NEW_TOKENS), server.records()
    positions = selections(records, 1, PROMPT + NEW_TOKENS - 1)
    return answer["output_ids"], records, positions.sort(dim=2).values


@pytest.fixture(scope="module")
def installed(tiny_model, tmp_path_factory):
    """`facts` and `chosen` of a server with the plugin, without --enable-misa."""
    with served(tiny_model, tmp_path_factory.mktemp("installed")) as server:
        return facts(server), chosen(server)


def test_server(installed, tiny_model, tmp_path):
    """The same outputs, information and metrics as without the plugin."""
    env = {"SGLANG_PLUGINS": "cpu_engine"}
    with served(tiny_model, tmp_path, env=env) as server:
        outputs_without, info_without, metrics_without = facts(server)
    outputs, info, metrics = installed[0]
    assert outputs == outputs_without
    assert info.keys() == info_without.keys()
    differ = {name for name in info if info[name] != info_without[name]}
    assert differ <= VOLATILE
    assert metrics == metrics_without


def test_all_heads_are_dsa(installed, tiny_model, tmp_path):
    """--misa-active-heads H: SGLang's own selections and output tokens."""
    config = MisaConfig("sampled", 64, decode="misa")
    with served(tiny_model, tmp_path, *misa_args(config)) as server:
        outputs, records, misa_positions = chosen(server)
    dsa_outputs, _, dsa_positions = installed[1]
    check_records(records, config, TOPK)
    assert outputs == dsa_outputs
    for record in records:
        scores = reference.token_scores(
            *(record[name] for name in ("q", "weights", "k", "k_scale"))
        )
        for length, row in zip(record["lengths"].tolist(), scores):
            if length >= PROMPT + NEW_TOKENS:
                continue
            dsa, misa = (
                rows[record["layer_id"], length - 1].long()
                for rows in (dsa_positions, misa_positions)
            )
            # The same tokens, or others of equal score.
            assert torch.equal(dsa >= 0, misa >= 0)
            dsa, misa = (row[x[x >= 0]].sort().values for x in (dsa, misa))
            assert torch.equal(dsa, misa)
