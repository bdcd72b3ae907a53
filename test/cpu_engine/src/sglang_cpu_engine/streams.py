# SPDX-License-Identifier: Apache-2.0
"""Streams and events in place of `torch.cpu`'s, which does everything at once.

On a GPU, a copy runs at some time between its launch and the end of the event behind it. Here it runs as late as that
allows: whoever reads what it writes without waiting finds the old bytes, every time.
"""

from collections.abc import Callable
from contextlib import contextmanager


class Stream:
    """Holds what was launched on it until somebody waits for it."""

    def __init__(self):
        self.launched: list[Callable[[], None]] = []
        self.completed = 0

    def complete(self, count: int) -> None:
        """Run the first `count` of all launches that have not run yet."""
        while self.completed < count:
            self.launched[self.completed]()
            # It is over, and so are its tensors.
            self.launched[self.completed] = None
            self.completed += 1

    def wait_event(self, event: "Event") -> None:
        event.synchronize()

    def wait_stream(self, other) -> None:
        # On one of torch.cpu's everything has run.
        if isinstance(other, Stream):
            other.complete(len(other.launched))


class Event:
    """Ends with what was launched on the current stream before `record`."""

    def __init__(self):
        self.stream, self.count = _default, 0

    def record(self, _stream=None) -> None:
        self.stream = current_stream()
        self.count = len(self.stream.launched)

    def synchronize(self) -> None:
        self.stream.complete(self.count)

    def wait(self, _stream: Stream) -> None:
        self.synchronize()

    def query(self) -> bool:
        # Whoever asks may go on without the answer, but not for ever.
        self.synchronize()
        return True


_default = Stream()
_current = [_default]


def current_stream() -> Stream:
    return _current[-1]


@contextmanager
def stream(other: Stream):
    _current.append(other)
    try:
        yield
    finally:
        _current.pop()


def launch(function: Callable[[], None]) -> None:
    """Run `function` in the order of the current stream: at once on the default one."""
    current = current_stream()
    current.launched.append(function)
    if current is _default:
        current.complete(len(current.launched))
