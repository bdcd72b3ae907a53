"""What a variant has to do at least: floating-point operations and bytes of one call."""

from sglang.srt.layers.misa.index_k_cache import HEAD_DIM, PAGE_SIZE
from sglang.srt.layers.misa.reference import sample_positions

from .cases import Case

TOKEN_BYTES = HEAD_DIM + 4  # a key and its scale
MEAN_BYTES = 2 * HEAD_DIM


def lengths(case: Case) -> list[int]:
    """Tokens visible to each row."""
    return [
        context - row
        for context in case.contexts
        for row in reversed(range(case.rows_per_seq))
    ]


def operations(
    case: Case,
    router: str | None,
    active_heads: int,
    block_size: int,
    rerank_candidates: int,
) -> int:
    """Two a multiplication and addition of the dot products of queries with tokens, the router's keys and candidates.

    Args:
        router: "sampled" looks at samples of the keys, "pooled" at blocks of `block_size` tokens; None at nothing.
        active_heads: slots that score every token.
        rerank_candidates: tokens a row that all heads score again; 0 if none.
    """
    products = 0
    for length in lengths(case):
        products += active_heads * length
        if router == "pooled":
            blocks = -(-(length // PAGE_SIZE * PAGE_SIZE) // block_size)
            products += case.heads * blocks
        elif router == "sampled":
            products += case.heads * len(sample_positions(length))
        products += case.heads * min(rerank_candidates, length)
    return 2 * HEAD_DIM * products


def bytes_moved(case: Case, router: str | None, topk: int) -> int:
    """Queries, the keys of every sequence once, its page means where the pooled router looks at them, and the indices written.

    What is kept between kernels is left out, and so are the keys of samples and candidates: they are read anyway.
    """
    tokens = sum(case.contexts)
    means = tokens // PAGE_SIZE * MEAN_BYTES if router == "pooled" else 0
    queries = case.rows * case.heads * (HEAD_DIM + 4)
    return tokens * TOKEN_BYTES + means + queries + case.rows * topk * 4


def rates(operations: int, moved: int, milliseconds: float, copy_gbps: float) -> dict:
    """TFLOPS and GB/s of a call, and these GB/s as a share of what a copy on the device reaches."""
    gbps = moved / milliseconds / 1e6
    return {
        "tflops": operations / milliseconds / 1e9,
        "gbps": gbps,
        "copy_share": gbps / copy_gbps,
    }
