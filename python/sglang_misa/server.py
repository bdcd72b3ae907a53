"""SGLang servers that run while a context is open: any (`launch`), or a small model on this machine, recorded (`serve`)."""

import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import torch

from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.layers.misa.environment import CAPTURE_DIR
from sglang.srt.layers.misa.evaluation.capture import load_records
from sglang.srt.utils import kill_process_tree
from sglang.srt.utils.network import is_port_available
from sglang.utils import wait_for_http_ready
from sglang_misa.client import Client

# For hangs alone. A first start on a GPU compiles SGLang's kernels, which takes four minutes.
START_SECONDS = 2400
STOP_SECONDS = 300


class StartError(RuntimeError):
    """A server did not start."""


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port to serve on, and the next one for SGLang's --nccl-port: no one else who asks here is given either meanwhile.

    A server binds its ports long after they were chosen. Until the context ends, a third port that is bound here stands for
    the two. All are below those that the kernel gives to whoever asks for any port (from 32768 on).

    Raises:
        RuntimeError: there is none.
    """
    for port in range(20000, 32000, 3):
        with socket.socket() as guard:
            try:
                guard.bind(("127.0.0.1", port + 2))
            except OSError:
                continue
            if is_port_available(port) and is_port_available(port + 1):
                yield port
                return
    raise RuntimeError("no port from 20000 to 32000 is free")


@contextmanager
def launch(
    command: List[str],
    port: int,
    log: Path,
    env: Optional[Dict[str, str]] = None,
    start: Callable = subprocess.Popen,
) -> Iterator[Client]:
    """A server that `command` starts on `port` of 127.0.0.1 and that ends with the context.

    Args:
        log: the file for all that it prints.
        env: its environment; that of this process by default.
        start: starts the command, as `subprocess.Popen` does.

    Raises:
        StartError: it did not start.
    """
    client = Client(f"http://127.0.0.1:{port}")
    with log.open("w") as file:
        process = start(command, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        try:
            wait_for_http_ready(
                url=f"{client.url}/health",
                timeout=START_SECONDS,
                process=process,
                request_timeout=START_SECONDS,
            )
        except (RuntimeError, TimeoutError) as error:
            last = log.read_text(errors="replace")[-5000:]
            raise StartError(f"{error}; its log is {log}, which ends:\n{last}")
        yield client
    finally:
        kill_process_tree(process.pid, wait_timeout=STOP_SECONDS)
        # That waits for the children, not always for the server itself, which has the port.
        process.wait()


class RecordedServer(Client):
    """A running server, and what its indexer did since `forget` was called.

    log             the file with all that it prints
    capture_dir     the folder of the records
    """

    def __init__(self, url: str, log: Path, capture_dir: Path):
        super().__init__(url)
        self.log, self.capture_dir = log, capture_dir

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


@contextmanager
def serve(
    model_path: Path,
    work_dir: Path,
    *args: str,
    env: Optional[Dict[str, str]] = None,
) -> Iterator[RecordedServer]:
    """A server of a small model on this machine's GPU, or on the CPU engine where there is none.

    Args:
        work_dir: the folder of its log and of what is recorded.
        args: further arguments of SGLang.
        env: variables beside those of this process.

    Raises:
        StartError: it did not start.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    log, capture_dir = work_dir / "server.log", work_dir / "capture"
    env = {**server_env(), **(env or {}), CAPTURE_DIR: str(capture_dir)}
    with reserved_port() as port:
        ports = "--nccl-port", str(port + 1)
        command = server_command(
            model_path, "--skip-server-warmup", *ports, *args, port=port
        )
        with launch(command, port, log, env, process_starter()) as client:
            yield RecordedServer(client.url, log, capture_dir)


def server_command(model_path: Path, *args: str, port: int) -> List[str]:
    """The command of `serve`. The arguments come last, so they win."""
    if not torch.cuda.is_available():
        from sglang_cpu_engine.launch import server_command as cpu_server_command

        return cpu_server_command(str(model_path), *args, port=port)
    # Room for the longest prompt of a test; SGLang refuses more than a model takes.
    config = json.loads((Path(model_path) / "config.json").read_text())
    context = min(40000, config["max_position_embeddings"])
    return [
        *(sys.executable, "-m", "sglang.launch_server"),
        *("--model-path", str(model_path)),
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


def process_starter() -> Callable:
    """What starts the process of `serve`: for tests, the CPU engine forks it from one that has imported SGLang."""
    if not torch.cuda.is_available():
        from sglang_cpu_engine.launch import FORKS

        if FORKS.items() <= os.environ.items():
            from sglang_cpu_engine.forked import start

            return start
    return subprocess.Popen


def server_env() -> Dict[str, str]:
    """This process's environment, with what a server on this machine needs."""
    if torch.cuda.is_available():
        return dict(os.environ)
    from sglang_cpu_engine.launch import server_env as cpu_server_env

    # The machine may have as few as two cores, and a test run as many servers.
    return cpu_server_env({**os.environ, "OMP_NUM_THREADS": "1"})


def misa_args(config: MisaConfig) -> Tuple[str, ...]:
    """The command line of a configuration."""
    given = (
        (f"--misa-{name.replace('_', '-')}", str(value))
        for name, value in asdict(config).items()
        if value is not None
    )
    return ("--enable-misa", *itertools.chain.from_iterable(given))


def chain(steps: int) -> Tuple[str, ...]:
    """The command line of speculative decoding by a model's NextN layer, with so many drafts, one after the other."""
    return (
        *("--speculative-algorithm", "EAGLE", "--speculative-eagle-topk", "1"),
        *("--speculative-num-steps", str(steps)),
        *("--speculative-num-draft-tokens", str(steps + 1)),
    )


def tokens(count: int, seed: int = 0) -> List[int]:
    """A random prompt."""
    return random.Random(seed).choices(range(2, 250), k=count)
