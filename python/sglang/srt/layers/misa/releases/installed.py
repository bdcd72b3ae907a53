"""The module of the release of SGLang that is installed."""

import importlib
from typing import Any

from sglang.srt.layers.misa.releases import MODULES, closest
from sglang.version import __version__

RELEASE: Any = importlib.import_module(
    f"sglang.srt.layers.misa.releases.{MODULES[closest(__version__)]}"
)
