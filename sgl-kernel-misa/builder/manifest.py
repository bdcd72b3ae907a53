"""What a library holds and what it was made of."""

import json
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Tuple

import tilelang

from builder import INCLUDE, LIB, ROOT, Architecture
from builder.compile import digest, digest_file, nvcc_version


def entry(
    library: Path,
    architecture: Architecture,
    folder: Path,
    arguments: Mapping[str, List[Tuple[str, str]]],
) -> Dict[str, Any]:
    """The manifest's entry of a library.

    Args:
        folder: where nvcc ran.
        arguments: those of every kernel, as of `builder.generate.Generated`.
    """
    return {
        "library": library.name,
        "capability": architecture.capability,
        "tilelang": tilelang.__version__,
        "nvcc": nvcc_version(folder),
        "sources": sources_digest(),
        "kernels": arguments,
    }


def sources_digest() -> str:
    """A hash of all that a library is made of: it is up to date if its manifest has the same."""
    files = [
        *(ROOT / "builder").rglob("*.py"),
        *(ROOT / "misa_kernels").rglob("*.py"),
        *INCLUDE.rglob("*.cuh"),
        *INCLUDE.rglob("*.h"),
        LIB.parent / "constants.py",
    ]
    lines = [
        f"{path.relative_to(ROOT).as_posix()} {digest_file(path)}" for path in files
    ]
    return digest("\n".join(sorted(lines)).encode())


def to_json(manifest: Mapping) -> str:
    """JSON with an argument a line, so that a change of the ABI is easy to see."""
    text = json.dumps(manifest, indent=2)
    return re.sub(r"\[\s+([^\[\]]*?),\s+([^\[\]]*?)\s+\]", r"[\1, \2]", text) + "\n"
