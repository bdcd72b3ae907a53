# SPDX-License-Identifier: Apache-2.0
"""Import-only stand-in for SGLang's CUDA kernels. What serving calls is replaced in `sglang_cpu_engine.patches`, but for
what SGLang has for CPUs and imports from here by name.
"""

from sglang_cpu_engine.kernels.speculative import (  # noqa: F401
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    build_tree_kernel_efficient_cpu,
    fill_bonus_tokens_cpu,
    verify_tree_greedy_cpu,
)
from sglang_cpu_engine.stand_in import stand_in

__version__ = "0.0.0"
__getattr__ = stand_in(__name__)
