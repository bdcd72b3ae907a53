# SPDX-License-Identifier: Apache-2.0
"""What is changed in one release of SGLang only: a module each, with a table `PATCHES`."""

import importlib
import importlib.metadata
from types import ModuleType

# Who starts a server has no need of all that `import sglang` takes.
__version__ = importlib.metadata.version("sglang")

# A release and its module here.
RELEASES = {"0.5.17": "v0_5_17", "0.5.23": "v0_5_23"}
# The flags that a server needs with a release, beside those of `sglang_cpu_engine.launch`.
FLAGS = {
    "0.5.17": [],
    # The draft model's, which was that of `--dsa-topk-backend` before.
    "0.5.23": ["--speculative-dsa-topk-backend", "torch"],
}


def installed() -> ModuleType:
    """The module of the SGLang that is installed.

    Raises:
        SystemExit: there is none for it.
    """
    if __version__ not in RELEASES:
        # SGLang logs what a plugin raises and goes on, which would leave a half-patched server behind.
        raise SystemExit(
            f"sglang-cpu-engine serves with SGLang {' or '.join(RELEASES)}, not {__version__}."
        )
    return importlib.import_module(f"{__name__}.{RELEASES[__version__]}")
