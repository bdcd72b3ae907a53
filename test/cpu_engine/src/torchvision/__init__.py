# SPDX-License-Identifier: Apache-2.0
"""Import-only stand-in: SGLang's multimodal processors import torchvision, text models don't use it."""

from sglang_cpu_engine.stand_in import stand_in

__version__ = "0.0.0"
__getattr__ = stand_in(__name__)
