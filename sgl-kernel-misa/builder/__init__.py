"""The build of the kernels: TileLang -> CUDA (generate) -> objects and a library (compile, launches) -> what it holds (manifest)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Tuple

ROOT = Path(__file__).resolve().parents[1]
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

# What is exported: of a kernel, after its name and an underscore, and beside the kernels.
FUNCTIONS = ("run", "init", "get_last_error")
LAUNCH_CHAIN = "launch_chain"
