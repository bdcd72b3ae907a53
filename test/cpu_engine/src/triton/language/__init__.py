# SPDX-License-Identifier: Apache-2.0
"""`tl.constexpr` is called at module level, everything else inside kernels only."""

from sglang_cpu_engine.stand_in import names_of

__getattr__ = names_of(__name__)


class constexpr:
    def __init__(self, value=None):
        self.value = value
