import shutil
from pathlib import Path

import pytest
from environments import ROOT, VERSION, Environment, build

# SGLang's layout: `sglang` is a package, `sglang.srt` and `sglang.srt.layers` are folders without an __init__.py.
STAND_IN = {
    "sglang/__init__.py": "from sglang.version import __version__\n",
    "sglang/version.py": '__version__ = "0.5.17"\n',
    "sglang/srt/server_args.py": "class ServerArgs: ...\n",
    "sglang/srt/layers/dense.py": "WIDTH = 64\n",
}
STAND_IN_PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "sglang"
version = "0.5.17"
[tool.setuptools.packages.find]
where = ["{where}"]
"""


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the package is built from, since building writes beside it."""
    folder = tmp_path_factory.mktemp("checkout") / "misa"
    ignore = shutil.ignore_patterns("*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "python", folder / "python", ignore=ignore)
    for file in ROOT.iterdir():
        if file.is_file() and file.name != ".git":
            shutil.copy(file, folder)
    (folder / VERSION).parent.mkdir(parents=True)
    shutil.copy(ROOT / VERSION, folder / VERSION)
    return folder


@pytest.fixture(scope="session")
def misa(checkout, tmp_path_factory) -> dict[str, Path]:
    """sglang-misa as a wheel and as what `pip install -e` installs."""
    out = tmp_path_factory.mktemp("misa")
    return {
        "wheel": build(checkout, out / "wheel", "build_wheel"),
        "editable": build(checkout, out / "editable", "build_editable"),
    }


@pytest.fixture(scope="session")
def sglang(tmp_path_factory) -> dict[str, Path]:
    """A small stand-in for SGLang as a wheel, and editable by a path in a .pth file and by setuptools' finder."""
    sources = tmp_path_factory.mktemp("sglang")
    for where in ("src", "."):
        for name, text in STAND_IN.items():
            file = sources / f"in {where}" / where / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        project = STAND_IN_PROJECT.format(where=where)
        (sources / f"in {where}" / "pyproject.toml").write_text(project)
    out = sources / "out"
    return {
        "wheel": build(sources / "in src", out / "wheel", "build_wheel"),
        "path": build(sources / "in src", out / "path", "build_editable"),
        "finder": build(sources / "in .", out / "finder", "build_editable"),
    }
