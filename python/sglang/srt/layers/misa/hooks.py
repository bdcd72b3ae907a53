"""What runs inside SGLang's own methods. `patches` says where each of these is hooked in.

Every hook leaves SGLang as it is when MISA is off.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

import torch

from sglang.srt.layers.misa.audit import AUDIT
from sglang.srt.layers.misa.batch import (
    Batch,
    attention_output,
    decode_batch,
    extend_batch,
    joined,
    pick,
    rows_up_to,
)
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.index_k_cache import BYTES_PER_KEY
from sglang.srt.layers.misa.indexer import MisaIndexer, Selection
from sglang.srt.layers.misa.metrics import ROWS, AuditMetrics, export
from sglang.srt.layers.misa.patching import check_engaged, check_objects, indexers
from sglang.srt.layers.misa.pooled_keys import BYTES_PER_TOKEN, PooledKeys
from sglang.srt.layers.misa.row_sharding import gather, pays, share_of
from sglang.srt.layers.misa.server_args import misa_config
from sglang.srt.model_executor.forward_context import get_token_to_kv_pool
from sglang.srt.runtime_context import get_parallel, get_server_args

if TYPE_CHECKING:
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
    from sglang.srt.layers.attention.dsa.dsa_indexer_metadata import DSAIndexerMetadata
    from sglang.srt.managers.io_struct import GetInternalStateReqOutput
    from sglang.srt.managers.scheduler_components.metrics_reporter import (
        SchedulerMetricsReporter,
    )
    from sglang.srt.mem_cache.index_key_cache import IndexKeyCache
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)


# The arguments that the configuration was last made of, and the configuration.
_active: Tuple[Any, Optional[MisaConfig]] = (None, None)


def active_config() -> Optional[MisaConfig]:
    """The configuration of this process's server, or None where MISA is off.

    Every layer's call asks for it. Resolved arguments do not change, so it is made once, and reads no environment afterwards.
    """
    global _active
    if (args := get_server_args()) is not _active[0]:
        _active = args, misa_config(args)
    return _active[1]


def _pools_keys() -> bool:
    config = active_config()
    return config is not None and config.pools_keys


# Selection


def misa_selects(config: MisaConfig, batch: Batch) -> bool:
    """Whether MISA selects for the rows of a batch, or SGLang's own indexer does, with all heads."""
    if batch.bounds is not None:
        return not config.min_context or batch.bounds[1] > config.min_context
    # Several rows a sequence, of a speculative verify or a draft extend, share what reading the keys costs.
    return config.decode == "misa" or batch.rows_per_seq > 1


@dataclass(frozen=True)
class Call:
    """The arguments of one call of SGLang's indexer; q and weights may have padding rows behind those of the batch."""

    indexer: Indexer
    forward_batch: ForwardBatch
    layer_id: int
    q: torch.Tensor
    weights: torch.Tensor
    metadata: DSAIndexerMetadata

    @property
    def topk(self) -> int:
        return self.indexer.index_topk

    @property
    def draft(self) -> bool:
        """Whether it is the draft model's, which counts its layers from 0 as well."""
        spec_info = self.forward_batch.spec_info
        return spec_info is not None and spec_info.is_draft_input()

    @property
    def forced(self) -> Dict[str, int]:
        """The arguments of `reference.force`."""
        return {
            "init_tokens": self.indexer.num_init_tokens,
            "local_tokens": self.indexer.num_local_tokens,
        }

    @property
    def pooled_keys(self) -> Optional[torch.Tensor]:
        """The layer's page means; None where there are none."""
        if not _pools_keys():
            return None
        pool = get_token_to_kv_pool()
        return pool.misa_pooled_keys.layers[self.layer_id - pool.start_layer]

    def tensors(self, rows: int) -> Dict[str, torch.Tensor]:
        """The tensors that `MisaIndexer.select` takes, of the first `rows` rows."""
        pool = get_token_to_kv_pool()
        return {
            "q": self.q[:rows],
            "weights": self.weights[:rows].squeeze(-1),
            "index_k": pool.get_index_k_with_scale_buffer(self.layer_id),
            "pooled_keys": self.pooled_keys,
        }


