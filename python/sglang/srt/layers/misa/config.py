"""The parameters of the method, which `server_args` makes of the `--misa-*` arguments."""

from dataclasses import dataclass
from typing import Optional

# Tokens of the longest sequence that the kernels and the layer take: a position has 22 bits in a kernel's sort key.
MAX_CONTEXT = 1 << 22
# Tokens in a pooled block where --misa-block-size does not say; the paper's.
DEFAULT_BLOCK_SIZE = 1024
# Candidates that all heads re-rank with the sampled router where --misa-rerank-candidates does not say: the fewest with which
# what is selected cannot be told from DSA's in what is measured (docs/quality.md).
DEFAULT_RERANK_CANDIDATES = 4096
# Prompt tokens that see at most so many tokens are left to all heads where --misa-min-context does not say, by the indexer's
# number of heads, on a GPU and with candidates to re-rank: up to it SGLang's own path is as fast (benchmark/results), and it is a
# multiple of the usual chunks of a prompt, so that a chunk seldom has tokens on both sides of it.
DEFAULT_MIN_CONTEXT = {64: 16384, 32: 24576}


@dataclass(frozen=True)
class MisaConfig:
    """The parameters of the method.

    Attributes:
        router: "sampled", with a shared head; or "pooled", the paper's.
        active_heads: heads that score the tokens of a query, the shared one among them; all H heads are DSA.
        block_size: tokens in a pooled block, a multiple of 64; None with the sampled router, which pools nothing.
        rerank_candidates: tokens kept for a second scoring with all heads; 0 for a single stage.
        min_context: prompt tokens that see at most so many tokens are scored by all heads.
        decode: what selects in decode of one row a sequence: "dsa", SGLang's own indexer with all heads, or "misa".
    """

    router: str = "sampled"
    active_heads: int = 8
    block_size: Optional[int] = None
    rerank_candidates: int = 0
    min_context: int = 0
    decode: str = "dsa"

    @property
    def pools_keys(self) -> bool:
        """Whether page means are kept beside index K."""
        return self.router == "pooled"

    def dense_up_to(self, topk: int) -> int:
        """Prompt tokens that see at most so many tokens are scored by all heads, also in a batch of MISA's; 0: none are.

        Those that see at most `topk` tokens select all of them, whichever heads score.
        """
        return self.min_context if self.min_context > topk else 0
