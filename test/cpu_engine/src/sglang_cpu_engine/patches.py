# SPDX-License-Identifier: Apache-2.0
"""What is changed in SGLang whatever its release, as one table; `sglang_cpu_engine.releases` has the rest.

The methods of `Indexer` that choose tokens and store keys are left alone: what they call is supplied instead, so that
code which hooks them is tested against the real ones, on the branches that they take on a GPU.
"""

import functools
import importlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from sglang_cpu_engine import processes, streams
from sglang_cpu_engine.kernels import (
    allocator,
    fused_indexer,
    hicache,
    page_table,
    products,
    rotary,
)
from sglang_cpu_engine.kernels.quantization import rotate_activation
from sglang_cpu_engine.kernels.sparse_attention import forward_flashmla_sparse
from sglang_cpu_engine.kernels.speculative import seqlens_expand
from sglang_cpu_engine.scheduler import set_internal_state
from sglang_cpu_engine.transfer import TransferEngine

from sglang.srt.layers.rotary_embedding.factory import get_rope


def _head_gates(self, x: torch.Tensor) -> torch.Tensor:
    """x: bfloat16 [tokens, hidden]. Returns float32 [tokens, heads]."""
    return (x.double() @ self.weights_proj.weight.double().t()).float()


def pageable(create):
    """A function of torch's without its `pin_memory`."""

    @functools.wraps(create)
    def create_pageable(*args, pin_memory: bool = False, **kwargs) -> torch.Tensor:
        return create(*args, **kwargs)

    return create_pageable


class Patch(NamedTuple):
    target: str
    replacement: Any
    reason: str
    # SGLang has the name only where there is CUDA.
    added: bool = False


INDEXER = "sglang.srt.layers.attention.dsa.dsa_indexer"
BACKEND = "sglang.srt.layers.attention.dsa_backend"
ROPE = "sglang.srt.layers.rotary_embedding"
CACHE = "sglang.srt.mem_cache"

# fmt: off
PATCHES = [
    Patch("torch.cuda.get_device_capability", lambda device=None: (9, 0), "the DSA backend and its defaults ask for it"),
    Patch("torch.cuda.synchronize", lambda device=None: None, "a draft model waits before it shares the embeddings, a retraction for its copies"),
    # The indexer takes its CUDA branches.
    Patch(f"{INDEXER}._is_cuda", True, "gates the CUDA branches"),
    Patch(f"{INDEXER}.Indexer._weights_proj_bf16_in_fp32_out", _head_gates, "torch.mm takes out_dtype on CUDA only"),
    # Small, so that a prompt of some 3000 tokens already goes through the chunked branch.
    Patch(f"{INDEXER}.Indexer._get_mqa_logits_budget_bytes", lambda self, _device_index: 32 << 20, "asks for GPU memory"),
    Patch(f"{INDEXER}.rotate_activation", rotate_activation, "JIT CUDA kernel"),
    Patch(f"{INDEXER}.can_use_dsa_fused_store", lambda *_: True, "compiles the kernel to find out"),
    Patch(f"{INDEXER}.fused_store_index_k_cache", fused_indexer.fused_store_index_k_cache, "JIT CUDA kernel"),
    Patch(f"{INDEXER}.fused_k_indexer_norm_rope_store", fused_indexer.fused_k_indexer_norm_rope_store, "JIT CUDA kernel", added=True),
    Patch(f"{INDEXER}.fused_q_indexer_rope_first_quant", fused_indexer.fused_q_indexer_rope_first_quant, "JIT CUDA kernel", added=True),
    # Products of bfloat16.
    Patch("torch.nn.functional.linear", products.linear, "slow in bfloat16"),
    Patch("torch.bmm", products.bmm, "slow in bfloat16"),
    # Attention.
    Patch(f"{BACKEND}.transform_index_page_table_prefill", page_table.transform_prefill, "Triton kernel"),
    Patch(f"{BACKEND}.transform_index_page_table_decode", page_table.transform_decode, "Triton kernel"),
    Patch(f"{BACKEND}.DeepseekSparseAttnBackend._forward_flashmla_sparse", forward_flashmla_sparse, "CUDA kernel"),
    Patch(f"{BACKEND}.seqlens_expand_triton", seqlens_expand, "Triton kernel"),
    Patch(f"{ROPE}.factory.get_rope_cpu", lambda *args: get_rope(*args[:-1]), "accepts YaRN only"),
    Patch(f"{ROPE}.base.RotaryEmbedding.forward_native", rotary.rotary_forward, "rounds the angles to bfloat16"),
    Patch(f"{ROPE}.rope_variant.DeepseekScalingRotaryEmbedding.forward_native", rotary.rotary_forward, "wrong for a key without heads"),
    # The scheduler's bookkeeping.
    Patch("sglang.srt.mem_cache.allocation.get_last_loc", allocator.get_last_loc, "Triton kernel"),
    # HiCache, with --hicache-mem-layout page_first_direct --hicache-io-backend direct. Its copies come as late as they may.
    Patch("sglang.srt.managers.cache_controller.device_module", streams, "does everything at once"),
    Patch(f"{CACHE}.pool_host.mla.transfer_kv_per_layer_direct_pf_lf", hicache.load_layer, "CUDA copies", added=True),
    Patch(f"{CACHE}.pool_host.mla.transfer_kv_all_layer_direct_lf_pf", hicache.store_layers, "CUDA copies", added=True),
    Patch(f"{CACHE}.pool_host.base.HICACHE_HOST_MEMORY_RESERVE_BYTES", 0, "wants 10 GiB free"),
    Patch(f"{CACHE}.pool_host.common._cuda_host_register", lambda *_: None, "pins memory for CUDA"),
    # LoRA, with --lora-backend torch_native.
    Patch("torch.tensor", pageable(torch.tensor), "pins memory for CUDA"),
    Patch("torch.zeros", pageable(torch.zeros), "pins memory for CUDA"),
    Patch("torch.Tensor.pin_memory", lambda self: self, "pins memory for CUDA"),
    # PD disaggregation, with --disaggregation-transfer-backend mooncake: all of SGLang's protocol, and other hands to carry.
    Patch("sglang.srt.distributed.device_communicators.mooncake_transfer_engine.MooncakeTransferEngine", TransferEngine, "needs the package and a network card"),
    Patch("torch.cuda.Event", streams.Event, "is waited for before a cached prefix is sent"),
    # Not for the CPU, but for tests: one server takes chunks of several sizes, one after the other.
    Patch("sglang.srt.managers.scheduler.Scheduler.set_internal_state", set_internal_state, "refuses chunked_prefill_size"),
]
# With SGLANG_CPU_ENGINE_FORKS=1.
FORKS = [
    Patch("multiprocessing.set_start_method", processes.set_start_method, "a process that is spawned imports SGLang once more"),
]
# fmt: on


def _resolve(path: str) -> Any:
    """The module, or the class in a module, of that name."""
    module, _, name = path.rpartition(".")
    if name[0].isupper():
        return getattr(importlib.import_module(module), name)
    return importlib.import_module(path)


def apply(patches: Iterable[Patch]) -> None:
    """Put the replacements in place.

    Raises:
        SystemExit: SGLang has no such target. It logs what a plugin raises otherwise, and goes on.
    """
    for patch in patches:
        path, name = patch.target.rsplit(".", 1)
        try:
            owner = _resolve(path)
            if not patch.added:
                getattr(owner, name)
        except (ImportError, AttributeError) as error:
            raise SystemExit(
                f"sglang-cpu-engine: this SGLang has no {patch.target}."
            ) from error
        setattr(owner, name, patch.replacement)
