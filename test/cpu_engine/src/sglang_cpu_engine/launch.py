# SPDX-License-Identifier: Apache-2.0
"""How to start a server on a CPU: `python -m sglang_cpu_engine.launch MODEL --port 30000 [SGLang's flags]`."""

import argparse
import os
import sys
from collections.abc import Mapping

from sglang_cpu_engine import releases

ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    # torch.compile would need a C++ compiler, and gains nothing at this size.
    "TORCHDYNAMO_DISABLE": "1",
    # The fused top-k is a CUDA kernel. Unfused, selections are positions in the sequence instead of slots.
    "SGLANG_DSA_FUSE_TOPK": "false",
    # Short prompts are to take the sparse path too.
    "SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD": "0",
    # As on a GPU; elsewhere SGLang rounds the angles to bfloat16.
    "SGLANG_ROPE_CACHE_FP32": "1",
    # Threads that spin while they wait slow a busy machine down by an order of magnitude.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Temporaries of many megabytes are given back and asked for again all the time: in pages of 4 KiB, half the time of a long score.
    "THP_MEM_ALLOC_ENABLE": "1",
}
# For tests, which start many servers: their processes are forked, so that SGLang is not imported in each of them. Servers of the
# same environment are forked too (`sglang_cpu_engine.forked`), and then it is imported once for all of them.
FORKS = {"SGLANG_CPU_ENGINE_FORKS": "1"}
# As on a GPU: they are spawned, and each loads SGLang and the plugins for itself.
SPAWNS = {"SGLANG_CPU_ENGINE_FORKS": "0"}

# fmt: off
FLAGS = [
    "--device", "cpu",
    "--dtype", "bfloat16",
    "--kv-cache-dtype", "bfloat16",
    "--attention-backend", "dsa",
    "--dsa-topk-backend", "torch",
    "--dsa-prefill-backend", "flashmla_sparse",
    "--dsa-decode-backend", "flashmla_sparse",
    "--page-size", "64",
    "--cuda-graph-backend-decode", "disabled",
    "--cuda-graph-backend-prefill", "disabled",
    "--mem-fraction-static", "0.3",
    # SGLang sets aside, and zeroes, 4 bytes for each token that each request could have: 1.3 GB for the 2048 of its default.
    "--max-running-requests", "64",
    "--sampling-backend", "pytorch",
    "--grammar-backend", "none",
    # The cores are few, and an idle scheduler would keep one busy.
    "--sleep-on-idle",
    # bfloat16 logits tie too often for greedy decoding to be a test of anything.
    "--enable-fp32-lm-head",
]
# fmt: on


def server_command(
    model_path: str,
    *extra_args: str,
    port: int,
    max_total_tokens: int = 16384,
) -> list[str]:
    """The command that serves `model_path` on 127.0.0.1. `extra_args` come last, so they win."""
    return [
        *(sys.executable, "-m", "sglang.launch_server"),
        *("--model-path", str(model_path)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *FLAGS,
        *releases.FLAGS[releases.__version__],
        *("--max-total-tokens", str(max_total_tokens)),
        *extra_args,
    ]


def server_env(base_env: Mapping[str, str]) -> dict[str, str]:
    """`base_env` with what a CPU server needs."""
    return {**base_env, **ENVIRONMENT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_path")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument("--max-total-tokens", type=int, default=16384)
    args, extra_args = parser.parse_known_args()
    command = server_command(
        args.model_path,
        *extra_args,
        port=args.port,
        max_total_tokens=args.max_total_tokens,
    )
    os.execve(command[0], command, server_env(os.environ))


if __name__ == "__main__":
    main()
