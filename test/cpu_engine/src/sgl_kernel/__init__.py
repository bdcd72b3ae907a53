# SPDX-License-Identifier: Apache-2.0
"""Import-only stand-in for SGLang's CUDA kernels. What serving calls is replaced in `sglang_cpu_engine.patches`."""

from sglang_cpu_engine.stand_in import stand_in

__version__ = "0.0.0"
__getattr__ = stand_in(__name__)
