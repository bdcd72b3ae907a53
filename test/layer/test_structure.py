"""What imports what in the layer, and what can be imported at all."""

import ast
import graphlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sglang.srt.layers.misa as misa
from sglang_misa.server import server_env

ROOT = Path(misa.__file__).parent
CHECKOUT = Path(__file__).parents[2]
PACKAGE = "sglang.srt.layers.misa"


def imports(name: str, source: str, modules) -> set:
    """Those of `modules` that module `name` imports, wherever in its source, also where it is for types only."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            names = [node.module, *(f"{node.module}.{x.name}" for x in node.names)]
        else:
            continue
        for imported in names:
            # A module's package is imported with it.
            found |= {imported, imported.rpartition(".")[0]} & modules
    # Its own package is there before it.
    return found - {name, name.rpartition(".")[0], PACKAGE}


def graph_of_layer():
    sources = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join((PACKAGE, *parts)).removesuffix(".__init__")
        sources[name] = path.read_text()
    return {x: imports(x, source, sources.keys()) for x, source in sources.items()}


def test_no_import_cycle():
    graph = graph_of_layer()
    assert graph[f"{PACKAGE}.hooks"] > {f"{PACKAGE}.indexer", f"{PACKAGE}.batch"}
    # A CycleError names the cycle.
    list(graphlib.TopologicalSorter(graph).static_order())
    assert not graph[f"{PACKAGE}.environment"] | graph[f"{PACKAGE}.process"]


def test_an_import_in_a_function_closes_a_cycle():
    graph = graph_of_layer()
    source = f"def f():\n    from {PACKAGE} import patches\n"
    name = f"{PACKAGE}.server_args"
    graph[name] = graph[name] | imports(name, source, graph.keys())
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(graph).static_order())


def test_no_path_is_edited():
    """Packages are installed or named in pyproject.toml. A build alone has neither: the kernels' setup.py finds what builds.

    And a server that is forked for a test drops the path of the tests.
    """
    folders = "benchmark", "python", "scripts", "sgl-kernel-misa", "test"
    edits = {
        path.relative_to(CHECKOUT).as_posix()
        for folder in folders
        for path in (CHECKOUT / folder).rglob("*.py")
        if re.search(r"sys\.path\b", path.read_text())
    }
    engine = "test/cpu_engine/src/sglang_cpu_engine"
    assert edits == {"sgl-kernel-misa/setup.py", f"{engine}/preloaded.py"}


def test_nothing_here_is_taken_for_the_package_of_the_hugging_face_hub():
    """Transformers uses whatever is importable as `kernels`, a folder of tests included."""
    spec = importlib.util.find_spec("kernels")
    assert spec is None or "site-packages" in (spec.origin or "")


PROGRAM = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
prepare_server_args(["--model-path", "dummy"])
print("LOADED", *sys.modules)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a program of the CPU engine")
def test_what_a_server_without_misa_imports():
    """Neither the operations, nor the kernels, nor the evaluation."""
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, env=server_env(), capture_output=True, text=True)
    (line,) = [x for x in result.stdout.splitlines() if x.startswith("LOADED")]
    loaded = line.split()
    assert f"{PACKAGE}.hooks" in loaded, result.stderr[-3000:]
    for name in (
        f"{PACKAGE}.torch_operations",
        f"{PACKAGE}.evaluation.hooks",
        f"{PACKAGE}.evaluation.capture",
        "sgl_kernel_misa",
    ):
        assert name not in loaded
