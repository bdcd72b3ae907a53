# SPDX-License-Identifier: Apache-2.0
"""What is changed in SGLang 0.5.17 beside `sglang_cpu_engine.patches`."""

from sglang_cpu_engine import streams
from sglang_cpu_engine.kernels import allocator, hicache, kv_cache
from sglang_cpu_engine.kernels.mqa_logits import deep_gemm
from sglang_cpu_engine.kernels.quantization import act_quant
from sglang_cpu_engine.patches import CACHE, INDEXER, Patch


class Launch:
    """Gives a function the `kernel[grid](...)` form of a Triton kernel."""

    def __init__(self, fn):
        self.fn = fn

    def __getitem__(self, _grid):
        return self.fn


KERNELS = "sglang.kernels.ops.attention.dsa"

# fmt: off
PATCHES = [
    Patch(f"{INDEXER}.Indexer.dispatch_forward", lambda self: self.forward_cuda, "forward_native raises"),
    Patch(f"{INDEXER}.deep_gemm", deep_gemm, "imported on CUDA only", added=True),
    Patch(f"{KERNELS}.triton_kernel.act_quant", act_quant, "Triton kernel"),
    Patch(f"{KERNELS}.index_buf_accessor.GetKAndS.execute", kv_cache.read_index_k, "Triton kernel"),
    Patch("sglang.srt.mem_cache.memory_pool.set_mla_kv_buffer_triton", kv_cache.write_mla_kv, "Triton kernel"),
    Patch("sglang.srt.mem_cache.allocator.paged.alloc_extend_kernel", Launch(allocator.alloc_extend), "Triton kernel"),
    Patch("sglang.srt.mem_cache.allocator.paged.alloc_decode_kernel", Launch(allocator.alloc_decode), "Triton kernel"),
    Patch("sglang.srt.mem_cache.allocation.support_triton", lambda _backend: False, "takes the torch branch"),
    Patch("sglang.srt.model_executor.forward_batch_info.support_triton", lambda _backend: False, "takes the torch branch"),
    # HiCache, beside what `sglang_cpu_engine.patches` has of it.
    Patch(f"{CACHE}.hybrid_cache.hybrid_cache_controller.device_module", streams, "does everything at once"),
    Patch(f"{CACHE}.memory_pool_host.transfer_kv_per_layer_direct_pf_lf", hicache.load_layer, "CUDA copies", added=True),
    Patch(f"{CACHE}.memory_pool_host.transfer_kv_all_layer_direct_lf_pf", hicache.store_layers, "CUDA copies", added=True),
    Patch(f"{CACHE}.memory_pool_host.HICACHE_HOST_MEMORY_RESERVE_BYTES", 0, "wants 10 GiB free"),
]
# fmt: on