def select_ragged(
    original,
    indexer,
    enable_dual_stream,
    forward_batch,
    layer_id,
    q_fp8,
    weights,
    metadata,
    topk_result=None,
) -> torch.Tensor:
    """Around `Indexer._get_topk_ragged` (extend)."""
    args = enable_dual_stream, forward_batch, layer_id, q_fp8, weights, metadata
    if (config := active_config()) is None:
        return original(indexer, *args, topk_result)
    batch = extend_batch(forward_batch, metadata)
    if not misa_selects(config, batch):
        ROWS.add("dsa", len(batch.lengths))
        return original(indexer, *args, topk_result)
    call = Call(indexer, forward_batch, layer_id, q_fp8, weights, metadata)
    return _selected(call, config, batch, topk_result)


def select_paged(
    original, indexer, forward_batch, layer_id, q_fp8, weights, metadata
) -> torch.Tensor:
    """Around `Indexer._get_topk_paged` (decode, target verify, draft extend)."""
    args = indexer, forward_batch, layer_id, q_fp8, weights, metadata
    if (config := active_config()) is None:
        return original(*args)
    batch = decode_batch(metadata)
    if not misa_selects(config, batch):
        return original(*args)
    call = Call(*args)
    return _selected(call, config, batch)


def _selected(
    call: Call, config: MisaConfig, batch: Batch, out: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """What the sparse attention takes, in `out` where there is one: int32 [rows of q or more, topk].

    Padding rows keep -1: the sparse attention reads nothing.
    """
    rows = len(batch.lengths)
    indices = call.q.new_empty(0, call.topk, dtype=torch.int32)
    if rows:
        output, offsets = attention_output(call.metadata)
        offsets = None if offsets is None else offsets[:rows]
        indices = _select_all(call, config, batch, output, offsets)
    if out is None:
        if rows == len(call.q):
            return indices
        out = indices.new_full((len(call.q), call.topk), -1)
    out[:rows] = indices
    return out


def sharing(batch: Batch) -> Optional[GroupCoordinator]:
    """The ranks that share the rows of a batch; None where each selects for all of its rows."""
    if batch.bounds is None or get_parallel().attn_tp_size == 1:
        return None
    group = get_parallel().attn_tp_group
    shared = pays(len(batch.lengths), batch.bounds[1], group.world_size)
    return group if shared else None


def _select_all(
    call: Call,
    config: MisaConfig,
    batch: Batch,
    output: str,
    offsets: Optional[torch.Tensor],
) -> torch.Tensor:
    """What `select` chooses for the rows of a batch, by this rank or by those that share them -> int32 [T, topk]."""
    if batch.spans is None:
        return select(call, config, batch, output, offsets).indices
    rows, group = len(batch.lengths), sharing(batch)
    if group is None:
        indices = _select_own(call, config, batch, output, offsets)
    else:
        mine = share_of(rows, group.world_size, group.rank_in_group)
        part = _part(call, batch, batch.within(mine), offsets)
        indices = gather(_select_own(config=config, output=output, **part), rows, group)
    # Every rank counts all rows, whoever selected for them: SGLang exports what one rank of a group has counted.
    by_all = rows
    if config.active_heads < call.q.shape[1]:
        by_all = rows_up_to(batch.spans, config.dense_up_to(call.topk))
    ROWS.add("all_heads", by_all)
    ROWS.add("misa", rows - by_all)
    return indices


def _part(
    call: Call, batch: Batch, rows: List[slice], offsets: Optional[torch.Tensor]
) -> Dict[str, Any]:
    """The arguments of `_select_own` for some rows of each sequence."""
    call = replace(call, q=pick(call.q, rows), weights=pick(call.weights, rows))
    offsets = None if offsets is None else pick(offsets, rows)
    return {"call": call, "batch": batch.part(rows), "offsets": offsets}


def _select_own(
    call: Call,
    config: MisaConfig,
    batch: Batch,
    output: str,
    offsets: Optional[torch.Tensor],
) -> torch.Tensor:
    """What this rank selects for the rows of an extend batch, by all heads for those that see too few tokens."""
    assert batch.bounds is not None, "in decode no row is told apart"
    num_heads, length = call.q.shape[1], config.dense_up_to(call.topk)
    if batch.bounds[0] > length or config.active_heads >= num_heads:
        return select(call, config, batch, output, offsets).indices
    indices = call.q.new_empty(len(batch.lengths), call.topk, dtype=torch.int32)
    all_heads = replace(config, active_heads=num_heads)
    for rows, scoring in zip(batch.cut(length), (all_heads, config)):
        if not (pieces := joined(rows)):
            continue
        part = _part(call, batch, rows, offsets)
        selected = select(config=scoring, output=output, **part).indices
        sizes = [piece.stop - piece.start for piece in pieces]
        for piece, own in zip(pieces, selected.split(sizes)):
            indices[piece] = own
    return indices


def select(
    call: Call,
    config: MisaConfig,
    batch: Batch,
    output: str,
    offsets: Optional[torch.Tensor],
) -> Selection:
    """Select for the rows of a batch; see `MisaIndexer.select`.

    The evaluation hooks in here, where MISA is on. Of rows that are shared, a rank sees its share.
    """
    indexer = MisaIndexer(config=config, topk=call.topk, forced=call.forced)
    tensors = call.tensors(len(batch.lengths))
    given = {**tensors, "batch": batch, "output": output, "offsets": offsets}
    selection = indexer.select(**given)
    if AUDIT.interval and AUDIT.is_due(call.indexer, batch):
        AUDIT.compare(call.layer_id, indexer, selection, **given)
    return selection


# The audit


def audited_outside_of_the_graph(original, graphs, forward_batch: ForwardBatch) -> bool:
    """Around `DecodeCudaGraphRunner.can_run_graph`: an audited decode step runs eagerly, and so do ranks that idle in it."""
    if (
        AUDIT.interval
        and forward_batch.forward_mode.is_decode_or_idle()
        and AUDIT.decode_is_due()
    ):
        return False
    return original(graphs, forward_batch)


def report_audits(_, reporter: SchedulerMetricsReporter, *args, **kwargs) -> None:
    """After `SchedulerMetricsReporter.report_prefill_stats` and `report_decode_stats`."""
    if AUDIT.interval:
        AUDIT.collect(log=reporter.is_stats_logging_rank)


def start_audit(scheduler: Any, config: MisaConfig) -> None:
    """Audit the target model's layers from now on, if the server's arguments ask for it."""
    args, collector = scheduler.server_args, scheduler.metrics_collector
    if not args.misa_audit_interval:
        return
    runner = scheduler.tp_worker.model_runner
    AUDIT.start(
        args.misa_audit_interval,
        indexers=frozenset(indexers(runner.model)),
        step=lambda: runner.forward_pass_id,
        # A speculative step's metadata are made for a graph or not before the step is counted.
        decode=config.decode == "misa" and args.speculative_algorithm is None,
        export=None if collector is None else AuditMetrics(collector.labels).export,
    )


# Pooled keys


def create_pooled_keys(_, pool: DSATokenToKVPool) -> None:
    """After `DSATokenToKVPool._create_index_buffers`."""
    if _pools_keys():
        pool.misa_pooled_keys = PooledKeys(pool.index_k_with_scale_buffer)


def create_pooled_keys_of_cache(index_keys: IndexKeyCache, pool) -> None:
    """After `DSATokenToKVPool._create_index_key_cache`. A layer without index K has a buffer of no pages, and no means."""
    if _pools_keys():
        pool.misa_pooled_keys = PooledKeys(index_keys.buffer)


def clear_pooled_keys(_, pool: DSATokenToKVPool) -> None:
    """After `DSATokenToKVPool._clear_buffers`."""
    if _pools_keys():
        del pool.misa_pooled_keys


def add_pooled_keys_size(num_bytes: int, pool: DSATokenToKVPool) -> Optional[int]:
    """After `DSATokenToKVPool.get_kv_size_bytes`."""
    if not _pools_keys():
        return None
    return num_bytes + pool.misa_pooled_keys.nbytes


def add_pooled_keys_cell_size(
    bytes_per_token: int, configurator, kvc, num_layers: int
) -> Optional[int]:
    """After `DefaultPoolConfigurator._compute_cell_size`, which counts all layers."""
    if not _pools_keys():
        return None
    return bytes_per_token + BYTES_PER_TOKEN * num_layers


def add_to_index_k_cell_size(bytes_per_token: int, *args, **kwargs) -> Optional[int]:
    """After `DefaultPoolConfigurator._compute_dsa_indexer_cell_size`, which counts index K in the layers that have it."""
    if not _pools_keys():
        return None
    return bytes_per_token + BYTES_PER_TOKEN * (bytes_per_token // BYTES_PER_KEY)


def update_after_store(
    _, indexer, forward_batch, layer_id, key, *, act_quant=None, out_cache_loc=None
) -> None:
    """After `Indexer._store_index_k_cache`."""
    _update_pooled_keys(forward_batch, layer_id, out_cache_loc)


def update_after_fused_store(
    _,
    indexer,
    key_raw,
    positions,
    forward_batch,
    layer_id,
    act_quant,
    out_cache_loc=None,
) -> None:
    """After `Indexer._fused_k_prepare_and_store` (interleaved rope)."""
    _update_pooled_keys(forward_batch, layer_id, out_cache_loc)


def _update_pooled_keys(
    forward_batch: ForwardBatch, layer_id: int, slots: Optional[torch.Tensor]
) -> None:
    if not _pools_keys():
        return
    pool = get_token_to_kv_pool()
    pool.misa_pooled_keys.update(
        layer_id - pool.start_layer,
        pool.get_index_k_with_scale_buffer(layer_id),
        forward_batch.out_cache_loc if slots is None else slots,
    )


# Start-up


def report(info: Dict[str, Any], scheduler: Any) -> Optional[Dict[str, Any]]:
    """After `Scheduler.get_init_info`: check what this scheduler built, log it and add it to the server's info.

    Raises:
        RuntimeError: a hook does not run in this scheduler.
    """
    config = misa_config(scheduler.server_args)
    if config is None:
        return None
    check_engaged()
    runners = [scheduler.tp_worker.model_runner]
    if scheduler.draft_worker is not None:
        # Speculative decoding: the draft model has indexers and a pool of its own.
        runners += scheduler.draft_worker.draft_worker.draft_runners
    size = 0
    for runner in runners:
        pool = runner.token_to_kv_pool
        check_objects(runner.model, pool if config.pools_keys else None)
        if config.pools_keys:
            size += pool.misa_pooled_keys.nbytes
    announce(config, size)
    if scheduler.metrics_collector is not None:
        export(config, size, scheduler.metrics_collector.labels)
    start_audit(scheduler, config)
    return {**info, "misa": {**asdict(config), "pooled_keys_bytes": size}}


def announce(config: MisaConfig, pooled_keys_bytes: int) -> None:
    """Log what selects."""
    size = pooled_keys_bytes / (1 << 30)
    logger.info("MISA is on. %s, pooled keys: %.2f GB", config, size)


def report_rows(state: GetInternalStateReqOutput, scheduler: Any, _) -> None:
    """After `Scheduler.get_internal_state`: add what `metrics.ROWS` and the audit counted so far."""
    if misa_config(scheduler.server_args) is None:
        return
    state.internal_state["misa_rows"] = dict(ROWS.counts)
    if AUDIT.interval:
        AUDIT.collect(log=scheduler.metrics_reporter.is_stats_logging_rank)
        state.internal_state["misa_audit"] = [
            {"layer": layer_id, **asdict(counts)}
            for layer_id, counts in sorted(AUDIT.layers.items())
        ]
