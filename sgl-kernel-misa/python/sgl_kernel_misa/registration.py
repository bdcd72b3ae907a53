"""An operation is a function: its arguments are written once, as the parameters of that function.

    @operation()
    def scaled(q: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        '''What it computes, for callers.'''
        checks.tensor("q", q, torch.float32, (None, 128))
        out = torch.empty_like(q)
        if launching(q):
            launch("scaled", q=q, out=out, factor=factor, rows=q.shape[0])
        return out

makes torch.ops.sgl_kernel_misa.scaled: its schema is inferred from the annotations, its implementation for CUDA is the
function, and its fake implementation is the same function, in which `launching` is false. What is left under the function's
name calls the operation, or the function where that comes to the same.
"""

import functools
from contextvars import ContextVar
from typing import Any, Callable, TypeVar, cast

import torch

Operation = TypeVar("Operation", bound=Callable)

_LIBRARY = torch.library.Library("sgl_kernel_misa", "DEF")

# True while a fake implementation runs.
_fake: ContextVar[bool] = ContextVar("fake", default=False)


def operation(*mutated: str) -> Callable[[Operation], Operation]:
    """Make an operation of a function that checks its arguments, creates its results and launches its kernels.

    Args:
        mutated: the names of the tensors that it writes.
    """

    def register(function: Operation) -> Operation:
        name = function.__name__
        # A number is a number, not a symbol: the checks and the choice of a kernel would ask for its value anyway.
        schema = torch.library.infer_schema(function, mutates_args=mutated).replace(
            "SymInt", "int"
        )
        _LIBRARY.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
        _LIBRARY.impl(name, function, "CUDA")

        def describe(*args, **kwargs):
            token = _fake.set(True)
            try:
                return function(*args, **kwargs)
            finally:
                _fake.reset(token)

        torch.library.register_fake(f"sgl_kernel_misa::{name}", describe, lib=_LIBRARY)
        overload = getattr(torch.ops.sgl_kernel_misa, name).default

        @functools.wraps(function)
        def call(*args, **kwargs):
            # The dispatcher finds the same function, and takes as long as two launches for it.
            first: Any = next(iter(args or kwargs.values()), None)
            on_gpu = type(first) is torch.Tensor and first.is_cuda
            if on_gpu and not torch.compiler.is_compiling():
                return function(*args, **kwargs)
            return overload(*args, **kwargs)

        return cast(Operation, call)

    return register


def launching(rows: torch.Tensor) -> bool:
    """Whether an operation is to launch its kernels: not in a fake implementation, and not where there are no rows."""
    return not _fake.get() and rows.shape[0] > 0
