"""What the `--misa-*` server arguments mean to the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from sglang.srt.layers.misa.server_args import MisaServerArgs


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

    @classmethod
    def from_server_args(cls, server_args: MisaServerArgs) -> Optional[MisaConfig]:
        """The configuration of a server, or None where MISA is off."""
        if not server_args.enable_misa:
            return None
        return cls(
            active_heads=server_args.misa_active_heads,
            block_size=server_args.misa_block_size,
            rerank_candidates=server_args.misa_rerank_candidates,
            min_context=server_args.misa_min_context,
        )
