"""The one place where an operation of the indexer meets its implementation.

There is one sequence of operations, in `indexer` and `pooled_keys`. On a GPU the kernels of sgl-kernel-misa carry them
out, on a CPU `torch_operations`; both have the same functions with the same arguments.
"""

from types import ModuleType
from typing import Optional

import torch

INSTALL_KERNELS = "pip install --no-build-isolation ./sgl-kernel-misa"


def operations(device: torch.device) -> ModuleType:
    """The module whose functions work on tensors of a device.

    Raises:
        ImportError: the device is a GPU and sgl-kernel-misa is not installed.
    """
    if device.type == "cuda":
        import sgl_kernel_misa

        return sgl_kernel_misa
    from sglang.srt.layers.misa import torch_operations

    return torch_operations


def kernels_problem() -> Optional[str]:
    """What keeps the kernels from running on this machine's GPU, with the remedy; None where nothing does."""
    try:
        import sgl_kernel_misa
    except (ImportError, OSError) as error:  # OSError: a library that fails to load
        return f"sgl-kernel-misa cannot be imported ({_line(error)}); install it with `{INSTALL_KERNELS}`"
    try:
        sgl_kernel_misa.check_device()
    except RuntimeError as error:
        return (
            f"sgl-kernel-misa does not run on this GPU ({_line(error)}); build it for this machine with "
            f"`{INSTALL_KERNELS}` or drop --enable-misa"
        )
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
