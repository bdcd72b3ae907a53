"""Where the time of a call goes: its kernels beside what they move and multiply, and what that would take at the device's rates."""

import re
from dataclasses import dataclass
from typing import Callable, NamedTuple

from sgl_kernel_misa.prefill import sample_shift

from sglang.srt.layers.misa.index_k_cache import HEAD_DIM, PAGE_SIZE
from sglang.srt.layers.misa.reference import sample_positions

from .cases import Case
from .work import MEAN_BYTES, TOKEN_BYTES, lengths

SCORE_BYTES = INDEX_BYTES = 4
QUERY_BYTES = HEAD_DIM + 4  # with its gate


class Work(NamedTuple):
    """Floating-point operations of dot products, two a multiplication and addition, and bytes read and written."""

    operations: int
    bytes: int


@dataclass(frozen=True)
class Call:
    """One call of a variant, and how much there is of what its kernels go through; `active_heads` are slots."""

    case: Case
    active_heads: int
    block_size: int
    rerank_candidates: int
    topk: int

    @property
    def rows(self) -> int:
        return self.case.rows

    @property
    def key_bytes(self) -> int:
        """Of all keys and their scales, once."""
        return sum(self.case.contexts) * TOKEN_BYTES

    @property
    def seen(self) -> int:
        """Tokens that the rows see, added up."""
        return sum(lengths(self.case))

    def query_bytes(self, heads: int) -> int:
        """Of so many queries of every row, with their gates."""
        return self.rows * heads * QUERY_BYTES

    def products(self, heads: int, tokens: int) -> int:
        """Operations to multiply so many heads with tokens."""
        return 2 * HEAD_DIM * heads * tokens

    @property
    def kept_bytes(self) -> int:
        """Of what the first stage selects."""
        return self.rows * (self.rerank_candidates or self.topk) * INDEX_BYTES

    # Each kernel's work. What a kernel reads again, from L2, counts once.

    def route(self, looked_at: list[int], size: int, written: int) -> Work:
        """All heads of a row with so many samples or blocks of `size` bytes; the last row's of a sequence serve the others too."""
        heads, each = self.case.heads, self.case.rows_per_seq
        moved = self.query_bytes(heads) + sum(looked_at[each - 1 :: each]) * size
        return Work(self.products(heads, sum(looked_at)), moved + written)

    def route_sampled(self) -> Work:
        samples = [len(sample_positions(n)) for n in lengths(self.case)]
        routed = self.rows * (self.active_heads - 1) * INDEX_BYTES
        return self.route(samples, TOKEN_BYTES, routed + self.query_bytes(1))

    def route_pooled(self) -> Work:
        pages = [n // PAGE_SIZE for n in lengths(self.case)]
        blocks = [-(-n * PAGE_SIZE // self.block_size) for n in pages]
        routed = self.rows * self.active_heads * INDEX_BYTES
        return self.route(blocks, MEAN_BYTES, routed)

    def mean_bytes(self) -> int:
        """Of all page means."""
        return sum(self.case.contexts) // PAGE_SIZE * MEAN_BYTES

    def sampled(self, count: int) -> int:
        """How many of so many tokens or bytes a prefill's thresholds are made of."""
        return count >> sample_shift(self.case.context)

    def score_samples(self) -> Work:
        seen = self.sampled(self.seen)
        moved = self.query_bytes(self.active_heads) + self.sampled(self.key_bytes)
        moved += seen * SCORE_BYTES
        return Work(self.products(self.active_heads, seen), moved)

    def score(self, written: int) -> Work:
        """All tokens by the slots of every row."""
        moved = self.query_bytes(self.active_heads) + self.key_bytes + written
        return Work(self.products(self.active_heads, self.seen), moved)

    def plane_bytes(self) -> int:
        """Of two bits a token and row."""
        return self.seen // 4

    def score_bytes(self) -> int:
        """Of a score for each token and row."""
        return self.seen * SCORE_BYTES

    def rerank(self) -> Work:
        heads = self.case.heads
        candidates = sum(min(self.rerank_candidates, n) for n in lengths(self.case))
        # Rows share most of their candidates' keys.
        moved = self.query_bytes(heads) + min(candidates * TOKEN_BYTES, self.key_bytes)
        moved += (candidates + self.rows * self.topk) * INDEX_BYTES
        return Work(self.products(heads, candidates), moved)

    def logits(self) -> Work:
        """SGLang's own, of all heads."""
        moved = self.query_bytes(self.case.heads) + self.key_bytes + self.score_bytes()
        return Work(self.products(self.case.heads, self.seen), moved)


# By what a kernel's name begins with, or holds where it is SGLang's. The first that fits counts. The keys of `select`'s candidates,
# some hundreds a row as the data will have it, are not among its bytes.
KERNELS: dict[str, Callable[[Call], Work]] = {
    r"^route_sampled": Call.route_sampled,
    r"^route_\d": Call.route_pooled,
    r"^decode_route": lambda c: c.route_pooled()._replace(
        bytes=c.query_bytes(c.case.heads) + c.mean_bytes()
    ),
    r"^pool_blocks": lambda c: Work(0, c.mean_bytes()),
    r"^sample_": lambda c: Work(0, 2 * c.sampled(c.key_bytes)),
    r"^score_samples": Call.score_samples,
    r"^threshold": lambda c: Work(0, c.sampled(c.seen) * SCORE_BYTES),
    r"^score_planes": lambda c: c.score(written=c.plane_bytes()),
    r"^select_": lambda c: Work(0, c.plane_bytes() + c.kept_bytes),
    r"^rerank": Call.rerank,
    r"^decode_score": lambda c: c.score(written=c.score_bytes()),
    r"^decode_select": lambda c: Work(0, c.score_bytes() + c.kept_bytes),
    r"mqa_logits": Call.logits,
    r"(?i)topk|top_k": lambda c: Work(
        0, c.score_bytes() + c.rows * c.topk * INDEX_BYTES
    ),
}


def work_of(kernel: str, call: Call) -> Work | None:
    """What a kernel of a call has to do; None where that is not known."""
    for pattern, work in KERNELS.items():
        if re.search(pattern, kernel):
            return work(call)
    return None


def describe(kernels: list, call: Call, device: dict) -> list:
    """A record of each kernel.

    Args:
        kernels: of `timing.profile`.
        device: `copy_gbps` and `fp8_tflops` among what is said of it.
    """
    records = []
    for name, count, microseconds in kernels:
        work, at_rates = work_of(name, call), None
        if work is not None:
            at_rates = {
                "bytes": work.bytes / device["copy_gbps"] / 1e3,
                "operations": work.operations / device["fp8_tflops"] / 1e6,
            }
        records.append(
            {
                "kernel": name,
                "launches": count,
                "us": microseconds,
                "operations": work and work.operations,
                "bytes": work and work.bytes,
                "us_at_rates": at_rates,
            }
        )
    return records


HEADER = f"  {'us':>10} {'launches':>8} {'GFLOP':>9} {'MB':>9} {'us at rates':>12} {'of time':>8}  kernel"


def line(record: dict) -> str:
    """A row of the table: the time that the larger of the two rates allows, and its share of what the kernel takes."""
    shown = f"  {record['us']:10.1f} {record['launches']:8}"
    if record["us_at_rates"] is None:
        shown += f" {'-':>9} {'-':>9} {'-':>12} {'-':>8}"
    else:
        bound = max(record["us_at_rates"].values())
        shown += f" {record['operations'] / 1e9:9.2f} {record['bytes'] / 1e6:9.1f}"
        # None of the time is its own if another kernel ran all the while.
        share = f"{bound / record['us']:.0%}" if record["us"] else "-"
        shown += f" {bound:12.1f} {share:>8}"
    return f"{shown}  {record['kernel'][:100]}"
