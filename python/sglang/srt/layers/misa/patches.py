"""Every place where MISA hooks into SGLang, in each release. Those of the evaluation are in `evaluation.patches`."""

from typing import Tuple

from sglang.srt.layers.misa import hooks, releases, server_args
from sglang.srt.layers.misa.patching import Kind, Patch
from sglang.srt.plugins.hook_registry import HookType
from sglang.version import __version__ as sglang_version

SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
INDEXER = "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer"
REPORTER = (
    "sglang.srt.managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter"
)
CONFIGURATOR = "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator"
POOL = "sglang.srt.mem_cache.memory_pool.DSATokenToKVPool"

PLUGIN_ARGUMENTS = "server arguments that plugins can declare"
INDEXER_BACKENDS = "a choice of indexer backend, as there is one of attention backends"
REPORTS = "a plugin can add to a server's information, and to its log and its metrics"
POOL_BUFFERS = "buffers of a pool, a row a page, that others can declare, counted and freed with its own"

TABLE = (
    Patch(
        f"{SERVER_ARGS}.__init__",
        HookType.AROUND,
        server_args.initialize,
        "takes the arguments of --enable-misa",
        PLUGIN_ARGUMENTS,
        until="0.5.17",
    ),
    Patch(
        f"{SERVER_ARGS}.resolve_once",
        HookType.AROUND,
        server_args.resolve_once,
        "checks them once they are resolved",
        PLUGIN_ARGUMENTS,
        since="0.5.23",
        parameters="self",
    ),
    Patch(
        "sglang.srt.entrypoints.engine.Engine.server_args_class",
        Kind.SET,
        server_args.engine_arguments,
        "takes them from a program: a record's class takes its own fields only",
        PLUGIN_ARGUMENTS,
        since="0.5.23",
    ),
    Patch(
        f"{SERVER_ARGS}.add_cli_args",
        HookType.AFTER,
        server_args.add_cli_args,
        "adds --enable-misa and --misa-* to the command line",
        PLUGIN_ARGUMENTS,
        parameters="parser",
    ),
    Patch(
        f"{SERVER_ARGS}.from_cli_args",
        HookType.AROUND,
        server_args.from_cli_args,
        "takes them from the command line: SGLang takes the fields of its own class",
        PLUGIN_ARGUMENTS,
    ),
    Patch(
        f"{INDEXER}._get_topk_ragged",
        HookType.AROUND,
        hooks.select_ragged,
        "selects in extend",
        INDEXER_BACKENDS,
        parameters="self, enable_dual_stream, forward_batch, layer_id, q_fp8, weights, metadata, topk_result",
    ),
    Patch(
        f"{INDEXER}._get_topk_paged",
        HookType.AROUND,
        hooks.select_paged,
        "selects in decode and in speculative verify",
        INDEXER_BACKENDS,
        parameters="self, forward_batch, layer_id, q_fp8, weights, metadata",
    ),
    Patch(
        f"{INDEXER}._store_index_k_cache",
        HookType.AFTER,
        hooks.update_after_store,
        "pools the pages that the stored keys complete",
        INDEXER_BACKENDS,
        parameters="self, forward_batch, layer_id, key, act_quant, out_cache_loc",
    ),
    Patch(
        f"{INDEXER}._fused_k_prepare_and_store",
        HookType.AFTER,
        hooks.update_after_fused_store,
        "the same where rope is interleaved (GLM-5): its kernel writes to the cache itself",
        INDEXER_BACKENDS,
        parameters="self, key_raw, positions, forward_batch, layer_id, act_quant, out_cache_loc",
    ),
    Patch(
        f"{POOL}._create_index_buffers",
        HookType.AFTER,
        hooks.create_pooled_keys,
        "allocates pooled keys beside index K",
        POOL_BUFFERS,
        until="0.5.17",
        parameters="self",
    ),
    Patch(
        f"{POOL}._create_index_key_cache",
        HookType.AFTER,
        hooks.create_pooled_keys_of_cache,
        "allocates pooled keys beside index K, which has a class of its own",
        POOL_BUFFERS,
        since="0.5.23",
        parameters="self",
    ),
    Patch(
        f"{POOL}._clear_buffers",
        HookType.AFTER,
        hooks.clear_pooled_keys,
        "frees them with index K",
        POOL_BUFFERS,
        parameters="self",
    ),
    Patch(
        f"{POOL}.get_kv_size_bytes",
        HookType.AFTER,
        hooks.add_pooled_keys_size,
        "counts them in the reported size of the pool",
        POOL_BUFFERS,
        parameters="self",
    ),
    Patch(
        f"{CONFIGURATOR}._compute_cell_size",
        HookType.AFTER,
        hooks.add_pooled_keys_cell_size,
        "counts them where the pool is sized",
        POOL_BUFFERS,
        until="0.5.17",
        parameters="self, kvc, num_layers",
    ),
    Patch(
        f"{CONFIGURATOR}._compute_dsa_indexer_cell_size",
        HookType.AFTER,
        hooks.add_to_index_k_cell_size,
        "counts them with index K where the pool is sized, and so in the layers that have it",
        POOL_BUFFERS,
        since="0.5.23",
    ),
    Patch(
        "sglang.srt.managers.scheduler.Scheduler.get_init_info",
        HookType.AFTER,
        hooks.report,
        "checks the objects that the scheduler built",
        "a plugin that fails ends the server that needs it, and can add to its information",
        parameters="self",
    ),
    Patch(
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        HookType.AFTER,
        hooks.report_rows,
        "adds the counts of rows and of audits to the server's information",
        REPORTS,
        parameters="self, recv_req",
    ),
    Patch(
        f"{REPORTER}.report_prefill_stats",
        HookType.AFTER,
        hooks.report_audits,
        "logs and exports what audits found, behind SGLang's own line",
        REPORTS,
    ),
    Patch(
        f"{REPORTER}.report_decode_stats",
        HookType.AFTER,
        hooks.report_audits,
        "the same in decode",
        REPORTS,
    ),
    Patch(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.can_run_graph",
        HookType.AROUND,
        hooks.audited_outside_of_the_graph,
        "runs an audited decode step eagerly",
        "a plugin can say which steps run eagerly",
        parameters="self, forward_batch",
    ),
)


def of_release(version: str) -> Tuple[Patch, ...]:
    """The table's hooks for a known release of SGLang."""
    return tuple(patch for patch in TABLE if patch.holds(version))


PATCHES = of_release(releases.closest(sglang_version))
