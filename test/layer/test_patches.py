"""A hook that did not engage is noticed, whichever it is."""

import ast
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
from sglang.srt.layers.misa import (
    doctor,
    environment,
    hooks,
    patches,
    patching,
    plugin,
    process,
    releases,
)
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.evaluation.patches import patches as evaluation_patches
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.version import __version__ as sglang_version


def test_all_hooks_engage():
    assert patching.problems() == []
    patching.check_engaged()


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda patch: patch.target)
def test_a_hook_that_did_not_engage(patch, monkeypatch, capsys):
    owner, name = patch.owner()
    original = getattr(getattr(owner, name), "__wrapped__", object)
    monkeypatch.setattr(owner, name, original)
    with pytest.raises(RuntimeError) as error:
        patching.check_engaged()
    assert patch.target in str(error.value)
    # SGLang runs as many processes: which of them was it?
    assert f"process {os.getpid()} (" in str(error.value)
    assert doctor.main() == 1
    assert f"FAILED {patch.kind.value:8} {patch.target}" in capsys.readouterr().out


# Every class has an __init__, if only that of `object`.
NAMED = [x for x in patches.PATCHES if not x.target.endswith(".__init__")]


@pytest.mark.parametrize("patch", NAMED, ids=lambda patch: patch.target)
def test_a_target_that_was_renamed(patch, monkeypatch, capsys):
    """SGLang logs that it found none and goes on; MISA names it and does not start."""
    owner, name = patch.owner()
    for holder in getattr(owner, "__mro__", [owner]):
        if name in vars(holder):
            value = vars(holder)[name]
            monkeypatch.setattr(holder, f"{name}_renamed", value, raising=False)
            monkeypatch.delattr(holder, name)
    # As in a new process, where the other hooks engage as they do here.
    monkeypatch.setattr(patching, "_registered", list(patching.registered()))
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    patching.register([patch])
    HookRegistry.apply_hooks()
    with pytest.raises(RuntimeError, match=f"the hook on {patch.target} did not"):
        patching.check_engaged()
    assert doctor.main() == 1
    assert f"FAILED {patch.kind.value:8} {patch.target}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "target", ["sglang.srt.no_such_module.f", "sglang.srt.server_args.NoSuchClass.f"]
)
def test_an_owner_that_is_gone(target, monkeypatch):
    patch = patches.PATCHES[0]._replace(target=target)
    monkeypatch.setattr(patching, "_registered", [patch])
    with pytest.raises(RuntimeError, match=f"{target} did not engage"):
        patching.check_engaged()


@pytest.mark.parametrize("version", ["0.5.18", "0.6.0"])
def test_an_unknown_sglang(version, monkeypatch, capsys):
    monkeypatch.setattr(patching, "sglang_version", version)
    known = f"SGLang {version} .* MISA knows 0.5.17 and 0.5.23; install"
    with pytest.raises(RuntimeError, match=known):
        patching.check_engaged()
    assert doctor.main() == 1
    assert re.search(known, capsys.readouterr().out)


@pytest.mark.parametrize("version", releases.KNOWN)
def test_each_release_has_its_hooks(version):
    """One on each target, and on those that the release has no others."""
    targets = [patch.target for patch in patches.of_release(version)]
    assert len(targets) == len(set(targets))
    pool = "sglang.srt.mem_cache.memory_pool.DSATokenToKVPool."
    assert (f"{pool}_create_index_buffers" in targets) == (version == "0.5.17")
    assert (f"{pool}_create_index_key_cache" in targets) == (version == "0.5.23")
    assert all(any(x.holds(y) for y in releases.KNOWN) for x in patches.TABLE)


def test_the_modules_of_the_releases_have_the_same_names():
    """Whoever uses one of them can use the others."""
    names = []
    for name in releases.MODULES.values():
        path = Path(releases.__file__).with_name(f"{name}.py")
        found = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign):
                found.add(node.target.id)
            elif isinstance(node, ast.ImportFrom):
                found |= {x.asname for x in node.names if x.asname}
        names.append({x for x in found if not x.startswith("_")})
    assert names[0] == names[1] > {"REFUSALS", "Record", "deals_rows_out"}
    for name in names[0]:
        assert name in releases.__doc__


@pytest.mark.parametrize("patch", patches.PATCHES, ids=lambda patch: patch.target)
def test_targets_take_what_the_hooks_take(patch, monkeypatch):
    assert not patch.gone() and patch.unlike() is None
    if patch.parameters is None:
        return
    owner, name = patch.owner()
    monkeypatch.setattr(owner, name, lambda self, another: None)
    assert patch.unlike() == "self, another"
    assert patch._replace(target=f"{patch.target}_gone").gone()


def test_a_process_without_the_plugin(monkeypatch, capsys):
    monkeypatch.setattr(patching, "_registered", [])
    with pytest.raises(RuntimeError, match="SGLang has not loaded the plugin here"):
        patching.check_engaged()
    assert doctor.main() == 1
    assert patches.PATCHES[0].target in capsys.readouterr().out


EVALUATION = [
    (environment.EVAL_SELECTION, "hisa", "selects otherwise"),
    (environment.CAPTURE_DIR, "records", "records what MISA chose"),
]


@pytest.mark.parametrize("variable, value, reason", EVALUATION)
def test_hooks_of_the_evaluation(variable, value, reason, monkeypatch, tmp_path):
    """They are registered where their variable is set, and create nothing before they run."""
    monkeypatch.chdir(tmp_path)
    for name in (environment.EVAL_SELECTION, environment.CAPTURE_DIR):
        monkeypatch.delenv(name, raising=False)
    assert evaluation_patches() == []
    monkeypatch.setenv(variable, value)
    assert reason in [patch.reason for patch in evaluation_patches()]
    for patch in evaluation_patches():
        owner, name = patch.owner()
        assert callable(getattr(owner, name))
    assert not list(tmp_path.iterdir())


