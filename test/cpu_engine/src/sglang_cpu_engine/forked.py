# SPDX-License-Identifier: Apache-2.0
"""Servers that are forked from a process which has imported SGLang already: that is most of what a small server costs to start."""

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
from io import TextIOBase
from typing import Optional, Union

# Of each server its own: read once it runs, or by nobody.
LATE = "SGLANG_MISA_", "PYTEST_CURRENT_TEST"


class Forked:
    """What is used of `subprocess.Popen`, for a server that was forked."""

    def __init__(self, command: list[str], env: dict[str, str], log: str):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["sglang_cpu_engine.preloaded"])
        self._process = context.Process(target=_run, args=(command, env, log))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> Optional[int]:
        return self._process.exitcode

    def wait(self) -> None:
        self._process.join()


def _run(command: list[str], env: dict[str, str], log: str) -> None:
    """What `command` does, in this process."""
    from sglang_cpu_engine import preloaded

    os.environ.clear()
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    preloaded.restore_path()
    executable, option, module, *sys.argv[1:] = command
    assert (executable, option) == (sys.executable, "-m")
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@functools.cache
def _environment() -> dict[str, str]:
    """The environment in which SGLang was imported."""
    return dict(os.environ)


def start(
    command: list[str], *, env: dict[str, str], stdout: TextIOBase, stderr: int
) -> Union[Forked, subprocess.Popen]:
    """In place of `subprocess.Popen`, with SGLANG_CPU_ENGINE_FORKS=1: forks where nothing else in `env` asks for another import."""
    before = _environment()
    names = {x for x in before.keys() | env.keys() if before.get(x) != env.get(x)}
    if all(name.startswith(LATE) for name in names):
        assert stderr == subprocess.STDOUT
        return Forked(command, env, stdout.name)
    return subprocess.Popen(command, env=env, stdout=stdout, stderr=stderr)
