"""What runs in SGLang's methods, and in MISA's own hooks, for evaluation. `patches` says where, and when."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Optional, Tuple, Union

import torch

from sglang.srt.layers.misa import environment
from sglang.srt.layers.misa.batch import (
    Batch,
    attention_output,
    decode_batch,
    extend_batch,
    extend_rids,
)
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.evaluation.capture import Recorder
from sglang.srt.layers.misa.evaluation.selections import EvaluationIndexer
from sglang.srt.layers.misa.hooks import Call, active_config, misa_selects
from sglang.srt.layers.misa.indexer import Selection
from sglang.srt.layers.misa.selection import to_output
from sglang.srt.layers.misa.server_args import misa_config
from sglang.srt.model_executor.forward_context import get_token_to_kv_pool

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)


class OtherSelection:
    """Selects by `name`, one of `environment.SELECTIONS`, instead of MISA."""

    def __init__(self, name: str):
        self.name = name
        # The heaviest heads of each layer of the draft model (True) and of the target model, once there are any.
        self.heaviest: Dict[bool, Dict[int, torch.Tensor]] = {False: {}, True: {}}
        # The batch of the last selection that is free, which is so in all layers but the first.
        self.selected: Optional[Tuple[ForwardBatch, Selection]] = None

    def select(
        self,
        call: Call,
        config: MisaConfig,
        batch: Batch,
        output: str,
        offsets: Optional[torch.Tensor],
    ) -> Selection:
        """In place of `misa.hooks.select`."""
        if self.selected and self.selected[0] is call.forward_batch:
            return self.selected[1]
        indexer = EvaluationIndexer(
            name=self.name,
            active_heads=config.active_heads,
            topk=call.topk,
            forced=call.forced,
            layer_id=call.layer_id,
            heaviest=self.heaviest[call.draft],
        )
        tensors = call.tensors(len(batch.lengths))
        selection = indexer.select(
            **tensors, batch=batch, output=output, offsets=offsets
        )
        if self.name == "free":
            self.selected = call.forward_batch, selection
        return selection

    def sharing(self, batch: Batch) -> None:
        """In place of `misa.hooks.sharing`: every rank selects for all rows, since the heaviest heads are those of the first rows."""

    def announce(self, config: MisaConfig, pooled_keys_bytes: int) -> None:
        """In place of `misa.hooks.announce`."""
        logger.warning(
            "MISA is NOT what selects: %s=%s, for evaluation only (%s). %s",
            *(environment.EVAL_SELECTION, self.name),
            *(environment.SELECTIONS[self.name], config),
        )

    def report(self, info: Dict[str, Any], scheduler: Any) -> Optional[Dict[str, Any]]:
        """After `Scheduler.get_init_info`."""
        if misa_config(scheduler.server_args) is None:
            return None
        return {**info, "misa_eval_selection": self.name}


class Recording:
    """Records calls of the indexer and of the attention into a directory."""

    def __init__(self, directory: Union[str, Path]):
        self.recorder = Recorder(directory)

    def select(
        self,
        original: Callable[..., Selection],
        call: Call,
        config: MisaConfig,
        batch: Batch,
        output: str,
        offsets: Optional[torch.Tensor],
    ) -> Selection:
        """Around `misa.hooks.select`."""
        if not _is_recorded(call.forward_batch):
            return original(call, config, batch, output, offsets)
        # A record holds positions.
        selection = original(call, config, batch, "positions", None)
        self._record(call, batch, selection, config.router)
        indices = to_output(
            selection.indices, output, batch.page_table, batch.cu_rows, offsets
        )
        return replace(selection, indices=indices)

    def after_ragged(
        self,
        result,
        indexer,
        enable_dual_stream,
        forward_batch,
        layer_id,
        q_fp8,
        weights,
        metadata,
        topk_result=None,
    ) -> None:
        """After `Indexer._get_topk_ragged` (extend)."""
        call = Call(indexer, forward_batch, layer_id, q_fp8, weights, metadata)
        self._record_dsa(call, extend_batch(forward_batch, metadata), result)

    def after_paged(
        self, result, indexer, forward_batch, layer_id, q_fp8, weights, metadata
    ) -> None:
        """After `Indexer._get_topk_paged` (decode, target verify, draft extend)."""
        call = Call(indexer, forward_batch, layer_id, q_fp8, weights, metadata)
        self._record_dsa(call, decode_batch(metadata), result)

    def _record_dsa(self, call: Call, batch: Batch, result: torch.Tensor) -> None:
        """Record what SGLang's own indexer chose.

        Raises:
            RuntimeError: it chose slots of the cache, not positions.
        """
        config = active_config()
        if config is not None and misa_selects(config, batch):
            return
        if not _is_recorded(call.forward_batch):
            return
        if attention_output(call.metadata)[0] != "positions":
            raise RuntimeError(
                f"{environment.CAPTURE_DIR} records positions; set SGLANG_DSA_FUSE_TOPK=false."
            )
        self._record(call, batch, Selection(result), router=None)

    def _record(
        self,
        call: Call,
        batch: Batch,
        selection: Selection,
        router: Optional[str],
    ) -> None:
        """Record every request's rows."""
        pool = get_token_to_kv_pool()
        decode, forward_batch = batch.bounds is None, call.forward_batch
        rids = forward_batch.rids if decode else extend_rids(forward_batch)
        # Sequences behind those of the requests are padding, of data parallelism.
        for (index, rows), rid in zip(batch.sequences(), rids):
            if rows.start == rows.stop:
                continue
            heads, shared_q, shared_scale = (
                None if x is None else x[rows]
                for x in (selection.heads, selection.shared_q, selection.shared_scale)
            )
            self.recorder.record(
                layer_id=call.layer_id,
                rid=rid,
                draft=call.draft,
                decode=decode,
                router=router,
                q=call.q[rows],
                weights=call.weights[rows].squeeze(-1),
                lengths=batch.lengths[rows],
                index_k=pool.get_index_k_with_scale_buffer(call.layer_id),
                page_table=batch.page_table[index],
                pooled_keys=None if router is None else call.pooled_keys,
                heads=heads,
                shared_q=shared_q,
                shared_scale=shared_scale,
                positions=selection.indices[rows],
            )

    def after_attention(
        self, _, backend, q, k, v, layer, forward_batch, *args, q_rope=None, **kwargs
    ) -> None:
        """After `DeepseekSparseAttnBackend.forward_extend`: record what the attention was given.

        Nothing is recorded of dense attention, nor where the kernel rotates q itself or the latent cache is quantized, nor of
        speculative decoding and the draft model.
        """
        if q_rope is None or not _is_recorded(forward_batch):
            return
        if forward_batch.spec_info is not None:
            return
        if kwargs.get("cos_sin_cache") is not None:
            return
        latent = get_token_to_kv_pool().get_key_buffer(layer.layer_id)
        if latent.dtype != q.dtype:
            return
        heads, width = layer.tp_q_head_num, layer.v_head_dim
        parts = q.view(-1, heads, width), q_rope.view(-1, heads, layer.head_dim - width)
        q = torch.cat(parts, dim=-1)
        metadata = backend.get_indexer_metadata(layer.layer_id, forward_batch)
        batch = extend_batch(forward_batch, metadata)
        sequences = zip(batch.sequences(), extend_rids(forward_batch))
        for (index, rows), rid in sequences:
            self.recorder.record_attention(
                layer_id=layer.layer_id,
                rid=rid,
                q=q[rows],
                lengths=batch.lengths[rows],
                latent=latent,
                page_table=batch.page_table[index],
                scaling=layer.scaling,
            )


def _is_recorded(forward_batch: ForwardBatch) -> bool:
    # The warm-up of a CUDA graph belongs to no request.
    return forward_batch.rids is not None and not _is_capturing()


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
