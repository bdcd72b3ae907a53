# SPDX-License-Identifier: Apache-2.0
"""Import-only stand-in: kernels can be declared, launching one raises."""

from sglang_cpu_engine.stand_in import Placeholder, stand_in

__version__ = "0.0.0"
__getattr__ = stand_in(__name__)


def jit(fn=None, **_options):
    """Stands for `@triton.jit`, with and without options."""
    if fn is None:
        return jit
    return Placeholder(f"the Triton kernel {fn.__module__}.{fn.__name__}")


def _decorator(*_args, **_kwargs):
    return lambda kernel: kernel


autotune = heuristics = _decorator


class Config:
    def __init__(self, *_args, **_kwargs):
        pass


def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 0
