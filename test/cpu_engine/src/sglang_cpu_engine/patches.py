# SPDX-License-Identifier: Apache-2.0
"""Everything that is changed in SGLang 0.5.17, as one table.

The methods of `Indexer` that choose tokens and store keys are left alone: what they call is supplied instead, so that
code which hooks them is tested against the real ones, on the branches that they take on a GPU.
"""

import functools
import importlib
from typing import Any, NamedTuple

import torch
from sglang_cpu_engine import streams
from sglang_cpu_engine.kernels import (
    allocator,
    fused_indexer,
    hicache,
    kv_cache,
    rotary,
)
from sglang_cpu_engine.kernels.mqa_logits import deep_gemm
from sglang_cpu_engine.kernels.quantization import act_quant, rotate_activation
from sglang_cpu_engine.kernels.sparse_attention import forward_flashmla_sparse
from sglang_cpu_engine.kernels.speculative import seqlens_expand
from sglang_cpu_engine.scheduler import set_internal_state
from sglang_cpu_engine.transfer import TransferEngine

from sglang.kernels.ops.attention.dsa import transform_index
from sglang.srt.layers.rotary_embedding.factory import get_rope


class Launch:
    """Gives a function the `kernel[grid](...)` form of a Triton kernel."""

    def __init__(self, fn):
        self.fn = fn

    def __getitem__(self, _grid):
        return self.fn


def _head_gates(self, x: torch.Tensor) -> torch.Tensor:
    """x: bfloat16 [tokens, hidden]. Returns float32 [tokens, heads]."""
    return (x.double() @ self.weights_proj.weight.double().t()).float()


def _page_table_prefill(*, cu_seqlens_q=None, **kwargs) -> torch.Tensor:
    return transform_index.transform_index_page_table_prefill_ref(**kwargs)


def _pageable(create):
    """A function of torch's without its `pin_memory`."""

    @functools.wraps(create)
    def create_pageable(*args, pin_memory: bool = False, **kwargs) -> torch.Tensor:
        return create(*args, **kwargs)

    return create_pageable


class Patch(NamedTuple):
    target: str
    replacement: Any
    reason: str


INDEXER = "sglang.srt.layers.attention.dsa.dsa_indexer"
BACKEND = "sglang.srt.layers.attention.dsa_backend"
KERNELS = "sglang.kernels.ops.attention.dsa"
ROPE = "sglang.srt.layers.rotary_embedding"
CACHE = "sglang.srt.mem_cache"

