"""Compiles the TileLang kernels into one shared library per architecture: python build_kernels.py --help

Every entry of `kernels.KERNELS` is lowered to CUDA, wrapped in a host function with a C ABI, compiled with nvcc and
linked into `python/sgl_kernel_misa/lib/<architecture>.so`. `manifest.json` beside it says what the library holds. No GPU
is needed here, and neither TileLang nor nvcc where the library is loaded.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

ROOT = Path(__file__).resolve().parent
INCLUDE = ROOT / "include"
BUILD = ROOT / "build" / "kernels"
LIB = ROOT / "python" / "sgl_kernel_misa" / "lib"


@dataclass(frozen=True)
class Architecture:
    """What nvcc and TVM call an architecture, and the compute capability of the devices that run its code."""

    name: str
    capability: Tuple[int, int]

    @property
    def gencode(self) -> str:
        return f"-gencode=arch={self.name.replace('sm', 'compute')},code={self.name}"


ARCHITECTURES = {"sm90a": Architecture("sm_90a", (9, 0))}

# The kernels place their barriers themselves and stay inside their tensors, so neither is added to them. Buffers in shared
# memory do not overlap: TileLang would place them by the barriers that it sees, and some are in the CUDA functions.
PASS_CONFIGS = {
    "tl.disable_shared_memory_reuse": True,
    "tl.disable_thread_storage_sync": True,
    "tl.disable_safe_memory_legalize": True,
}

# `generate` edits the text that TileLang generates, so the version is fixed.
TILELANG = "0.1.11"
NVCC_FLAGS = ["-std=c++20", "-O3", "--compiler-options", "-fPIC"]
CUTLASS_INCLUDES = (
    "#include <cutlass/arch/barrier.h>\n#include <cutlass/cuda_host_adapter.hpp>\n"
)

# How the types of a host function's parameters are called in the manifest.
SCALARS = {
    "int": "int32",
    "int64_t": "int64",
    "unsigned int": "uint32",
    "float": "float32",
    "double": "float64",
}


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
            return Path(found)
    raise RuntimeError(
        f"nvcc is needed to compile the kernels and was not found (tried {', '.join(candidates)}). "
        f"Set NVCC or CUDA_HOME to one, or: pip install --no-deps -r {ROOT / 'build-requirements.txt'}"
    )


@functools.lru_cache(maxsize=None)
def nvcc_version() -> str:
    text = subprocess.check_output([find_nvcc(), "--version"], text=True)
    return re.search(r"\bV([\d.]+)", text).group(1)


def generate(name: str, kernel, architecture: Architecture) -> str:
    """The CUDA source of a kernel and of its host functions `<name>_call`, `<name>_init` and `<name>_get_last_error`.

    Args:
        name: the name under which the kernel is exported.
        kernel: an entry of `kernels.KERNELS`.
        architecture: what to generate it for.

    Raises:
        RuntimeError: the generated host functions are not those expected.
    """
    import tilelang
    from tilelang import tvm
    from tilelang.jit.adapter.wrapper import TLWrapper

    target = tvm.target.Target({"kind": "cuda", "arch": architecture.name})
    configs = {**PASS_CONFIGS, **kernel.pass_configs}
    with tvm.transform.PassContext(opt_level=3, config=configs), target:
        # The device function takes its name from the prim_func's: two kernels of one factory must not share it.
        function = kernel.build().with_attr("global_symbol", name)
        artifact = tilelang.lower(function, target=target)
    wrapper = TLWrapper(target)
    wrapper.assign_optimized_module(tvm.IRModule({name: function}))
    wrapper.assign_pass_configs(configs)
    wrapper.assign_host_module(artifact.host_mod)
    wrapper.assign_device_module(artifact.device_mod)
    source = wrapper.wrap(artifact.kernel_source)

    # Text from T.import_source comes first and lacks the newline that a preprocessor line must end with.
    source = re.sub(
        r"(?<=[^\n])#if defined\(_MSC_VER\)", "\n#if defined(_MSC_VER)", source
    )
    # This header defines functions that are not inline: two objects that include it cannot be linked.
    if "debug_print" not in source and "device_assert" not in source:
        source = source.replace(_include("debug.h"), "")
    # CUTLASS's GEMM templates take most of the time that a kernel takes to compile. Without a call of them, all that is
    # needed of this header is the small ones that it includes.
    if not re.search(r"\btl::gemm_", source):
        source = source.replace(
            _include("gemm.h"), _include("intrin.h") + CUTLASS_INCLUDES
        )
    # TileLang lets every kernel start before the one ahead of it in the stream has finished. That is right only for a
    # kernel that waits for it (T.pdl_sync); without the attribute the stream's order holds.
    if "cudaGridDependencySynchronize" not in source:
        source = source.replace(
            "StreamSerializationAllowed = 1;", "StreamSerializationAllowed = 0;"
        )
    if kernel.prefers_shared:
        source = _edit(
            "init",
            name,
            r"(TL_EXPORT int init\(\) {.*?)(\n    return 0;\n})",
            rf"""\1
    if (cudaFuncSetAttribute({name}_kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared)) {{
        snprintf(error_buf, ERROR_BUF_SIZE, "Failed to set the preferred shared memory carveout");
        return -1;
    }}
