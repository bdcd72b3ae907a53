"""A real SGLang server for tests: on the GPU if there is one, else on the CPU engine."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import requests
import torch

from sglang.srt.layers.misa.capture import CAPTURE_DIR_ENV, load_records
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.utils.network import is_port_available

# Long enough for the first start on a GPU, which compiles SGLang's kernels.
START_SECONDS = 400

# Every xdist worker's own, below those that the kernel gives to whoever asks for any port (from 32768 on): a server
# binds its ports seconds after they are chosen, and nobody may take them until then.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.cycle(range(20000 + 200 * _WORKER, 20200 + 200 * _WORKER, 2))


def find_port() -> int:
    """A free port to serve on; the one after it is free too, for SGLang's --nccl-port."""
    return next(
        port for port in _PORTS if all(map(is_port_available, (port, port + 1)))
    )


def server_command(model_path: str, *args: str, port: int, **options) -> List[str]:
    """The command that serves a model on 127.0.0.1."""
    if not torch.cuda.is_available():
        from sglang_cpu_engine.launch import server_command as cpu_server_command

        return cpu_server_command(model_path, *args, port=port, **options)
    # Room for the longest prompt of a test; mini-DSA takes less, and SGLang refuses more than a model takes.
    config = json.loads((Path(model_path) / "config.json").read_text())
    context = min(40000, config["max_position_embeddings"])
    return [
        *(sys.executable, "-m", "sglang.launch_server"),
        *("--model-path", model_path),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--kv-cache-dtype", "bfloat16", "--mem-fraction-static", "0.4"),
        *("--dsa-prefill-backend", "flashmla_sparse"),
        *("--dsa-decode-backend", "flashmla_sparse"),
        *("--sampling-backend", "pytorch", "--grammar-backend", "none"),
        *("--context-length", str(context), "--max-running-requests", "8"),
        # SGLang pins host memory for as many tokens with --enable-return-indexer-topk.
        *("--max-total-tokens", "65536"),
        *args,
    ]


def server_env() -> Dict[str, str]:
    if torch.cuda.is_available():
        return dict(os.environ)
    from sglang_cpu_engine.launch import server_env as cpu_server_env

    # The machine may have as few as two cores, and a test run as many servers.
    return cpu_server_env({**os.environ, "OMP_NUM_THREADS": "1"})


def misa_args(config: MisaConfig) -> Tuple[str, ...]:
    """The command line of a configuration."""
    return (
        "--enable-misa",
        *("--misa-active-heads", str(config.active_heads)),
        *("--misa-block-size", str(config.block_size)),
        *("--misa-rerank-candidates", str(config.rerank_candidates)),
        *("--misa-min-context", str(config.min_context)),
    )


def tokens(count: int, seed: int = 0) -> List[int]:
    """A random prompt."""
    return random.Random(seed).choices(range(2, 250), k=count)


class Server:
    """A server that runs while the context is open; `capture_dir` holds what its indexer did since `forget`."""

    def __init__(
        self,
        model_path: Path,
        work_dir: Path,
        *args: str,
        capture: bool = True,
        env: Optional[Dict[str, str]] = None,
        **options,
    ):
        work_dir.mkdir(parents=True, exist_ok=True)
        port = find_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = work_dir / "server.log"
        self.capture_dir = work_dir / "capture"
        self.command = server_command(
            str(model_path),
            *("--skip-server-warmup", "--nccl-port", str(port + 1)),
            *args,
            port=port,
            **options,
        )
        self.env = {**server_env(), **(env or {})}
        if capture:
            self.env[CAPTURE_DIR_ENV] = str(self.capture_dir)

    def __enter__(self) -> "Server":
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, env=self.env, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(
                    f"the server did not start:\n{self.log.read_text()[-5000:]}"
                )
            time.sleep(0.2)
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _healthy(self) -> bool:
        try:
            return requests.get(self.url + "/health", timeout=5).ok
        except requests.RequestException:
            return False

    def post(self, path: str, timeout: float = 300, **body):
        return requests.post(self.url + path, json=body, timeout=timeout)

    def info(self) -> Dict:
        return requests.get(self.url + "/get_server_info", timeout=60).json()

    def metrics(self) -> Dict[str, float]:
        """The server's metrics without their labels."""
        from prometheus_client.parser import text_string_to_metric_families

        text = requests.get(self.url + "/metrics", timeout=60).text
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def generate(
        self, tokens: List[int], new_tokens: int = 4, rid: Optional[str] = None, **body
    ) -> Dict:
        """Greedy generation from token ids; returns SGLang's answer."""
        answer = self.post(
            "/generate",
            input_ids=tokens,
            rid=rid,
            **body,
            sampling_params={
                "temperature": 0,
                "max_new_tokens": new_tokens,
                "ignore_eos": True,
            },
        )
        answer.raise_for_status()
        return answer.json()

    def flush_cache(self) -> None:
        # Refused while a request is still being cleaned up.
        for _ in range(50):
            if self.post("/flush_cache").ok:
                return
            time.sleep(0.1)
        raise RuntimeError("the server does not become idle")

    def reset(self) -> None:
        """Empty the cache and drop the records so far."""
        self.flush_cache()
        self.forget()

    def forget(self) -> None:
        """Drop the records so far."""
        shutil.rmtree(self.capture_dir, ignore_errors=True)
        self.capture_dir.mkdir()

    def records(self) -> List[Dict]:
        return load_records(self.capture_dir)
