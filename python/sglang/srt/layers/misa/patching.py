"""How MISA hooks into SGLang, and the check that the hooks engaged. `patches` says where.

SGLang logs a plugin or a hook that fails and goes on without it. MISA must not: whoever asks for --enable-misa gets it or
gets no server. What is registered here is therefore checked where the arguments are validated, and again in every scheduler
on the very objects that it built.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
from enum import Enum
from typing import (
    Any,
    Callable,
    Iterable,
    List,
    NamedTuple,
    Optional,
    Tuple,
    Union,
)

import torch

from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
from sglang.srt.layers.misa import process, releases
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.version import __version__ as sglang_version


class Kind(Enum):
    """What SGLang's `HookType` lacks."""

    # Of an attribute that holds a class: SGLang would put what replaces it in the place of that class everywhere.
    SET = "set"


class Patch(NamedTuple):
    """One hook.

    Attributes:
        target: the name of what is hooked.
        kind: how.
        hook: with what.
        reason: why.
        unneeded_with: the change of SGLang's that would make it unnecessary.
        since: the first known release of SGLang that it is for.
        until: the last one.
        parameters: what the target takes, where the hook names it: a call that gives more or other arguments would fail in the
            hook. None where the hook takes whatever it is given.
    """

    target: str
    kind: Union[HookType, Kind]
    hook: Callable
    reason: str
    unneeded_with: str
    since: str = releases.KNOWN[0]
    until: str = releases.KNOWN[-1]
    parameters: Optional[str] = None

    def holds(self, version: str) -> bool:
        """Whether it is for a known release."""
        index = releases.KNOWN.index
        return index(self.since) <= index(version) <= index(self.until)

    def owner(self) -> Tuple[Any, str]:
        """The class or module that holds the target, and the target's name in it."""
        owner, _, name = self.target.rpartition(".")
        return pkgutil.resolve_name(owner), name

    def engaged(self) -> bool:
        """Whether the hook runs when the target is called."""
        try:
            owner, name = self.owner()
        except (ImportError, AttributeError):
            return False
        return runs(getattr(owner, name, None), self.hook)

    def gone(self) -> bool:
        """Whether the installed SGLang has no such target."""
        try:
            owner, name = self.owner()
        except (ImportError, AttributeError):
            return True
        return not hasattr(owner, name)

    def unlike(self) -> Optional[str]:
        """The parameters of the target where they are not those that the hook was written for."""
        owner, name = self.owner()
        # `signature` looks behind the wrappers, SGLang's and others'.
        found = ", ".join(inspect.signature(getattr(owner, name)).parameters)
        return found if self.parameters not in (None, found) else None


_registered: List[Patch] = []


def register(patches: Iterable[Patch]) -> None:
    """Hand the patches to SGLang, which applies them once every plugin has registered its own."""
    for patch in patches:
        if patch.kind is Kind.SET:
            _set_attribute(patch)
        else:
            HookRegistry.register(patch.target, patch.hook, patch.kind)
        _registered.append(patch)


def _set_attribute(patch: Patch) -> None:
    """Put the hook, called with what was there and the arguments, in the place of a class's attribute."""
    if patch.gone():
        # `check_engaged` names it, as it does where `HookRegistry` found none.
        return
    owner, name = patch.owner()
    setattr(
        owner, name, staticmethod(functools.partial(patch.hook, getattr(owner, name)))
    )


def registered() -> Tuple[Patch, ...]:
    """The patches of this process."""
    return tuple(_registered)


def runs(function: Optional[Callable], hook: Callable) -> bool:
    """Whether `hook` is `function` or one of the wrappers around it."""
    while function is not None:
        if hook in (function, getattr(function, "func", None)):
            return True
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is hook for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def problems() -> List[str]:
    """What keeps MISA from working with the installed SGLang, a sentence each."""
    found = []
    if unknown := releases.problem(sglang_version):
        found.append(unknown)
    if not _registered:
        found.append("SGLang has not loaded the plugin here.")
    for patch in _registered:
        if not patch.engaged():
            found.append(f"the hook on {patch.target} did not engage.")
    return found


def check_engaged() -> None:
    """Check the patches in this process.

    Raises:
        RuntimeError: the installed SGLang is unknown, or a hook did not engage.
    """
    if found := problems():
        raise RuntimeError(
            f"--enable-misa in {process.description()}: {found[0]} `python -m sglang.srt.layers.misa.doctor` lists all "
            "checks."
        )


def indexers(model: torch.nn.Module) -> List[Indexer]:
    """The DSA indexers of a model."""
    return [module for module in model.modules() if isinstance(module, Indexer)]


def check_objects(model: torch.nn.Module, pool: Optional[Any]) -> None:
    """Check that the hooks run in a model's indexers, and in its KV pool if that is to have pooled keys, whatever their classes.

    Raises:
        RuntimeError: a class between the object and the hooked one has a method of its own, or is another indexer's.
    """
    found = indexers(model)
    # By their name: SGLang's newer ones (IndexerKPool, C4Indexer) have no base in common with this one.
    others = {
        type(module).__name__
        for module in model.modules()
        if "Indexer" in type(module).__name__ and not isinstance(module, Indexer)
    }
    if others:
        raise RuntimeError(
            f"--enable-misa: {type(model).__name__} has indexers of the class {', '.join(sorted(others))}, which MISA does "
            "not route; drop --enable-misa."
        )
    if not found:
        raise RuntimeError(
            f"--enable-misa: {type(model).__name__} has no DSA indexer to route."
        )
    if pool is not None and not hasattr(pool, "misa_pooled_keys"):
        raise RuntimeError(
            f"--enable-misa: a {type(pool).__name__} has no room for pooled keys."
        )
    for instance in found if pool is None else (pool, *found):
        for patch in _registered:
            owner, name = patch.owner()
            if not isinstance(owner, type) or not isinstance(instance, owner):
                continue
            if not runs(getattr(type(instance), name), patch.hook):
                raise RuntimeError(
                    f"--enable-misa: {type(instance).__name__}.{name} bypasses the hook on {patch.target}."
                )