\2""",
            source,
        )
    for function in ("call", "init", "get_last_error"):
        source = _edit(
            function,
            name,
            rf'(extern "C" TL_EXPORT [^(]*)\b{function}\(',
            rf"\1{name}_{function}(",
            source,
        )
    return source


def arguments_of(name: str, source: str) -> List[Tuple[str, str]]:
    """The arguments of a kernel's host function, less the stream: (name, "pointer" or a scalar's type) in order."""
    declaration = re.search(rf"\b{name}_call\(([^)]*)\) {{", source).group(1)
    arguments = []
    for parameter in declaration.split(", ")[:-1]:
        kind, argument = parameter.rsplit(" ", 1)
        if "*" in kind:
            arguments.append((argument, "pointer"))
        elif kind in SCALARS:
            arguments.append((argument, SCALARS[kind]))
        else:
            raise RuntimeError(
                f"{name}: the type of {argument}, {kind}, is not in SCALARS"
            )
    kinds = [kind == "pointer" for _, kind in arguments]
    if kinds != sorted(kinds, reverse=True):
        raise RuntimeError(
            f"{name}: the tensors must come before the numbers among a kernel's parameters"
        )
    return arguments


def compile_object(
    name: str, source: str, architecture: Architecture, folder: Path
) -> Tuple[List[Usage], str]:
    """Compile a kernel to `<folder>/<name>.o`, unless the object there was made of the same source and headers.

    Returns:
        what the device functions use, and what nvcc said (nothing if the object was there).

    Raises:
        RuntimeError: nvcc failed; with its output.
    """
    import tilelang
    from tilelang import env

    cu, obj, dep, record = (
        folder / f"{name}{suffix}" for suffix in (".cu", ".o", ".d", ".json")
    )
    command = [
        find_nvcc(),
        "-c",
        cu,
        "-o",
        obj,
        *NVCC_FLAGS,
        architecture.gencode,
        "-Xptxas",
        "-v",
        "-MD",
        "-MF",
        dep,
    ]
    command += [
        "-I",
        INCLUDE,
        "-isystem",
        env.TILELANG_TEMPLATE_PATH,
        "-isystem",
        env.CUTLASS_INCLUDE_DIR,
    ]
    command = [str(part) for part in command]
    # The versions stand for the headers of TileLang and CUDA; our own are hashed one by one.
    key = [command, nvcc_version(), tilelang.__version__, _digest(source.encode())]

    if obj.exists() and record.exists():
        made = json.loads(record.read_text())
        if made["key"] == key and all(
            _digest_file(Path(path)) == made["headers"][path]
            for path in made["headers"]
        ):
            return [Usage(**usage) for usage in made["usage"]], ""

    cu.write_text(source)
    obj.unlink(missing_ok=True)
    record.unlink(missing_ok=True)
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode != 0:
        raise RuntimeError(f"{name}: nvcc failed\n{' '.join(command)}\n{done.stdout}")
    usage = parse_usage(done.stdout)
    included = [
        Path(path.replace("\\ ", " "))
        for path in re.findall(r"(?:[^\s\\]|\\ )+", dep.read_text())
    ]
    headers = {
        str(path): _digest_file(path)
        for path in included
        if INCLUDE in path.resolve().parents
    }
    record.write_text(
        json.dumps(
            {"key": key, "headers": headers, "usage": [asdict(u) for u in usage]}
        )
    )
    return usage, done.stdout


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


def link(
    names: Sequence[str], architecture: Architecture, folder: Path, library: Path
) -> None:
    """Link the kernels' objects into a library that exports their host functions and nothing else."""
    exports = folder / "exports.map"
    functions = [
        f"{name}_{function};"
        for name in names
        for function in ("call", "init", "get_last_error")
    ]
    exports.write_text(f"{{ global: {' '.join(functions)} local: *; }};\n")
    linked = folder / library.name
    command = [
        find_nvcc(),
        "-shared",
        "-cudart",
        "static",
        architecture.gencode,
        "-o",
        linked,
    ]
    # NVIDIA's packages keep the libraries in lib, where nvcc does not look; $CUDA_HOME has them in lib64.
    command += [
        "-L",
        find_nvcc().parent.parent / "lib",
        "-Xlinker",
        f"--version-script={exports}",
    ]
    command += [folder / f"{name}.o" for name in names]
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode != 0:
        raise RuntimeError(f"linking {library.name} failed\n{done.stdout}")
    # In one step, so that a process that has the old library loaded keeps it.
    library.parent.mkdir(parents=True, exist_ok=True)
    staged = library.with_suffix(".new")
    shutil.copyfile(linked, staged)
    os.replace(staged, library)