# fmt: off
PATCHES = [
    Patch("torch.cuda.get_device_capability", lambda device=None: (9, 0), "the DSA backend and its defaults ask for it"),
    Patch("torch.cuda.synchronize", lambda device=None: None, "a draft model waits before it shares the embeddings"),
    # The indexer takes its CUDA branches.
    Patch(f"{INDEXER}._is_cuda", True, "gates the CUDA branches"),
    Patch(f"{INDEXER}.Indexer.dispatch_forward", lambda self: self.forward_cuda, "forward_native raises"),
    Patch(f"{INDEXER}.Indexer._weights_proj_bf16_in_fp32_out", _head_gates, "torch.mm takes out_dtype on CUDA only"),
    # Small, so that a prompt of some 3000 tokens already goes through the chunked branch.
    Patch(f"{INDEXER}.Indexer._get_mqa_logits_budget_bytes", lambda self, _device_index: 32 << 20, "asks for GPU memory"),
    Patch(f"{INDEXER}.deep_gemm", deep_gemm, "imported on CUDA only"),
    Patch(f"{INDEXER}.rotate_activation", rotate_activation, "JIT CUDA kernel"),
    Patch(f"{INDEXER}.can_use_dsa_fused_store", lambda *_: True, "compiles the kernel to find out"),
    Patch(f"{INDEXER}.fused_store_index_k_cache", fused_indexer.fused_store_index_k_cache, "JIT CUDA kernel"),
    Patch(f"{INDEXER}.fused_k_indexer_norm_rope_store", fused_indexer.fused_k_indexer_norm_rope_store, "JIT CUDA kernel, imported on CUDA only"),
    Patch(f"{INDEXER}.fused_q_indexer_rope_first_quant", fused_indexer.fused_q_indexer_rope_first_quant, "JIT CUDA kernel, imported on CUDA only"),
    Patch(f"{KERNELS}.triton_kernel.act_quant", act_quant, "Triton kernel"),
    Patch(f"{KERNELS}.index_buf_accessor.GetKAndS.execute", kv_cache.read_index_k, "Triton kernel"),
    # Attention.
    Patch(f"{KERNELS}.transform_index.transform_index_page_table_prefill_fast", _page_table_prefill, "Triton kernel"),
    Patch(f"{KERNELS}.transform_index.transform_index_page_table_decode_fast", transform_index.transform_index_page_table_decode_ref, "Triton kernel"),
    Patch(f"{BACKEND}.DeepseekSparseAttnBackend._forward_flashmla_sparse", forward_flashmla_sparse, "CUDA kernel"),
    Patch(f"{BACKEND}.seqlens_expand_triton", seqlens_expand, "Triton kernel"),
    Patch("sglang.srt.mem_cache.memory_pool.set_mla_kv_buffer_triton", kv_cache.write_mla_kv, "Triton kernel"),
    Patch(f"{ROPE}.factory.get_rope_cpu", lambda *args: get_rope(*args[:-1]), "accepts YaRN only"),
    Patch(f"{ROPE}.base.RotaryEmbedding.forward_native", rotary.rotary_forward, "rounds the angles to bfloat16"),
    Patch(f"{ROPE}.rope_variant.DeepseekScalingRotaryEmbedding.forward_native", rotary.rotary_forward, "wrong for a key without heads"),
    # The scheduler's bookkeeping.
    Patch("sglang.srt.mem_cache.allocator.paged.alloc_extend_kernel", Launch(allocator.alloc_extend), "Triton kernel"),
    Patch("sglang.srt.mem_cache.allocator.paged.alloc_decode_kernel", Launch(allocator.alloc_decode), "Triton kernel"),
    Patch("sglang.srt.mem_cache.allocation.get_last_loc", allocator.get_last_loc, "Triton kernel"),
    Patch("sglang.srt.mem_cache.allocation.support_triton", lambda _backend: False, "takes the torch branch"),
    Patch("sglang.srt.model_executor.forward_batch_info.support_triton", lambda _backend: False, "takes the torch branch"),
    # HiCache, with --hicache-mem-layout page_first_direct --hicache-io-backend direct. Its copies come as late as they may.
    Patch("sglang.srt.managers.cache_controller.device_module", streams, "does everything at once"),
    Patch(f"{CACHE}.hybrid_cache.hybrid_cache_controller.device_module", streams, "does everything at once"),
    Patch(f"{CACHE}.pool_host.mla.transfer_kv_per_layer_direct_pf_lf", hicache.load_layer, "CUDA copies, imported on CUDA only"),
    Patch(f"{CACHE}.pool_host.mla.transfer_kv_all_layer_direct_lf_pf", hicache.store_layers, "CUDA copies, imported on CUDA only"),
    Patch(f"{CACHE}.memory_pool_host.transfer_kv_per_layer_direct_pf_lf", hicache.load_layer, "CUDA copies, imported on CUDA only"),
    Patch(f"{CACHE}.memory_pool_host.transfer_kv_all_layer_direct_lf_pf", hicache.store_layers, "CUDA copies, imported on CUDA only"),
    Patch(f"{CACHE}.pool_host.common._cuda_host_register", lambda _buffer: None, "pins memory for CUDA"),
    Patch(f"{CACHE}.pool_host.base.HICACHE_HOST_MEMORY_RESERVE_BYTES", 0, "wants 10 GiB free"),
    Patch(f"{CACHE}.memory_pool_host.HICACHE_HOST_MEMORY_RESERVE_BYTES", 0, "wants 10 GiB free"),
    # LoRA, with --lora-backend torch_native.
    Patch("torch.tensor", _pageable(torch.tensor), "pins memory for CUDA"),
    Patch("torch.zeros", _pageable(torch.zeros), "pins memory for CUDA"),
    Patch("torch.Tensor.pin_memory", lambda self: self, "pins memory for CUDA"),
    # PD disaggregation, with --disaggregation-transfer-backend mooncake: all of SGLang's protocol, and other hands to carry.
    Patch("sglang.srt.distributed.device_communicators.mooncake_transfer_engine.MooncakeTransferEngine", TransferEngine, "needs the package and a network card"),
    Patch("torch.cuda.Event", streams.Event, "is waited for before a cached prefix is sent"),
    Patch("torch.cuda.synchronize", lambda device=None: None, "waits for what a retraction copies to the host"),
    # Not for the CPU, but for tests: one server takes chunks of several sizes, one after the other.
    Patch("sglang.srt.managers.scheduler.Scheduler.set_internal_state", set_internal_state, "refuses chunked_prefill_size"),
]
# fmt: on


def _resolve(path: str) -> Any:
    """The module, or the class in a module, of that name."""
    module, _, name = path.rpartition(".")
    if name[0].isupper():
        return getattr(importlib.import_module(module), name)
    return importlib.import_module(path)


def apply() -> None:
    for patch in PATCHES:
        owner, name = patch.target.rsplit(".", 1)
        setattr(_resolve(owner), name, patch.replacement)
