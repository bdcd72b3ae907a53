"""Installed, but without --enable-misa: all is as if the plugin were not there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_misa.server import serve, server_env, tokens

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a program and a server of the CPU engine"
)


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
    # Names of this run, and measurements.
    *("random_seed", "port", "nccl_port", "internal_states", "startup_time"),
}


def test_server(tiny_model, tmp_path):
    """The same outputs, information and metrics."""
    seen = []
    for name, plugins in (("installed", None), ("without", "cpu_engine")):
        with serve(
            tiny_model("deepseek_v32", 2, 256),
            tmp_path / name,
            *("--enable-metrics", "--random-seed", "1"),
            env={"SGLANG_PLUGINS": plugins} if plugins else {},
        ) as server:
            answer = server.generate(tokens(700), 8)
            seen.append((answer["output_ids"], server.info, server.metrics()))
    (outputs, info, metrics), (outputs_without, info_without, metrics_without) = seen
    assert outputs == outputs_without
    assert info.keys() == info_without.keys()
    differ = {name for name in info if info[name] != info_without[name]}
    assert differ <= VOLATILE
    assert metrics.keys() == metrics_without.keys()
