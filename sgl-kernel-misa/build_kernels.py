"""Compiles the TileLang kernels into one shared library per architecture: python build_kernels.py --help

Every entry of `misa_kernels.KERNELS` is lowered to CUDA, wrapped in host functions with a C ABI, compiled with nvcc and linked
into `python/sgl_kernel_misa/lib/<architecture>.so`. `manifest.json` beside it says what the library holds. No GPU is needed
here, and neither TileLang nor nvcc where the library is loaded.
"""

import argparse
import os
import re
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Dict, List, Optional, Sequence, Tuple

from builder import ARCHITECTURES, BUILD, LIB, ROOT


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
    _check_tilelang()
    from builder import compile, generate, manifest
    from misa_kernels import KERNELS

    compile.find_nvcc()
    unknown = set(only) - set(KERNELS)
    if unknown:
        raise RuntimeError(
            f"misa_kernels has no {', '.join(sorted(unknown))}; it has {', '.join(KERNELS) or 'none'}"
        )
    names = [name for name in KERNELS if not only or name in only]
    if not names:
        raise RuntimeError("misa_kernels.KERNELS is empty: there is nothing to build")

    held = {}
    for label in architectures:
        architecture = ARCHITECTURES[label]
        folder = BUILD / label
        compile.prepare(folder)
        compile.try_tools(architecture, folder)
        arguments: Dict[str, List[Tuple[str, str]]] = {}
        compiled: Dict[str, Future] = {}
        with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
            try:
                for name in names:
                    generated = generate.generate(name, KERNELS[name], architecture)
                    arguments[name] = generated.arguments
                    compiled[name] = pool.submit(
                        compile.compile_object,
                        name,
                        generated.source,
                        architecture,
                        folder,
                    )
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        failures = [
            str(job.exception()) for job in compiled.values() if job.exception()
        ]
        if failures:
            raise RuntimeError("\n\n".join(failures))
        objects = {name: job.result() for name, job in compiled.items()}
        if verbose:
            print("\n".join(output for _, output in objects.values() if output))
        compile.print_usage(
            label, {name: usage for name, (usage, _) in objects.items()}
        )
        compile.compile_launches(arguments, architecture, folder)
        library = LIB / f"{label}.so"
        compile.link(names, architecture, folder, library)
        held[label] = manifest.entry(library, architecture, folder, arguments)
    (LIB / "manifest.json").write_text(manifest.to_json(held))


def _check_tilelang() -> None:
    """Raise unless the TileLang that pyproject.toml names is installed: the code around what it generates is for this one."""
    required = re.search(
        r'"tilelang==([^"]+)"', (ROOT / "pyproject.toml").read_text()
    ).group(1)
    try:
        import tilelang

        found = tilelang.__version__
    except ModuleNotFoundError:
        found = None
    if found != required:
        raise RuntimeError(
            f"the kernels are built with TileLang {required}, and there is {found or 'none'}: "
            f"pip install --no-deps -r {ROOT / 'build-requirements.txt'}"
        )


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
