"""The shapes that are measured."""

from dataclasses import dataclass, replace
from fnmatch import fnmatch

K = 1024


@dataclass(frozen=True)
class Case:
    """One forward step of the indexer.

    label         what a person calls it, without the number of heads
    mode          "prefill" (contiguous keys for production, eager) or "decode" (paged keys, CUDA graph)
    contexts      tokens of each sequence, the query rows among them
    rows_per_seq  query rows at the end of each sequence
    native        verify: production hands all rows of a sequence to one DeepGEMM task instead of splitting them
    """

    label: str
    mode: str
    contexts: tuple
    rows_per_seq: int
    heads: int = 64
    native: bool = False

    @property
    def name(self) -> str:
        return f"{self.label}-h{self.heads}"

    @property
    def batch(self) -> int:
        return len(self.contexts)

    @property
    def rows(self) -> int:
        return self.batch * self.rows_per_seq

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.contexts)


def prefill(context_k: int, heads: int = 64, rows: int = 2048) -> Case:
    """The rows at the end of one sequence: a chunk, or what a prefix in the cache leaves."""
    label = f"prefill-{rows}x{context_k}k"
    return Case(label, "prefill", (context_k * K,), rows, heads)


def decode(batch: int, context_k: int) -> Case:
    return Case(f"decode-{batch}x{context_k}k", "decode", (context_k * K,) * batch, 1)


def verify(batch: int, rows: int, context_k: int, native: bool = False) -> Case:
    label = f"verify-{batch}x{rows}-{context_k}k" + ("-native" if native else "")
    return Case(label, "decode", (context_k * K,) * batch, rows, native=native)


CASES = (
    prefill(8),
    prefill(32),
    prefill(64),
    prefill(128),
    prefill(8, heads=32),
    prefill(32, heads=32),
    prefill(128, heads=32),
    Case("prefill-4x512-mixed", "prefill", (5000, 20000, 50000, 128 * K), 512),
    prefill(128, rows=8192),
    prefill(32, rows=64),
    prefill(128, rows=64),
    decode(1, 32),
    decode(1, 128),
    decode(8, 128),
    decode(32, 128),
    decode(64, 64),
    decode(128, 32),
    decode(32, 8),
    Case(
        "decode-32-mixed",
        "decode",
        tuple(4 * K * (b + 1) - 7 * b for b in range(32)),
        1,
    ),
    verify(32, 2, 128, native=True),
    verify(32, 2, 128),
    verify(32, 4, 128),
    verify(32, 6, 128),
    verify(32, 8, 128),
    verify(8, 4, 128),
)


def select(patterns: list, heads: int | None = None) -> list:
    """The cases whose name or label matches one of the glob `patterns`, all with `heads` heads if that is given."""
    chosen = [
        case
        for case in CASES
        if not patterns
        or any(fnmatch(case.name, p) or fnmatch(case.label, p) for p in patterns)
    ]
    if heads is not None:
        chosen = [replace(case, heads=heads) for case in chosen]
    return list(dict.fromkeys(chosen))
