"""The build of the kernels, which needs no GPU: where it runs, and what it tries first."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

tilelang = pytest.importorskip("tilelang", reason="the kernels are built with TileLang")

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "sgl-kernel-misa"
PARTS = shutil.ignore_patterns("build", "lib", "*.egg-info", "__pycache__")
SMALL = "update_pooled_keys_int32"


def find_nvcc() -> Path:
    sys.path.insert(0, str(SOURCES))
    try:
        from build_kernels import find_nvcc
    finally:
        sys.path.remove(str(SOURCES))
    return find_nvcc()


def build(sources: Path, *options: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "build_kernels.py", *options],
        cwd=sources,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_in_a_folder_with_a_space_and_quotes(tmp_path):
    """The sources, the headers of TileLang and nvcc all lie in such a folder, as where .venv is in the checkout."""
    folder = tmp_path / 'it\'s a "folder"'
    sources = folder / "sgl-kernel-misa"
    shutil.copytree(SOURCES, sources, ignore=PARTS)
    packages = folder / "packages"
    packages.mkdir()
    for package in Path(tilelang.__file__).parent.parent.glob("tilelang*"):
        (packages / package.name).symlink_to(package)
    (folder / "cuda").symlink_to(find_nvcc().parent.parent)
    nvcc = folder / "cuda" / "bin" / "nvcc"

    done = build(sources, "--only", SMALL, NVCC=str(nvcc), PYTHONPATH=str(packages))
    assert done.returncode == 0, done.stdout

    lib = sources / "python" / "sgl_kernel_misa" / "lib"
    assert sorted(path.name for path in lib.iterdir()) == ["manifest.json", "sm90a.so"]
    assert list(
        json.loads((lib / "manifest.json").read_text())["sm90a"]["kernels"]
    ) == [SMALL]
    library = ctypes.CDLL(str(lib / "sm90a.so"))
    for function in ("call", "init", "get_last_error"):
        assert getattr(library, f"{SMALL}_{function}")
    with pytest.raises(AttributeError):
        library.call


def test_the_linker_is_tried_before_the_kernels_are_compiled(tmp_path):
    sources = tmp_path / "sgl-kernel-misa"
    shutil.copytree(SOURCES, sources, ignore=PARTS)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    log = tmp_path / "log"
    nvcc.write_text(f"""#!/bin/sh
echo "$@" >> '{log}'
case "$*" in *-shared*) echo "cannot link"; exit 1;; esac
exec '{find_nvcc()}' "$@"
""")
    nvcc.chmod(0o755)

    done = build(sources, NVCC=str(nvcc))
    assert done.returncode != 0 and "cannot link" in done.stdout, done.stdout
    compiled = [line for line in log.read_text().splitlines() if "-c " in line]
    assert len(compiled) == 1 and "probe.cu" in compiled[0], compiled
