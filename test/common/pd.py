"""A prefill and a decode server side by side, and the keys that one computed and the other received."""

import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, Sequence

import torch

from sglang_misa.server import RecordedServer, reserved_port, serve

THREADS = 32


class Pair:
    """Two servers that answer every request together.

    Requests are numbered from 1 on, and these numbers are their ids where they are given none.
    """

    def __init__(
        self,
        prefill: RecordedServer,
        decode: RecordedServer,
        port: int,
        threads: ThreadPoolExecutor,
    ):
        self.prefill, self.decode = prefill, decode
        self.port, self.threads = port, threads
        self._numbers, self.count = itertools.count(1), 0

    def ask(self, prompt: List[int], new_tokens: int, rid: str = "") -> Future:
        """The decode server's answer."""
        self.count = number = next(self._numbers)
        room = {
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": self.port,
            "bootstrap_room": number,
        }
        answers = [
            self.threads.submit(
                server.generate, prompt, new_tokens, rid or str(number), **room
            )
            for server in (self.prefill, self.decode)
        ]
        return answers[1]

    def generate(self, prompt: List[int], new_tokens: int, rid: str) -> Dict:
        return self.ask(prompt, new_tokens, rid).result()

    def post(self, path: str, **body) -> None:
        """To both."""
        for server in (self.prefill, self.decode):
            server.post(path, **body)

    def forget(self) -> None:
        for server in (self.prefill, self.decode):
            server.forget()


@contextmanager
def serve_pair(
    model: Path,
    folder: Path,
    backend: str,
    *args: str,
    prefill: Sequence[str] = (),
    decode: Sequence[str] = (),
    **options,
) -> Iterator[Pair]:
    """Serve a model by a pair; `args` are for both, `prefill` and `decode` for one of them; see `sglang_misa.server.serve`."""
    options["env"] = {"SGLANG_HOST_IP": "127.0.0.1", **options.get("env", {})}
    with reserved_port() as port:
        transfer = (
            *("--disaggregation-transfer-backend", backend),
            *("--disaggregation-bootstrap-port", str(port)),
        )

        def one(mode, own):
            mode_args = "--disaggregation-mode", mode
            return serve(
                model, folder / mode, *args, *transfer, *mode_args, *own, **options
            )

        with (
            one("prefill", prefill) as first,
            one("decode", decode) as second,
            ThreadPoolExecutor(THREADS) as threads,
        ):
            yield Pair(first, second, port, threads)


def keys_of(records: List[Dict]) -> Dict:
    """The longest recorded keys of every layer and request, as bytes, and their scales; all shorter ones are a part of them."""
    longest = {}
    for record in sorted(records, key=lambda record: len(record["k"])):
        whole = record["k"].view(torch.uint8), record["k_scale"]
        at = record["layer_id"], record["rid"]
        assert at not in longest or is_part(longest[at], whole)
        longest[at] = whole
    return longest


def is_part(some, whole) -> bool:
    """Whether keys and scales are the first ones of others, bit for bit."""
    return all(torch.equal(x, y[: len(x)]) for x, y in zip(some, whole))
