"""What runs inside SGLang's own methods. `patches` says where each of these is hooked in.

Every hook leaves SGLang as it is when MISA is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, Optional

import torch

from sglang.srt.layers.misa.batch import (
    Batch,
    attention_output,
    decode_batch,
    extend_batch,
)
from sglang.srt.layers.misa.capture import CAPTURE_DIR_ENV, Recorder, active_recorder
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.evaluation import EvaluationIndexer, eval_selection
from sglang.srt.layers.misa.indexer import MisaIndexer, Selection
from sglang.srt.layers.misa.pooled_keys import BYTES_PER_TOKEN, PooledKeys
from sglang.srt.layers.misa.selection import to_output
from sglang.srt.layers.misa.server_args import misa_config
from sglang.srt.model_executor.forward_context import get_token_to_kv_pool
from sglang.srt.runtime_context import get_server_args

if TYPE_CHECKING:
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
    from sglang.srt.layers.attention.dsa.dsa_indexer_metadata import DSAIndexerMetadata
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


def _config() -> Optional[MisaConfig]:
    return misa_config(get_server_args())


# Selection


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
    call = _Call(indexer, forward_batch, layer_id, q_fp8, weights, metadata)
    if (config := _config()) is not None:
        return call.select(config, extend_batch(metadata), topk_result)
    result = original(
        indexer,
        enable_dual_stream,
        forward_batch,
        layer_id,
        q_fp8,
        weights,
        metadata,
        topk_result,
    )
    call.record_dsa(extend_batch, result)
    return result


def select_paged(
    original, indexer, forward_batch, layer_id, q_fp8, weights, metadata
) -> torch.Tensor:
    """Around `Indexer._get_topk_paged` (decode)."""
    call = _Call(indexer, forward_batch, layer_id, q_fp8, weights, metadata)
    if (config := _config()) is not None:
        return call.select(config, decode_batch(metadata))
    result = original(indexer, forward_batch, layer_id, q_fp8, weights, metadata)
    call.record_dsa(decode_batch, result)
    return result


@dataclass
class _Call:
    """The arguments of one call of SGLang's indexer."""

    indexer: Indexer
    forward_batch: ForwardBatch
    layer_id: int
    q: torch.Tensor
    weights: torch.Tensor
    metadata: DSAIndexerMetadata

    @property
    def recorder(self) -> Optional[Recorder]:
        # The warm-up of a CUDA graph belongs to no request.
        return None if self.forward_batch.rids is None else active_recorder()

    def select(
        self, config: MisaConfig, batch: Batch, out: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """Select for every row, into `out` where there is one: int32 [rows of q or more, topk]."""
        topk, rows = self.indexer.index_topk, len(batch.lengths)
        if rows == 0:
            return self._padded(self.q.new_empty(0, topk, dtype=torch.int32), out)
        forced = {
            "init_tokens": self.indexer.num_init_tokens,
            "local_tokens": self.indexer.num_local_tokens,
        }
        pool = get_token_to_kv_pool()
        pooled_keys = pool.misa_pooled_keys.layers[self.layer_id - pool.start_layer]
        output, offsets = attention_output(self.metadata)
        offsets = None if offsets is None else offsets[:rows]
        recorder = self.recorder
        indexer = MisaIndexer(config, topk, forced)
        if (name := eval_selection()) is not None:
            heads = config.active_heads
            indexer = EvaluationIndexer(name, heads, topk, forced, self.layer_id)
        selection = indexer.select(
            # Rows behind those of the batch are padding.
            self.q[:rows],
            self.weights[:rows].squeeze(-1),
            pool.get_index_k_with_scale_buffer(self.layer_id),
            pooled_keys,
            batch,
            # A record holds positions.
            *((output, offsets) if recorder is None else ("positions",)),
        )
        indices = selection.indices
        if recorder is not None:
            self._record(recorder, batch, selection, pooled_keys)
            indices = to_output(
                indices, output, batch.page_table, batch.cu_rows, offsets
            )
        return self._padded(indices, out)

    def _padded(
        self, indices: torch.Tensor, out: Optional[torch.Tensor]
    ) -> torch.Tensor:
        """The indices with as many rows as q, or in `out`; padding rows keep -1: the sparse attention reads nothing."""
        if out is None:
            if len(indices) == len(self.q):
                return indices
            out = indices.new_full((len(self.q), indices.shape[1]), -1)
        out[: len(indices)] = indices
        return out

    def record_dsa(
        self, batch: Callable[[DSAIndexerMetadata], Batch], result: torch.Tensor
    ) -> None:
        """Record what SGLang's own indexer chose.

        Raises:
            RuntimeError: it chose slots of the cache, not positions.
        """
        if active_recorder() is None:
            return
        if attention_output(self.metadata)[0] != "positions":
            raise RuntimeError(
                f"{CAPTURE_DIR_ENV} records positions; set SGLANG_DSA_FUSE_TOPK=false."
            )
        if self.recorder is not None:
            self._record(self.recorder, batch(self.metadata), Selection(result))

    def _record(
        self,
        recorder: Recorder,
        batch: Batch,
        selection: Selection,
        pooled_keys: Optional[torch.Tensor] = None,
    ) -> None:
        """Record every sequence's rows, those that all heads scored by themselves."""
        for index, rows in batch.sequences():
            parts = [(rows, selection.heads)]
            if selection.dense is not None:
                # The first rows of a sequence are those that see the fewest tokens.
                cut = rows.start + int(selection.dense[rows].sum())
                parts = [
                    (slice(rows.start, cut), None),
                    (slice(cut, rows.stop), selection.heads),
                ]
            for part, heads in parts:
                if part.start == part.stop:
                    continue
                recorder.record(
                    layer_id=self.layer_id,
                    rid=self.forward_batch.rids[index],
                    q=self.q[part],
                    weights=self.weights[part].squeeze(-1),
                    lengths=batch.lengths[part],
                    index_k=get_token_to_kv_pool().get_index_k_with_scale_buffer(
                        self.layer_id
                    ),
                    page_table=batch.page_table[index],
                    pooled_keys=pooled_keys,
                    heads=None if heads is None else heads[part],
                    positions=selection.indices[part],
                )


def record_attention(
    _, backend, q, k, v, layer, forward_batch, *args, q_rope=None, **kwargs
) -> None:
    """After `DeepseekSparseAttnBackend.forward_extend`: record what the attention was given.

    Nothing is recorded of dense attention, nor where the kernel rotates q itself or the latent cache is quantized.
    """
    recorder = active_recorder()
    if recorder is None or q_rope is None or forward_batch.rids is None:
        return
    if kwargs.get("cos_sin_cache") is not None:
        return
    latent = get_token_to_kv_pool().get_key_buffer(layer.layer_id)
    if latent.dtype != q.dtype:
        return
    heads, width = layer.tp_q_head_num, layer.v_head_dim
    parts = q.view(-1, heads, width), q_rope.view(-1, heads, layer.head_dim - width)
    q = torch.cat(parts, dim=-1)
    batch = extend_batch(backend.get_indexer_metadata(layer.layer_id, forward_batch))
    for index, rows in batch.sequences():
        recorder.record_attention(
            layer_id=layer.layer_id,
            rid=forward_batch.rids[index],
            q=q[rows],
            lengths=batch.lengths[rows],
            latent=latent,
            page_table=batch.page_table[index],
            scaling=layer.scaling,
        )


# Pooled keys


def create_pooled_keys(_, pool: DSATokenToKVPool) -> None:
    """After `DSATokenToKVPool._create_index_buffers`."""
    if _config() is not None:
        pool.misa_pooled_keys = PooledKeys(pool.index_k_with_scale_buffer)


def clear_pooled_keys(_, pool: DSATokenToKVPool) -> None:
    """After `DSATokenToKVPool._clear_buffers`."""
    if _config() is not None:
        del pool.misa_pooled_keys


def add_pooled_keys_size(num_bytes: int, pool: DSATokenToKVPool) -> Optional[int]:
    """After `DSATokenToKVPool.get_kv_size_bytes`."""
    if _config() is not None:
        return num_bytes + pool.misa_pooled_keys.nbytes


def add_pooled_keys_cell_size(
    bytes_per_token: int, configurator, kvc, num_layers: int
) -> Optional[int]:
    """After `DefaultPoolConfigurator._compute_cell_size`, which counts all layers."""
    if _config() is not None:
        return bytes_per_token + BYTES_PER_TOKEN * num_layers


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
    if _config() is None:
        return
    pool = get_token_to_kv_pool()
    pool.misa_pooled_keys.update(
        layer_id - pool.start_layer,
        pool.get_index_k_with_scale_buffer(layer_id),
        forward_batch.out_cache_loc if slots is None else slots,
    )
