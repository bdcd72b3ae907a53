"""The parameters of the method, which `server_args` makes of the `--misa-*` arguments."""

from dataclasses import dataclass
from typing import Optional

# Tokens of the longest sequence that the kernels and the layer take: a position has 22 bits in a kernel's sort key.
MAX_CONTEXT = 1 << 22
# Tokens in a pooled block where --misa-block-size does not say; the paper's.
DEFAULT_BLOCK_SIZE = 1024
# Prompt tokens that see fewer tokens than this are left to all heads where --misa-min-context does not say. The benchmark
# of the indexer decides it: the least with which no prompt takes longer than with DSA.
DEFAULT_MIN_CONTEXT = 0


@dataclass(frozen=True)
class MisaConfig:
    """The parameters of the method.

    Attributes:
        router: "sampled", with a shared head; or "pooled", the paper's.
        active_heads: heads that score the tokens of a query, the shared one among them; all H heads are DSA.
        block_size: tokens in a pooled block, a multiple of 64; None with the sampled router, which pools nothing.
        rerank_candidates: tokens kept for a second scoring with all heads; 0 for a single stage.
        min_context: prompt tokens that see fewer tokens than this are scored by all heads.
        decode: what selects in decode of one row a sequence: "dsa", SGLang's own indexer with all heads, or "misa".
    """

    router: str = "sampled"
    active_heads: int = 8
    block_size: Optional[int] = None
    rerank_candidates: int = 0
    min_context: int = DEFAULT_MIN_CONTEXT
    decode: str = "dsa"

    @property
    def pools_keys(self) -> bool:
        """Whether page means are kept beside index K."""
        return self.router == "pooled"
