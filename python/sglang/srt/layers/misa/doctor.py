"""`python -m sglang.srt.layers.misa.doctor`: does MISA fit the SGLang that is installed here?"""

import sys
import traceback
from importlib import metadata

import torch

from sglang.srt.layers.misa import releases
from sglang.srt.plugins import load_plugins
from sglang.version import __version__

NO_GPU = (
    "Without a GPU, SGLang's DSA needs the CPU engine of the test suite and its environment: set "
    "SGLANG_USE_CPU_ENGINE=1 and TORCHDYNAMO_DISABLE=1."
)


def kernels_version() -> str:
    try:
        return metadata.version("sgl-kernel-misa")
    except metadata.PackageNotFoundError:
        return "is not installed"


def main() -> int:
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else "no GPU"
    known = releases.problem(__version__) or "a release that MISA knows"
    print(f"sglang {__version__}, torch {torch.__version__}, {device}")
    print(f"{known}\n", flush=True)
    load_plugins()
    try:
        from sglang.srt.layers.misa.operations import kernels_problem
        from sglang.srt.layers.misa.patches import PATCHES
        from sglang.srt.layers.misa.patching import problems, registered
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"FAILED the plugin does not load: {error!r} in {place.filename}:{place.lineno}"
        )
        if not gpu:
            print(NO_GPU)
        return 1
    for patch in registered() or PATCHES:
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
