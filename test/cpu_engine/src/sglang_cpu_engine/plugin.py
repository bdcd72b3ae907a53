# SPDX-License-Identifier: Apache-2.0
"""SGLang's entry point into this distribution."""

import os

import torch


def register() -> None:
    """Makes the DSA path run on a CPU. Does nothing unless SGLANG_USE_CPU_ENGINE=1."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        return
    if torch.cuda.is_available():
        # SGLang logs what a plugin raises and goes on, which would leave a half-patched server behind.
        raise SystemExit(
            "sglang-cpu-engine is for machines without a GPU: unset SGLANG_USE_CPU_ENGINE, or uninstall it."
        )
    from sglang_cpu_engine import patches, releases

    patches.apply([*patches.PATCHES, *releases.installed().PATCHES])
    if os.environ.get("SGLANG_CPU_ENGINE_FORKS") == "1":
        patches.apply(patches.FORKS)
