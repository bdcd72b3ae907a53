# SPDX-License-Identifier: Apache-2.0
"""How a server makes its other processes."""

import multiprocessing

_set_start_method = multiprocessing.set_start_method


def set_start_method(_method: str, force: bool = False) -> None:
    """In place of torch's or the standard library's: processes are forked, whatever is asked for.

    SGLang spawns them, so that each has the GPU to itself and imports SGLang again, which is most of the time that a small server
    takes to start. It does so before there is a thread or a socket that a fork would copy.
    """
    _set_start_method("fork", force=force)
