"""From CUDA to a library: the objects of what has changed, linked with a list of what is exported."""

import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import List, Mapping, Optional, Sequence, Tuple

import tilelang
import tilelang.env

from builder import (
    FUNCTIONS,
    INCLUDE,
    LAUNCH_CHAIN,
    LIB,
    ROOT,
    Architecture,
    launches,
)

NVCC_FLAGS = ["-std=c++20", "-O3", "--compiler-options", "-fPIC"]

# The smallest library that takes all tools: nvcc, ptxas, the host's compiler and the linker with the list of exports.
PROBE = "probe"
PROBE_SOURCE = """\
#include <cuda_runtime.h>
__global__ void probe_kernel(int* out) { *out = 1; }
extern "C" int probe_call(int* out, cudaStream_t stream) {
  probe_kernel<<<1, 1, 0, stream>>>(out);
  return 0;
}
extern "C" int probe_init() { return 0; }
extern "C" const char* probe_get_last_error() { return ""; }
"""


@dataclass(frozen=True)
class Usage:
    """What ptxas says a device function takes: registers a thread, bytes of stack, bytes spilt."""

    function: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


@functools.lru_cache(maxsize=None)
def find_nvcc() -> Path:
    """nvcc from $NVCC, $CUDA_HOME, PATH or NVIDIA's packages on PyPI, in this order.

    Raises:
        RuntimeError: there is none, or the one that the environment names does not exist.
    """
    if os.environ.get("NVCC"):
        candidates = [os.environ["NVCC"]]
    elif os.environ.get("CUDA_HOME"):
        candidates = [os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc")]
    else:
        nvidia = PathFinder.find_spec("nvidia")
        packages = nvidia.submodule_search_locations if nvidia else []
        candidates = ["nvcc"] + [f"{package}/cu13/bin/nvcc" for package in packages]
    for candidate in candidates:
        found = shutil.which(candidate)
        if found:
            return Path(found).absolute()
    raise RuntimeError(
        f"nvcc is needed to compile the kernels and was not found (tried {', '.join(candidates)}). "
        f"Set NVCC or CUDA_HOME to one, or: pip install --no-deps -r {ROOT / 'build-requirements.txt'}"
    )


def prepare(folder: Path) -> None:
    """Make the folder that nvcc runs in, with links to all that a command names.

    nvcc pastes its arguments into the command lines of a shell and of the linker, not all of them quoted. Every path that
    it is given is therefore relative to this folder and plain, whatever the folder itself is called.
    """
    folder.mkdir(parents=True, exist_ok=True)
    targets = {
        "cuda": find_nvcc().parent.parent,
        "include": INCLUDE,
        "tilelang": tilelang.env.TILELANG_TEMPLATE_PATH,
        "cutlass": tilelang.env.CUTLASS_INCLUDE_DIR,
    }
    for name, target in targets.items():
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(target, target_is_directory=True)


def run_nvcc(folder: Path, *arguments: str) -> str:
    """Run nvcc in a folder that `prepare` has made.

    Returns:
        what nvcc printed.

    Raises:
        RuntimeError: nvcc failed; with its output.
    """
    nvcc = find_nvcc()
    command = [f"cuda/{nvcc.parent.name}/{nvcc.name}", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"nvcc failed in {folder}\n{shlex.join(command)}\n{done.stdout}"
        )
    return done.stdout


@functools.lru_cache(maxsize=None)
def nvcc_version(folder: Path) -> str:
    return re.search(r"\bV([\d.]+)", run_nvcc(folder, "--version")).group(1)


def compile_object(
    name: str, source: str, architecture: Architecture, folder: Path
) -> Tuple[List[Usage], str]:
    """Compile a kernel to `<folder>/<name>.o`, unless the object there was made of the same source and headers.

    Returns:
        what the device functions use, and what nvcc said (nothing if the object was there).

    Raises:
        RuntimeError: nvcc failed; with its output.
    """
    cu, obj, dep, record = (
        folder / f"{name}{suffix}" for suffix in (".cu", ".o", ".d", ".json")
    )
    command = ["-c", cu.name, "-o", obj.name, *NVCC_FLAGS, architecture.gencode]
    command += ["-Xptxas", "-v", "-MD", "-MF", dep.name]
    command += ["-I", "include", "-isystem", "tilelang", "-isystem", "cutlass"]
    # The versions stand for the headers of TileLang and CUDA; our own are hashed one by one.
    key = [
        command,
        nvcc_version(folder),
        tilelang.__version__,
        digest(source.encode()),
    ]

    if obj.exists() and record.exists():
        made = json.loads(record.read_text())
        if made["key"] == key and all(
            digest_file(folder / path) == made["headers"][path]
            for path in made["headers"]
        ):
            return [Usage(**usage) for usage in made["usage"]], ""

    cu.write_text(source)
    obj.unlink(missing_ok=True)
    record.unlink(missing_ok=True)
    output = run_nvcc(folder, *command)
    usage = parse_usage(output)
    # Our headers are those below the link; the names of others may hold anything.
    headers = {
        path: digest_file(folder / path)
        for path in re.findall(r"(?<!\S)include/\S+", dep.read_text())
    }
    record.write_text(
        json.dumps(
            {"key": key, "headers": headers, "usage": [asdict(u) for u in usage]}
        )
    )
    return usage, output


def parse_usage(text: str) -> List[Usage]:
    """What `ptxas -v` says of the entry functions."""
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return [
        Usage(function, int(registers), int(stack), int(stores), int(loads))
        for function, stack, stores, loads, registers in re.findall(
            pattern, text, re.DOTALL
        )
    ]


def compile_launches(
    arguments: Mapping[str, List[Tuple[str, str]]],
    architecture: Architecture,
    folder: Path,
) -> None:
    """Compile the functions that launch the kernels; `link` adds them."""
    compile_object(launches.NAME, launches.source(arguments), architecture, folder)


def link(
    names: Sequence[str], architecture: Architecture, folder: Path, library: Path
) -> None:
    """Link the kernels' objects and that of their launches into a library that exports their host functions and nothing else."""
    exports = folder / "exports.map"
    functions = [f"{name}_{function};" for name in names for function in FUNCTIONS]
    functions.append(f"{LAUNCH_CHAIN};")
    exports.write_text(f"{{ global: {' '.join(functions)} local: *; }};\n")
    linked = folder / library.name
    command = ["-shared", "-cudart", "static", architecture.gencode, "-o", linked.name]
    # NVIDIA's packages keep the libraries in lib, where nvcc does not look; $CUDA_HOME has them in lib64.
    command += ["-L", "cuda/lib", "-Xlinker", f"--version-script={exports.name}"]
    run_nvcc(folder, *command, *(f"{name}.o" for name in (*names, launches.NAME)))
    # In one step, so that a process that has the old library loaded keeps it.
    library.parent.mkdir(parents=True, exist_ok=True)
    staged = library.with_suffix(".new")
    shutil.copyfile(linked, staged)
    os.replace(staged, library)


def try_tools(architecture: Architecture, folder: Path) -> None:
    """Compile and link a small library and put it where the real one goes: what fails at the end fails here first.

    Raises:
        RuntimeError: nvcc cannot compile or link.
        OSError: the library cannot be put there.
    """
    compile_object(PROBE, PROBE_SOURCE, architecture, folder)
    compile_launches({PROBE: [("out", "pointer")]}, architecture, folder)
    library = LIB / f"{PROBE}.so"
    link([PROBE], architecture, folder, library)
    library.unlink()


def print_usage(label: str, usage: Mapping[str, Sequence[Usage]]) -> None:
    """Print a table of the device functions' registers, stack and spills, and a warning for those that spill."""
    rows = [row for rows in usage.values() for row in rows]
    width = max(len(row.function) for row in rows)
    print(f"{label:{width}}  registers  stack  spill stores  spill loads")
    for row in rows:
        print(
            f"{row.function:{width}}  {row.registers:9}  {row.stack:5}  {row.spill_stores:12}  {row.spill_loads:11}"
        )
    for row in rows:
        if row.spill_stores or row.spill_loads:
            print(f"warning: {row.function} spills registers", file=sys.stderr)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> Optional[str]:
    return digest(path.read_bytes()) if path.exists() else None