def test_doctor_says_ready(capsys):
    assert doctor.main() == 0
    assert "MISA is ready." in capsys.readouterr().out


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="SGLang's indexer can be imported there"
)
def test_doctor_in_a_plain_shell():
    """Where SGLang's own indexer cannot be imported, that is what the doctor says."""
    from sglang_cpu_engine.launch import ENVIRONMENT

    env = {name: os.environ[name] for name in os.environ.keys() - ENVIRONMENT.keys()}
    command = [sys.executable, "-m", "sglang.srt.layers.misa.doctor"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 1
    first, known, _, *rest = result.stdout.splitlines()
    assert known == "a release that MISA knows"
    assert first.startswith(f"sglang {sglang_version}, torch ") and first.endswith(
        ", no GPU"
    )
    assert rest[0].startswith("FAILED the plugin does not load: ")
    assert "set SGLANG_USE_CPU_ENGINE=1" in rest[1]


def test_doctor_wants_kernels_on_a_gpu_only(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sgl_kernel_misa", None)
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        assert doctor.main() == gpu
        printed = capsys.readouterr().out
        state = "FAILED" if gpu else "unused"
        assert f"{state} kernels  sgl-kernel-misa" in printed
        assert ("MISA is ready." in printed) != gpu
        assert ("sgl-kernel-misa cannot be imported" in printed) == gpu


def test_doctor_finds_kernels_that_run(monkeypatch, capsys):
    kernels = SimpleNamespace(check_device=lambda: None)
    monkeypatch.setitem(sys.modules, "sgl_kernel_misa", kernels)
    assert doctor.main() == 0
    assert "ok     kernels  sgl-kernel-misa" in capsys.readouterr().out


def test_a_plugin_that_fails_to_load_ends_a_process_that_needs_it(monkeypatch):
    monkeypatch.setattr(patches, "PATCHES", None)
    monkeypatch.setattr(process, "requires_misa", False)
    with pytest.raises(TypeError):
        plugin.register()
    monkeypatch.setattr(process, "requires_misa", True)
    # Not an Exception: SGLang logs those and goes on.
    with pytest.raises(
        SystemExit, match=f"the plugin failed to load in process {os.getpid()}"
    ):
        plugin.register()


class Pool(DSATokenToKVPool):
    def __init__(self):
        self.misa_pooled_keys = None


class Model(torch.nn.Module):
    def __init__(self, indexer_class):
        super().__init__()
        self.indexer = indexer_class.__new__(indexer_class)
        torch.nn.Module.__init__(self.indexer)


def test_objects_of_the_hooked_classes_pass():
    patching.check_objects(Model(Indexer), Pool())
    patching.check_objects(Model(Indexer), None)


def test_a_subclass_with_a_method_of_its_own():
    class OtherIndexer(Indexer):
        def _get_topk_paged(self):
            pass

    class OtherPool(Pool):
        def get_kv_size_bytes(self):
            pass

    with pytest.raises(RuntimeError, match="OtherIndexer._get_topk_paged bypasses"):
        patching.check_objects(Model(OtherIndexer), Pool())
    with pytest.raises(RuntimeError, match="OtherPool.get_kv_size_bytes bypasses"):
        patching.check_objects(Model(Indexer), OtherPool())


@pytest.mark.parametrize("beside", [False, True])
def test_indexers_of_another_class(beside):
    """In all layers of a model, or in some."""

    class IndexerKPool(torch.nn.Module):
        pass

    model = Model(Indexer) if beside else torch.nn.Module()
    model.other = IndexerKPool()
    with pytest.raises(RuntimeError, match="indexers of the class IndexerKPool, which"):
        patching.check_objects(model, None)


def test_a_draft_model_is_checked_too(monkeypatch):
    """And its pool, whose size counts."""

    class OtherIndexer(Indexer):
        def _get_topk_paged(self):
            pass

    def runner(indexer_class, nbytes):
        pool = Pool()
        pool.misa_pooled_keys = SimpleNamespace(nbytes=nbytes)
        return SimpleNamespace(model=Model(indexer_class), token_to_kv_pool=pool)

    def scheduler(*draft_runners):
        draft_worker = SimpleNamespace(
            draft_worker=SimpleNamespace(draft_runners=list(draft_runners))
        )
        return SimpleNamespace(
            server_args=SimpleNamespace(misa_audit_interval=0),
            metrics_collector=None,
            tp_worker=SimpleNamespace(model_runner=runner(Indexer, 100)),
            draft_worker=draft_worker if draft_runners else None,
        )

    monkeypatch.setattr(hooks, "misa_config", lambda _: MisaConfig("pooled"))
    info = hooks.report({}, scheduler())
    assert info["misa"]["pooled_keys_bytes"] == 100
    info = hooks.report({}, scheduler(runner(Indexer, 10)))
    assert info["misa"]["pooled_keys_bytes"] == 110
    with pytest.raises(RuntimeError, match="OtherIndexer._get_topk_paged bypasses"):
        hooks.report({}, scheduler(runner(OtherIndexer, 10)))


def test_a_model_or_a_pool_without_an_indexer():
    with pytest.raises(RuntimeError, match="no DSA indexer"):
        patching.check_objects(torch.nn.Linear(1, 1), None)
    with pytest.raises(RuntimeError, match="a object has no room for pooled keys"):
        patching.check_objects(Model(Indexer), object())
