"""The selections of decode, re-rank, prefill and routing, compiled for the CPU: right for any bits, also where there is no GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest

EMULATOR = Path(__file__).parent / "emulator"
INCLUDE = Path(__file__).parents[2] / "sgl-kernel-misa" / "include"


@pytest.fixture(scope="module")
def selections(tmp_path_factory):
    """The compiled program. Headers are found beside those that include them, so the emulator's cluster.cuh lies there."""
    folder = tmp_path_factory.mktemp("emulator")
    for source in (*INCLUDE.glob("*.cuh"), *EMULATOR.iterdir()):
        shutil.copy(source, folder)
    program = folder / "selections"
    # Pragmas and attributes of CUDA are nothing to g++.
    flags = ["-std=c++20", "-O2", "-w", "-o", program]
    subprocess.run(["g++", *flags, folder / "selections.cpp"], check=True)
    return program


def test_selections(selections):
    # As many rows as there are kinds: every selection sees each kind. The first number is a seed.
    command = [selections, "0", "21"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
