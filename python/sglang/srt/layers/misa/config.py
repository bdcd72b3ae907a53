"""The parameters of the method, which `server_args` makes of the `--misa-*` arguments."""

from dataclasses import dataclass

# Tokens of the longest sequence that the kernels and the layer take: a position has 22 bits in a kernel's sort key.
MAX_CONTEXT = 1 << 22


@dataclass(frozen=True)
class MisaConfig:
    """The parameters of the method.

    Attributes:
        active_heads: heads that score the tokens of a query, chosen among the indexer's H heads.
        block_size: tokens in a pooled block, a multiple of 64.
        rerank_candidates: tokens kept for a second scoring with all heads; 0 for a single stage.
        min_context: prompt tokens that see fewer tokens than this are scored by all heads.
    """

    active_heads: int = 8
    block_size: int = 1024
    rerank_candidates: int = 0
    min_context: int = 0
