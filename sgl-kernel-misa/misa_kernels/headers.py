"""Includes of the CUDA headers, which hold a kernel and the headers to the same constants."""

from misa_kernels.constants import (
    FORMS,
    HEAD_DIM,
    MAX_CONTEXT,
    PAGE_BYTES,
    PAGE_SIZE,
    SPAN,
)

# What several kernels set aside for the headers' functions.
BINS = 2048  # of a histogram
SCRATCH = 64  # ints

# The names of `namespace misa` for what more than one header knows, and what the kernels and launches take each for.
_COMMON = {
    "layout.cuh": dict(
        kPage=PAGE_SIZE,
        kHeadDim=HEAD_DIM,
        kPageBytes=PAGE_BYTES,
        kSpan=SPAN,
    ),
    "cta.cuh": dict(
        kBins=BINS,
        kScratch=SCRATCH,
        kMaxContext=MAX_CONTEXT,
        kPositions=FORMS["positions"],
        kSlots=FORMS["slots"],
        kRagged=FORMS["ragged"],
    ),
}


def include(*headers: str, **constants: int) -> str:
    """CUDA source that includes headers, and does not compile unless their constants have the values that a kernel relies on.

    Args:
        headers: their names; layout.cuh and cta.cuh, whose constants are always asserted, need not be among them.
        constants: those of the headers themselves, by their names in `namespace misa`.
    """
    for common in _COMMON.values():
        constants.update(common)
    lines = [f'#include "{header}"' for header in (*_COMMON, *headers)]
    lines += [
        f'static_assert(misa::{name} == {value}, "{name} is {value} where the kernels are built");'
        for name, value in constants.items()
    ]
    return "\n".join(lines) + "\n"
