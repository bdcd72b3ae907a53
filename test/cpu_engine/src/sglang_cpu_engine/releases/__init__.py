# SPDX-License-Identifier: Apache-2.0
"""What is changed in one release of SGLang only: a module each, with a table `PATCHES`."""

import importlib
from types import ModuleType

from sglang.version import __version__

# A release and its module here.
RELEASES = {"0.5.17": "v0_5_17", "0.5.23": "v0_5_23"}


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
