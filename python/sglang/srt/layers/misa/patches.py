"""Every place where MISA hooks into SGLang, and the check that the hooks engaged.

SGLang logs a plugin or a hook that fails and goes on without it. MISA must not: whoever asks for --enable-misa gets it or
gets no server. The table is therefore checked where the arguments are validated, and again in every scheduler on the
very objects that it built.
"""

from __future__ import annotations

import logging
import pkgutil
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch

from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
from sglang.srt.layers.misa import hooks, process, server_args
from sglang.srt.layers.misa.evaluation import (
    EVAL_SELECTION_ENV,
    SELECTIONS,
    eval_selection,
)
from sglang.srt.layers.misa.metrics import export
from sglang.srt.plugins.hook_registry import HookType
from sglang.version import __version__ as sglang_version

logger = logging.getLogger(__name__)

SUPPORTED_SGLANG = ("0.5.17",)


class Patch(NamedTuple):
    """One hook on SGLang: what is hooked, how, with what, and why."""

    target: str
    kind: HookType
    hook: Callable
    reason: str

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


def runs(function: Optional[Callable], hook: Callable) -> bool:
    """Whether `hook` is `function` or one of the wrappers around it."""
    while function is not None:
        if function is hook:
            return True
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents is hook for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def problems() -> List[str]:
    """What keeps MISA from working with the installed SGLang, a sentence each."""
    found = []
    if sglang_version not in SUPPORTED_SGLANG:
        found.append(
            f"SGLang {sglang_version} is installed; install sglang=={SUPPORTED_SGLANG[-1]}."
        )
    for patch in PATCHES:
        if not patch.engaged():
            found.append(f"the hook on {patch.target} did not engage.")
    return found


def check_engaged() -> None:
    """Check the table in this process.

    Raises:
        RuntimeError: the installed SGLang is unknown, or a hook did not engage.
    """
    if found := problems():
        raise RuntimeError(
            f"--enable-misa in {process.description()}: {found[0]} `python -m sglang.srt.layers.misa.doctor` lists all checks."
        )


def check_objects(model: torch.nn.Module, pool: Any) -> None:
    """Check that the hooks run in a model's indexers and its KV pool, whatever classes they are of.

    Raises:
        RuntimeError: a class between the object and the hooked one has a method of its own.
    """
    indexers = [module for module in model.modules() if isinstance(module, Indexer)]
    if not indexers or not hasattr(pool, "misa_pooled_keys"):
        raise RuntimeError(
            f"--enable-misa: {type(model).__name__} with a {type(pool).__name__} has no DSA indexer to route."
        )
    for instance in (pool, *indexers):
        for patch in PATCHES:
            owner, name = patch.owner()
            if not isinstance(owner, type) or not isinstance(instance, owner):
                continue
            if not runs(getattr(type(instance), name), patch.hook):
                raise RuntimeError(
                    f"--enable-misa: {type(instance).__name__}.{name} bypasses the hook on {patch.target}."
                )


def report(info: Dict[str, Any], scheduler: Any) -> Optional[Dict[str, Any]]:
    """After `Scheduler.get_init_info`: check what this scheduler built, log it and add it to the server's info.

    Raises:
        RuntimeError: a hook does not run in this scheduler.
    """
    config = server_args.misa_config(scheduler.server_args)
    if config is None:
        return None
    check_engaged()
    runner = scheduler.tp_worker.model_runner
    check_objects(runner.model, runner.token_to_kv_pool)
    pooled_keys_bytes = runner.token_to_kv_pool.misa_pooled_keys.nbytes
    size = pooled_keys_bytes / (1 << 30)
    evaluated = eval_selection()
    if evaluated is None:
        logger.info("MISA is on. %s, pooled keys: %.2f GB", config, size)
    else:
        logger.warning(
            "MISA is NOT what selects: %s=%s, for evaluation only (%s). %s",
            *(EVAL_SELECTION_ENV, evaluated, SELECTIONS[evaluated], config),
        )
    if scheduler.metrics_collector is not None:
        export(config, pooled_keys_bytes, scheduler.metrics_collector.labels)
    return {
        **info,
        "misa": {"pooled_keys_bytes": pooled_keys_bytes},
        "misa_eval_selection": evaluated,
    }


PATCHES = (
    Patch(
        "sglang.srt.server_args.ServerArgs.__init__",
        HookType.AROUND,
        server_args.initialize,
        "takes the arguments of --enable-misa",
    ),
    Patch(
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        HookType.AFTER,
        server_args.add_cli_args,
        "adds --enable-misa and --misa-* to the command line",
    ),
    Patch(
        "sglang.srt.server_args.ServerArgs.from_cli_args",
        HookType.AROUND,
        server_args.from_cli_args,
        "takes them from the command line: SGLang takes the fields of its own class",
    ),
    Patch(
        "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer._get_topk_ragged",
        HookType.AROUND,
        hooks.select_ragged,
        "selects in extend",
    ),
    Patch(
        "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer._get_topk_paged",
        HookType.AROUND,
        hooks.select_paged,
        "selects in decode",
    ),
    Patch(
        "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer._store_index_k_cache",
        HookType.AFTER,
        hooks.update_after_store,
        "pools the pages that the stored keys complete",
    ),
    Patch(
        "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer._fused_k_prepare_and_store",
        HookType.AFTER,
        hooks.update_after_fused_store,
        "the same where rope is interleaved (GLM-5): its kernel writes to the cache itself",
    ),
    Patch(
        "sglang.srt.mem_cache.memory_pool.DSATokenToKVPool._create_index_buffers",
        HookType.AFTER,
        hooks.create_pooled_keys,
        "allocates pooled keys beside index K",
    ),
    Patch(
        "sglang.srt.mem_cache.memory_pool.DSATokenToKVPool._clear_buffers",
        HookType.AFTER,
        hooks.clear_pooled_keys,
        "frees them with index K",
    ),
    Patch(
        "sglang.srt.mem_cache.memory_pool.DSATokenToKVPool.get_kv_size_bytes",
        HookType.AFTER,
        hooks.add_pooled_keys_size,
        "counts them in the reported size of the pool",
    ),
    Patch(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        HookType.AFTER,
        hooks.add_pooled_keys_cell_size,
        "counts them where the pool is sized",
    ),
    Patch(
        "sglang.srt.layers.attention.dsa_backend.DeepseekSparseAttnBackend.forward_extend",
        HookType.AFTER,
        hooks.record_attention,
        "records the attention that selections are measured by, with SGLANG_MISA_CAPTURE_DIR",
    ),
    Patch(
        "sglang.srt.managers.scheduler.Scheduler.get_init_info",
        HookType.AFTER,
        report,
        "checks the objects that the scheduler built",
    ),
)
