"""Which release of SGLang the scripts take, and where they install it."""

import shutil
import subprocess

import pytest
from environments import ROOT

from sglang.srt.layers.misa.releases import KNOWN

OLD, *_, NEW = KNOWN


@pytest.fixture
def taken(tmp_path):
    """What `scripts/release.sh` says, on a machine with a GPU or without one."""

    def take(gpu, **variables):
        (tmp_path / "sed").symlink_to(shutil.which("sed"))
        if gpu:
            (tmp_path / "nvidia-smi").touch(mode=0o755)
        script = '. scripts/release.sh; echo "$release in $venv"'
        return subprocess.run(
            [shutil.which("bash"), "-c", script],
            cwd=ROOT,
            env={"PATH": str(tmp_path), **variables},
            capture_output=True,
            text=True,
        )

    return take


@pytest.mark.parametrize("gpu, expected", [(False, NEW), (True, OLD)])
def test_default(taken, gpu, expected):
    assert taken(gpu).stdout == f"{expected} in .venv\n"


@pytest.mark.parametrize("gpu, version", [(False, OLD), (True, NEW)])
def test_the_other_one_has_an_environment_of_its_own(taken, gpu, version):
    result = taken(gpu, SGLANG_VERSION=version)
    assert result.stdout == f"{version} in .venv-{version}\n"


def test_a_release_that_is_not_known(taken):
    result = taken(False, SGLANG_VERSION="0.5.18")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == f"SGLANG_VERSION=0.5.18 is not one of {' '.join(KNOWN)}\n"
