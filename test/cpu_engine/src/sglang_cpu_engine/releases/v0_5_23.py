# SPDX-License-Identifier: Apache-2.0
"""What is changed in SGLang 0.5.23 beside `sglang_cpu_engine.patches`."""

import torch
from sglang_cpu_engine import streams
from sglang_cpu_engine.kernels import hicache, kv_cache
from sglang_cpu_engine.kernels.mqa_logits import deep_gemm
from sglang_cpu_engine.kernels.quantization import act_quant
from sglang_cpu_engine.patches import CACHE, INDEXER, Patch, pageable

KERNELS = "sglang.kernels.ops"


def _resolved(function):
    """A function that finds `function`."""
    return lambda: function


# fmt: off
PATCHES = [
    Patch(f"{INDEXER}.Indexer._resolve_forward_method", lambda self: self.forward_cuda, "forward_native raises"),
    Patch(f"{INDEXER}.resolve_num_sms", deep_gemm.get_num_sms, "asks DeepGEMM"),
    Patch(f"{INDEXER}.resolve_fp8_mqa_logits_fn", _resolved(deep_gemm.fp8_mqa_logits), "imports DeepGEMM"),
    Patch(f"{INDEXER}.resolve_fp8_paged_mqa_logits_fn", _resolved(deep_gemm.fp8_paged_mqa_logits), "imports DeepGEMM"),
    Patch(f"{INDEXER}.resolve_paged_mqa_logits_metadata_fn", _resolved(deep_gemm.get_paged_mqa_logits_metadata), "imports DeepGEMM"),
    Patch(f"{KERNELS}.quantization.act_quant_triton.act_quant", act_quant, "Triton kernel"),
    Patch(f"{KERNELS}.kvcache.dsa_index_k_cache.GetKAndS.execute", kv_cache.read_index_k, "Triton kernel"),
    Patch("sglang.srt.mem_cache.memory_pool.set_mla_kv_buffer_dcp_sharded_triton", kv_cache.write_mla_kv, "Triton kernel"),
    Patch("sglang.srt.platforms.cpu.CpuDeviceMixin.empty_cache", lambda self: None, "collects garbage for half a second"),
    Patch("sglang.srt.utils.triton_load_watch.install", lambda: None, "hooks Triton's launches"),
    # The pages of what is sent, with PD disaggregation.
    Patch("torch.empty", pageable(torch.empty), "pins memory for CUDA"),
    Patch("torch.cuda.current_stream", lambda device=None: streams.current_stream(), "an event of it is waited for before they are sent"),
    # HiCache, beside what `sglang_cpu_engine.patches` has of it.
    Patch(f"{CACHE}.l2_transfer.device_module", streams, "does everything at once"),
    Patch(f"{CACHE}.pool_host.dsa.transfer_kv_per_layer_direct_pf_lf", hicache.load_layer, "CUDA copies", added=True),
    Patch(f"{CACHE}.pool_host.dsa.transfer_kv_all_layer_direct_lf_pf", hicache.store_layers, "CUDA copies", added=True),
]
# fmt: on
