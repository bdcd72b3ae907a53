"""What an installed SGLang has otherwise than MISA takes it: the first step of a port to a new release.

    SGLANG_USE_CPU_ENGINE=1 TORCHDYNAMO_DISABLE=1 python scripts/check_sglang.py [--as 0.5.23]

In an environment with that SGLang and this repository (`pip install --no-deps -e .`), it holds the table of hooks of a known
release, by default the newest, against it, and all that the layer imports from SGLang or reads of its metadata. It prints what
is gone and what takes other parameters, a line each, and fails where there is any.
"""

import argparse
import ast
import inspect
import os
import pkgutil
import sys
from pathlib import Path
from typing import Iterator, List, Tuple

# The table is only read here: hooks would stand before the functions whose parameters count.
os.environ["SGLANG_PLUGINS"] = "none"

from sglang.srt.layers.misa import patches, releases
from sglang.srt.layers.misa.patching import Patch
from sglang.version import __version__

PACKAGE = "sglang.srt.layers.misa"
METADATA = "sglang.srt.layers.attention.dsa.dsa_indexer_metadata.DSAIndexerMetadata"
# What the layer reads of objects that SGLang hands it, with the parameters behind `self`; None for what is no function.
READS = {
    f"{METADATA}.get_page_table_64": "",
    f"{METADATA}.get_seqlens_expanded": "",
    f"{METADATA}.get_seqlens_int32": "",
    f"{METADATA}.get_dsa_extend_len_cpu": "",
    f"{METADATA}.get_indexer_seq_len_cpu": "",
    f"{METADATA}.force_unfused_topk": None,
    "sglang.srt.mem_cache.memory_pool.DSATokenToKVPool.get_index_k_with_scale_buffer": "layer_id",
    "sglang.srt.distributed.parallel_state.GroupCoordinator.all_gather": "input_, dim, output_tensor_list",
}


def hooks(table: Tuple[Patch, ...]) -> Iterator[str]:
    """What is otherwise of the targets of hooks."""
    for patch in table:
        if patch.gone():
            yield f"gone      {patch.target}"
        elif found := patch.unlike():
            yield f"signature {patch.target}({found}), not ({patch.parameters})"


def reads() -> Iterator[str]:
    """What is otherwise of `READS`."""
    for name, wanted in READS.items():
        try:
            value = pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            yield f"gone      {name}"
            continue
        if wanted is not None:
            _, *parameters = inspect.signature(value).parameters
            if (found := ", ".join(parameters)) != wanted:
                yield f"signature {name}({found}), not ({wanted})"


def imports(version: str) -> Iterator[str]:
    """What the layer imports from SGLang and is gone; of the modules of releases, that of `version` only."""
    root = Path(releases.__file__).parents[1]
    others = {x for y, x in releases.MODULES.items() if y != version}
    for path in sorted(root.rglob("*.py")):
        if path.stem in others:
            continue
        for module, name in imported(path.read_text()):
            try:
                pkgutil.resolve_name(f"{module}:{name}")
            except (ImportError, AttributeError) as error:
                yield f"gone      {module}.{name} ({error}), imported by {path.relative_to(root)}"


def imported(source: str) -> List[Tuple[str, str]]:
    """The names that a module imports from SGLang when it is imported, or when a function of it runs; not for types only."""
    tree = ast.parse(source)
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    return [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and id(node) not in for_types
        for alias in node.names
        if node.module.startswith("sglang.") and not node.module.startswith(PACKAGE)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--as",
        dest="version",
        choices=releases.KNOWN,
        default=releases.closest(__version__),
        help="the release whose hooks it is to have",
    )
    version = parser.parse_args().version
    found = [
        *hooks(patches.of_release(version)),
        *reads(),
        *imports(version),
    ]
    print(f"SGLang {__version__} as {version}: {len(found)} differences")
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
