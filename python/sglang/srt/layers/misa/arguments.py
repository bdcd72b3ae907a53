"""MISA's server arguments: their names, types, help and defaults. `server_args` adds them to SGLang's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional

from sglang.srt.arg_groups.arg_utils import NS, A
from sglang.srt.layers.misa.config import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_MIN_CONTEXT,
    DEFAULT_RERANK_CANDIDATES,
    MAX_CONTEXT,
)

ROUTERS = Literal["sampled", "pooled"]
DECODES = Literal["dsa", "misa"]


@dataclass
class Fields:
    """`--enable-misa` and the `--misa-*` arguments."""

    enable_misa: A[
        bool,
        "Enable MISA: route every query of the DSA indexer to a few of its heads and score the tokens with those only.",
        NS("exec.kernel"),
    ] = False
    misa_router: A[
        ROUTERS,
        "What chooses the heads of a query: 'sampled' looks at 128 to 256 keys of its prefix, and gives all heads that it does not choose a shared one beside those that it does; 'pooled' is the paper's, looks at the mean keys of blocks, and keeps those of pages beside the KV cache.",
        NS("exec.kernel"),
    ] = "sampled"
    misa_active_heads: A[
        int,
        "Number of heads that score the tokens of a query; with the sampled router the shared head is one of them, and 1 means that one alone. All heads of the model's indexer give DSA's own selection.",
        NS("exec.kernel"),
    ] = 8
    misa_block_size: A[
        Optional[int],
        f"Tokens in a block of pooled keys, with --misa-router pooled only. A multiple of 64 up to {MAX_CONTEXT}; {DEFAULT_BLOCK_SIZE} by default.",
        NS("exec.kernel"),
    ] = None
    misa_rerank_candidates: A[
        Optional[int],
        f"Hierarchical MISA: keep this many tokens by the heads that are chosen and select among them with all heads. 0 disables it; otherwise at least the model's index_topk and at most {MAX_CONTEXT}, and on a GPU a multiple of 64 up to 16384. {DEFAULT_RERANK_CANDIDATES} by default with the sampled router, 0 with the pooled one.",
        NS("exec.kernel"),
    ] = None
    misa_min_context: A[
        Optional[int],
        f"Score prompt tokens that see at most so many tokens with all heads, by SGLang's own indexer where no token of a batch sees more. By default, on a GPU and with candidates to re-rank, {DEFAULT_MIN_CONTEXT[64]} with 64 indexer heads and {DEFAULT_MIN_CONTEXT[32]} with 32; otherwise 0. Applies to prefill only: in decode and in speculative verify, lengths are not known to the host.",
        NS("exec.kernel"),
    ] = None
    misa_decode: A[
        DECODES,
        "What selects in decode of one row a sequence, a draft model's included: 'dsa' is SGLang's own indexer, with all heads, for reading the keys is the cost there, and fewer heads save none of it; 'misa' routes as prefill does. Where a sequence has several rows, in speculative verify and draft extend, which share what reading its keys costs, MISA selects in either case.",
        NS("exec.kernel"),
    ] = "dsa"
    misa_audit_interval: A[
        int,
        "Every so many forward steps, select some routed rows of a prompt by all heads as well, and log and export what MISA missed (see --enable-metrics); 0 is never. With --misa-decode misa and without speculative decoding, decode is audited too, in steps that then run outside of the CUDA graph.",
        NS("exec.kernel"),
    ] = 0
