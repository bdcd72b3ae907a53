"""What the lists of refusals are made of: `server_args` has those of every SGLang, `releases` those of one. Imports nothing of SGLang's."""

from typing import Any, Callable, NamedTuple


class Refusal(NamedTuple):
    """A condition on the resolved server args under which MISA does not start, and what it says then."""

    applies: Callable[[Any], bool]
    message: str
