"""`python -m sglang.srt.layers.misa.doctor`: does MISA fit the SGLang that is installed here?"""

import sys
from importlib import metadata

import torch

from sglang.srt.plugins import load_plugins


def kernels_version() -> str:
    try:
        return metadata.version("sgl-kernel-misa")
    except metadata.PackageNotFoundError:
        return "is not installed"


def main() -> int:
    load_plugins()
    from sglang.srt.layers.misa.operations import kernels_problem
    from sglang.srt.layers.misa.patches import PATCHES, problems
    from sglang.version import __version__

    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else "no GPU"
    print(f"sglang {__version__}, torch {torch.__version__}, {device}\n")
    for patch in PATCHES:
        state = "ok" if patch.engaged() else "FAILED"
        print(f"{state:7}{patch.kind.value:8} {patch.target}\n{'':16}{patch.reason}")
    found = problems()
    kernels = kernels_problem()
    if gpu and kernels:
        found.append(f"{kernels}.")
    state = "ok" if not kernels else "FAILED" if gpu else "unused"
    reason = "carries out the operations on a GPU"
    print(f"{state:7}kernels  sgl-kernel-misa {kernels_version()}\n{'':16}{reason}")
    print("\nMISA is ready." if not found else "\n" + "\n".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