def build(
    architectures: Sequence[str] = tuple(ARCHITECTURES),
    only: Sequence[str] = (),
    jobs: Optional[int] = None,
    verbose: bool = False,
) -> None:
    """Build the libraries and their manifest into `python/sgl_kernel_misa/lib`; prints what the kernels use.

    Args:
        architectures: keys of `ARCHITECTURES`; the manifest lists these.
        only: the kernels to put into the library; all by default.
        jobs: how many nvcc run at once; by default one a core.
        verbose: print what nvcc says.

    Raises:
        RuntimeError: there is no nvcc, TileLang has another version, or a kernel could not be compiled.
    """
    find_nvcc()
    sys.path.insert(0, str(ROOT))
    import tilelang
    from kernels import KERNELS

    if tilelang.__version__ != TILELANG:
        raise RuntimeError(
            f"the kernels are built with TileLang {TILELANG}, not {tilelang.__version__}"
        )
    unknown = set(only) - set(KERNELS)
    if unknown:
        raise RuntimeError(
            f"kernels has no {', '.join(sorted(unknown))}; it has {', '.join(KERNELS) or 'none'}"
        )
    names = [name for name in KERNELS if not only or name in only]
    if not names:
        raise RuntimeError("kernels.KERNELS is empty: there is nothing to build")

    manifest = {}
    for label in architectures:
        architecture = ARCHITECTURES[label]
        folder = BUILD / label
        folder.mkdir(parents=True, exist_ok=True)
        arguments: Dict[str, List[Tuple[str, str]]] = {}
        compiled: Dict[str, Future] = {}
        with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
            for name in names:
                source = generate(name, KERNELS[name], architecture)
                arguments[name] = arguments_of(name, source)
                compiled[name] = pool.submit(
                    compile_object, name, source, architecture, folder
                )
        failures = [
            str(job.exception()) for job in compiled.values() if job.exception()
        ]
        if failures:
            raise RuntimeError("\n\n".join(failures))
        if verbose:
            print(
                "\n".join(
                    output
                    for _, output in (job.result() for job in compiled.values())
                    if output
                )
            )
        print_usage(label, {name: job.result()[0] for name, job in compiled.items()})
        library = LIB / f"{label}.so"
        link(names, architecture, folder, library)
        manifest[label] = {
            "library": library.name,
            "capability": architecture.capability,
            "tilelang": tilelang.__version__,
            "nvcc": nvcc_version(),
            "sources": sources_digest(),
            "kernels": arguments,
        }
    (LIB / "manifest.json").write_text(_to_json(manifest))


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


def sources_digest() -> str:
    """A hash of the kernels, their headers and this file: the library is up to date if its manifest has the same."""
    files = [
        Path(__file__).resolve(),
        *(ROOT / "kernels").rglob("*.py"),
        *INCLUDE.rglob("*.cuh"),
    ]
    lines = [
        f"{path.relative_to(ROOT).as_posix()} {_digest_file(path)}" for path in files
    ]
    return _digest("\n".join(sorted(lines)).encode())


def _edit(function: str, name: str, pattern: str, text: str, source: str) -> str:
    """The source of the kernel `name` with `text` for what matches in its host function, which must be there once."""
    source, count = re.subn(pattern, text, source, flags=re.DOTALL)
    if count != 1:
        raise RuntimeError(
            f"{name}: TileLang generated {count} functions {function}, not one"
        )
    return source


def _include(header: str) -> str:
    return f"#include <tl_templates/cuda/{header}>\n"


def _to_json(manifest: Mapping) -> str:
    """JSON with an argument a line, so that a change of the ABI is easy to see."""
    text = json.dumps(manifest, indent=2)
    return re.sub(r"\[\s+([^\[\]]*?),\s+([^\[\]]*?)\s+\]", r"[\1, \2]", text) + "\n"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_file(path: Path) -> Optional[str]:
    return _digest(path.read_bytes()) if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compile the TileLang kernels into shared libraries."
    )
    parser.add_argument(
        "--arch",
        action="append",
        choices=ARCHITECTURES,
        help="architecture; all by default",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="a library of just this kernel",
    )
    parser.add_argument(
        "--jobs", type=int, help="compilations at once; by default one a core"
    )
    parser.add_argument("--verbose", action="store_true", help="print what nvcc says")
    arguments = parser.parse_args()
    try:
        build(
            arguments.arch or tuple(ARCHITECTURES),
            arguments.only,
            arguments.jobs,
            arguments.verbose,
        )
    except RuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
