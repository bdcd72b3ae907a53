"""What runs inside SGLang's own methods. `patches` says where each of these is hooked in.

Every hook leaves SGLang as it is when MISA is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Iterable, Optional

import torch

from sglang.srt.layers.misa.capture import CAPTURE_DIR_ENV, active_recorder
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.indexer import (
    MisaIndexer,
    Sequence,
    is_fused,
    paged_sequences,
    ragged_sequences,
    to_attention_indices,
)
from sglang.srt.layers.misa.pooled_keys import BYTES_PER_TOKEN, PooledKeys
from sglang.srt.model_executor.forward_context import get_token_to_kv_pool
from sglang.srt.runtime_context import get_server_args

if TYPE_CHECKING:
    from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
    from sglang.srt.layers.attention.dsa.dsa_indexer_metadata import DSAIndexerMetadata
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


def _config() -> Optional[MisaConfig]:
    return MisaConfig.from_server_args(get_server_args())


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
        return call.select(config, ragged_sequences(metadata), topk_result)
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
    call.record_dsa(ragged_sequences(metadata), result)
    return result


def select_paged(
    original, indexer, forward_batch, layer_id, q_fp8, weights, metadata
) -> torch.Tensor:
    """Around `Indexer._get_topk_paged` (decode)."""
    call = _Call(indexer, forward_batch, layer_id, q_fp8, weights, metadata)
    if (config := _config()) is not None:
        return call.select(config, paged_sequences(metadata))
    result = original(indexer, forward_batch, layer_id, q_fp8, weights, metadata)
    call.record_dsa(paged_sequences(metadata), result)
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

    def select(
        self,
        config: MisaConfig,
        sequences: Iterable[Sequence],
        out: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Select for every sequence, into `out` where there is one: int32 [rows of q or more, topk]."""
        topk = self.indexer.index_topk
        if out is None:
            # Padding rows keep -1: the sparse attention reads nothing for them.
            out = self.q.new_full((len(self.q), topk), -1, dtype=torch.int32)
        forced = {
            "init_tokens": self.indexer.num_init_tokens,
            "local_tokens": self.indexer.num_local_tokens,
        }
        misa = MisaIndexer(config, topk, forced)
        pool = get_token_to_kv_pool()
        index_k = pool.get_index_k_with_scale_buffer(self.layer_id)
        pooled_keys = pool.misa_pooled_keys.layers[self.layer_id - pool.start_layer]
        lengths = self.metadata.get_seqlens_expanded()
        for sequence in sequences:
            for rows, selection in misa.select_sequence(
                self.q,
                self.weights.squeeze(-1),
                index_k,
                pooled_keys,
                lengths,
                sequence,
            ):
                out[rows] = to_attention_indices(
                    selection.positions, rows, sequence, self.metadata
                )
                self._record(
                    sequence,
                    rows,
                    selection.positions,
                    heads=selection.heads,
                    pooled_keys=pooled_keys,
                )
        return out

    def record_dsa(self, sequences: Iterable[Sequence], result: torch.Tensor) -> None:
        """Record what SGLang's own indexer chose.

        Raises:
            RuntimeError: it chose slots of the cache, not positions.
        """
        if active_recorder() is None:
            return
        if is_fused(self.metadata):
            raise RuntimeError(
                f"{CAPTURE_DIR_ENV} records positions; set SGLANG_DSA_FUSE_TOPK=false."
            )
        for sequence in sequences:
            self._record(sequence, sequence.rows, result[sequence.rows])

    def _record(self, sequence, rows, positions, heads=None, pooled_keys=None) -> None:
        recorder, rids = active_recorder(), self.forward_batch.rids
        # The warm-up of a CUDA graph belongs to no request.
        if recorder is None or rids is None:
            return
        pool = get_token_to_kv_pool()
        recorder.record(
            layer_id=self.layer_id,
            rid=rids[sequence.index],
            q=self.q[rows],
            weights=self.weights.squeeze(-1)[rows],
            lengths=self.metadata.get_seqlens_expanded()[rows],
            index_k=pool.get_index_k_with_scale_buffer(self.layer_id),
            page_table=sequence.page_table,
            pooled_keys=pooled_keys,
            heads=heads,
            positions=positions,
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
        forward_batch.batch_size,
    )
