"""The TileLang kernels and the table of what is compiled from them.

Every kernel is a file of this folder with a factory `get_<name>_kernel(...)` that returns a prim_func. `KERNELS` says
which of them, with which arguments, go into the library, and under which names they are launched.

Words: a CTA is a block of threads; "block" is kept for pooled keys, "page" for the cache. Programmatic dependent launch (PDL) lets a
kernel start while the one ahead of it in the stream still runs: `T.pdl_trigger` lets the next one start, `T.pdl_sync` waits until
all work of the one ahead is done and seen. A kernel without `T.pdl_sync` is launched in the stream's order. Every other one waits,
at the latest before it ends, so that whoever waits for it may rely on all that came before.
"""

from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Callable, Dict, Mapping

# `misa_kernels.constants` is the package's module of that name: the build must not import the package, which loads what is built.
__path__.append(str(Path(__file__).resolve().parents[1] / "python" / "sgl_kernel_misa"))

from misa_kernels.constants import (
    DECODE_ROUTE_RANKS,
    DECODE_ROUTE_ROWS,
    DECODE_ROWS,
    DECODE_SELECT_RANKS,
    DECODE_SLOTS,
    NUM_HEADS,
    PREFILL_SLOTS,
    RERANK_CAPACITIES,
    RERANK_RANKS,
    SELECT_CAPACITIES,
    THRESHOLD_THREADS,
)
from misa_kernels.decode_route import get_decode_route_kernel
from misa_kernels.decode_score import get_decode_score_kernel
from misa_kernels.decode_select import get_decode_select_kernel
from misa_kernels.pool_blocks import get_pool_blocks_kernel
from misa_kernels.rerank import get_rerank_kernel
from misa_kernels.route import get_route_kernel
from misa_kernels.route_sampled import get_route_sampled_kernel
from misa_kernels.sample import get_sample_kernel
from misa_kernels.score import get_score_kernel
from misa_kernels.select import get_select_kernel
from misa_kernels.threshold import get_threshold_kernel
from misa_kernels.update_pooled_keys import get_update_pooled_keys_kernel


@dataclass(frozen=True)
class Kernel:
    """One kernel of the library.

    Attributes:
        build: returns the prim_func. Its own name does not matter: the table's is what is exported.
        pass_configs: TileLang pass configs that differ from `builder.generate.PASS_CONFIGS`.
        prefers_shared: an SM gives it all shared memory that it can. A CTA does not start on an SM that divides its memory
            in another way until that SM is idle, so kernels that are to overlap divide it in the same way.
    """

    build: Callable[[], Any]
    pass_configs: Mapping[str, Any] = field(default_factory=dict)
    prefers_shared: bool = False


def _kernels() -> Dict[str, Kernel]:
    kernels = {
        "update_pooled_keys_int32": Kernel(
            lambda: get_update_pooled_keys_kernel("int32")
        ),
        "update_pooled_keys_int64": Kernel(
            lambda: get_update_pooled_keys_kernel("int64")
        ),
        "pool_blocks": Kernel(get_pool_blocks_kernel),
        "sample": Kernel(get_sample_kernel),
    }
    for threads in THRESHOLD_THREADS:
        kernels[f"threshold_{threads}"] = Kernel(partial(get_threshold_kernel, threads))
    for num_heads in NUM_HEADS:
        kernels[f"route_{num_heads}"] = Kernel(partial(get_route_kernel, num_heads))
        # Shares its SMs with `decode_score` in decode.
        kernels[f"route_sampled_{num_heads}"] = Kernel(
            partial(get_route_sampled_kernel, num_heads), prefers_shared=True
        )
    for ranks in DECODE_SELECT_RANKS:
        kernels[f"decode_select_{ranks}"] = Kernel(
            partial(get_decode_select_kernel, ranks), prefers_shared=True
        )
    for rows, ranks in product(DECODE_ROWS, DECODE_ROUTE_RANKS):
        if rows > ranks * DECODE_ROUTE_ROWS:
            continue
        for num_heads in NUM_HEADS:
            kernels[f"decode_route_{num_heads}_{rows}_{ranks}"] = Kernel(
                partial(get_decode_route_kernel, num_heads, rows, ranks),
                prefers_shared=True,
            )
    for heads in PREFILL_SLOTS:
        for mode in ("planes", "samples"):
            kernels[f"score_{mode}_{heads}"] = Kernel(
                partial(get_score_kernel, heads, mode)
            )
        for capacity in SELECT_CAPACITIES:
            kernels[f"select_{heads}_{capacity}"] = Kernel(
                partial(get_select_kernel, heads, capacity)
            )
    for heads, rows in product(DECODE_SLOTS, DECODE_ROWS):
        kernels[f"decode_score_{heads}_{rows}"] = Kernel(
            partial(get_decode_score_kernel, heads, rows), prefers_shared=True
        )
    for num_heads in NUM_HEADS:
        for capacity in RERANK_CAPACITIES:
            for ranks in RERANK_RANKS:
                kernels[f"rerank_{num_heads}_{capacity}_{ranks}"] = Kernel(
                    partial(get_rerank_kernel, num_heads, capacity, ranks)
                )
    return kernels


KERNELS = _kernels()
