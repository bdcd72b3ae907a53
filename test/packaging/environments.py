"""Environments without packages, and packages to install there; nothing here takes a network."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# In the source of either package.
VERSION = "sgl-kernel-misa/python/sgl_kernel_misa/version.py"


def run(*command, **options) -> str:
    """Run a command as a person would, without this process's paths; the output of both streams."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def build(source: Path, out: Path, hook: str) -> Path:
    """What a hook of the build backend makes, such as `build_wheel`, `build_editable` or `build_sdist`."""
    out.mkdir(parents=True)
    call = f"import sys, setuptools.build_meta as backend; backend.{hook}(sys.argv[1])"
    run(sys.executable, "-c", call, out, cwd=source)
    # Beside metadata setuptools leaves what it made that from.
    (made,) = (path for path in out.iterdir() if path.suffix != ".egg-info")
    return made


class Environment:
    """A virtual environment without packages of its own."""

    def __init__(self, folder: Path):
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.executable = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python3*/site-packages")
        self.folder = folder

    def pip(self, *args) -> str:
        quiet = ("--disable-pip-version-check", "--python", self.executable)
        return run(sys.executable, "-m", "pip", *quiet, *args)

    def install(self, wheel: Path) -> None:
        self.pip("install", "--no-index", "--no-deps", wheel)

    def uninstall(self, name: str) -> None:
        self.pip("uninstall", "--yes", name)

    def python(self, *args) -> str:
        return run(self.executable, *args, cwd=self.folder)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.site)) for path in self.site.rglob("*")}
