# SPDX-License-Identifier: Apache-2.0
"""Packages that can be imported, but not used.

SGLang imports GPU packages at module level. They have to be installed packages rather than something a plugin puts into
`sys.modules`, because the scheduler process imports SGLang while it unpickles its arguments, before plugins are loaded.
"""

import importlib.abc
import importlib.machinery
import sys
import types


class Placeholder:
    """Anything found in a stand-in. Names, subscripts and subclasses of it can be had, calls raise."""

    def __init__(self, name: str):
        self.__name__ = name

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder(f"{self.__name__}.{name}")

    def __getitem__(self, _):
        return self

    def __or__(self, _):
        return self

    __ror__ = __or__

    def __mro_entries__(self, _):
        return ()

    def __instancecheck__(self, _):
        return False

    def __repr__(self):
        return f"<stand-in for {self.__name__}>"

    def __call__(self, *_args, **_kwargs):
        raise NotImplementedError(
            f"{self.__name__} is a stand-in of sglang-cpu-engine and does nothing. "
            "Install the real package, or add a CPU replacement to sglang_cpu_engine.patches."
        )


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every submodule of one stand-in package."""

    def __init__(self, package: str):
        self.prefix = package + "."

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(self.prefix):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec):
        return None

    def exec_module(self, module: types.ModuleType):
        module.__getattr__ = names_of(module.__name__)


def names_of(module: str):
    """A module-level `__getattr__` (PEP 562) that answers every public name with a placeholder."""

    def __getattr__(name: str):
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return Placeholder(f"{module}.{name}")

    return __getattr__


def stand_in(package: str):
    """Makes every submodule of `package` importable and returns its `__getattr__`."""
    # At the end, so that the submodules which are files come first.
    sys.meta_path.append(_Finder(package))
    return names_of(package)
