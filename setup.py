"""What pyproject.toml cannot say: where the layer is, a .pth file, and the version, which is that of the kernels too."""

import runpy
import shutil
from distutils.command.install_data import install_data

import setuptools
from setuptools.command.build_py import build_py

LAYER = "python/sglang/srt/layers/misa"
VERSION = "sgl-kernel-misa/python/sgl_kernel_misa/version.py"


class Distribution(setuptools.Distribution):
    # By this name an editable install asks whether there are data files; setuptools lacks it and would leave them out.
    has_data = setuptools.Distribution.has_data_files


class BuildFromSource(build_py):
    """Packs what is in the source and nothing that an earlier build has left, such as a folder `sglang`."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class InstallPth(install_data):
    """Puts data files into site-packages, where Python reads .pth files, rather than into the prefix."""

    def finalize_options(self):
        self.set_undefined_options("install", ("install_lib", "install_dir"))
        super().finalize_options()


version = runpy.run_path(VERSION)["__version__"]
subpackages = setuptools.find_packages(LAYER)
setuptools.setup(
    version=version,
    distclass=Distribution,
    cmdclass={"build_py": BuildFromSource, "install_data": InstallPth},
    packages=["sglang_misa", "sglang_misa.layer"]
    + [f"sglang_misa.layer.{name}" for name in subpackages],
    package_dir={"sglang_misa": "python/sglang_misa", "sglang_misa.layer": LAYER},
    data_files=[("", ["python/sglang_misa.pth"])],
    # Required on a GPU; built from this repository: pip install --no-build-isolation ./sgl-kernel-misa
    extras_require={"cuda": [f"sgl-kernel-misa=={version}"]},
)
