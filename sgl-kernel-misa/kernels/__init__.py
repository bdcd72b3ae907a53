"""The TileLang kernels and the table of what is compiled from them.

Every kernel is a file of this folder with a factory `get_<name>_kernel(...)` that returns a prim_func. `KERNELS` says
which of them, with which arguments, go into the library, and under which names they are launched.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Dict, Mapping

from kernels.decode_route import get_decode_route_kernel
from kernels.decode_score import get_decode_score_kernel
from kernels.decode_select import get_decode_select_kernel
from kernels.pool_blocks import get_pool_blocks_kernel
from kernels.rerank import get_rerank_kernel
from kernels.route import get_route_kernel
from kernels.route_sampled import get_route_sampled_kernel
from kernels.sample import get_sample_kernel
from kernels.score import get_score_kernel
from kernels.select import get_select_kernel
from kernels.threshold import get_threshold_kernel
from kernels.update_pooled_keys import get_update_pooled_keys_kernel


@dataclass(frozen=True)
class Kernel:
    """One kernel of the library.

    Attributes:
        build: returns the prim_func. Its own name does not matter: the table's is what is exported.
        pass_configs: TileLang pass configs that differ from `build_kernels.PASS_CONFIGS`.
        prefers_shared: an SM gives it all shared memory that it can. A block does not start on an SM that divides its memory
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
        "route_32": Kernel(lambda: get_route_kernel(32)),
        "route_64": Kernel(lambda: get_route_kernel(64)),
        # Shares its SMs with `decode_score` in decode.
        "route_sampled_32": Kernel(
            lambda: get_route_sampled_kernel(32), prefers_shared=True
        ),
        "route_sampled_64": Kernel(
            lambda: get_route_sampled_kernel(64), prefers_shared=True
        ),
        "sample": Kernel(get_sample_kernel),
        "threshold": Kernel(get_threshold_kernel),
    }
    for ranks in (2, 4, 8):
        kernels[f"decode_select_{ranks}"] = Kernel(
            partial(get_decode_select_kernel, ranks), prefers_shared=True
        )
    for ranks in (1, 2, 4, 8):
        for num_heads in (32, 64):
            kernels[f"decode_route_{num_heads}_{ranks}"] = Kernel(
                partial(get_decode_route_kernel, num_heads, ranks), prefers_shared=True
            )
    for heads in (8, 16, 32, 64):
        for mode in ("planes", "samples"):
            kernels[f"score_{mode}_{heads}"] = Kernel(
                partial(get_score_kernel, heads, mode)
            )
        for capacity in (3072, 6144):
            kernels[f"select_{heads}_{capacity}"] = Kernel(
                partial(get_select_kernel, heads, capacity)
            )
        kernels[f"decode_score_{heads}"] = Kernel(
            partial(get_decode_score_kernel, heads), prefers_shared=True
        )
    for heads in (32, 64):
        for capacity in (8192, 16384):
            for blocks in (1, 8):
                kernels[f"rerank_{heads}_{capacity}_{blocks}"] = Kernel(
                    partial(get_rerank_kernel, heads, capacity, blocks)
                )
    return kernels


KERNELS = _kernels()
