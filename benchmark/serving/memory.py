"""How much of a GPU's memory is taken, while something runs."""

import threading
from contextlib import contextmanager
from typing import Iterator, Optional

import torch

POLL_SECONDS = 0.02


def used_bytes() -> Optional[int]:
    """Bytes of the first GPU that anything has taken; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info(0)
    return total - free


class Peak:
    """The highest `used_bytes` so far."""

    def __init__(self):
        self.bytes = used_bytes()

    def look(self) -> None:
        if self.bytes is not None:
            self.bytes = max(self.bytes, used_bytes())


@contextmanager
def watched() -> Iterator[Peak]:
    """The peak while the context is open; also good after it."""
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            peak.look()

    thread = threading.Thread(target=watch, daemon=True)
    if peak.bytes is not None:
        thread.start()
    try:
        yield peak
    finally:
        done.set()
        if peak.bytes is not None:
            thread.join()
