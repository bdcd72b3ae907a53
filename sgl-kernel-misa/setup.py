"""Compiles the kernels before setuptools packs them; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# What builds is not installed: it is found beside this file.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_kernels import build


class PlatformDistribution(Distribution):
    """Holds code for one platform, which setuptools concludes from extension modules alone."""

    def has_ext_modules(self):
        return True


class PlatformWheel(bdist_wheel):
    """A wheel for any Python: the libraries have a C ABI and know nothing of Python's."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class BuildKernels(build_py):
    """Puts the libraries where package-data, or an editable install, finds them."""

    def run(self):
        build()
        super().run()


setup(
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildKernels, "bdist_wheel": PlatformWheel},
)
