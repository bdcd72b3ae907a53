"""SGLang's server arguments with MISA's, and what MISA refuses to run with."""

from __future__ import annotations

import argparse
import functools
import os
from dataclasses import fields
from typing import Any, ClassVar, Dict, Optional, get_args

import torch

import sglang.srt.server_args
from sglang.srt.arg_groups.arg_utils import add_cli_args_from_dataclass
from sglang.srt.configs.model_config import is_deepseek_dsa
from sglang.srt.layers.misa import process
from sglang.srt.layers.misa.arguments import DECODES, ROUTERS, Fields
from sglang.srt.layers.misa.config import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_MIN_CONTEXT,
    DEFAULT_RERANK_CANDIDATES,
    MAX_CONTEXT,
    MisaConfig,
)
from sglang.srt.layers.misa.environment import EVAL_SELECTION, SELECTIONS
from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE
from sglang.srt.layers.misa.operations import kernels_problem, operations
from sglang.srt.layers.misa.patching import check_engaged
from sglang.srt.layers.misa.refusal import Refusal
from sglang.srt.layers.misa.releases.installed import RELEASE
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import is_cpu, is_hip


class MisaArguments(RELEASE.Record):
    """What `with_misa` adds to a class of server arguments beside `Fields`."""

    _base: ClassVar[type]

    def check(self) -> None:
        """Check the arguments once they are resolved.

        Raises:
            ValueError: `enable_misa` is set and a value or a combination is not supported.
            RuntimeError: `enable_misa` is set and a hook on SGLang did not engage.
        """
        if self.enable_misa:
            check_misa_server_args(self)

    def __reduce__(self):
        return _restored, (self._base, *RELEASE.state(self))


@functools.cache
def with_misa(base: type) -> Any:
    """The class of server arguments `base`, SGLang's or another plugin's, with MISA's."""
    if issubclass(base, MisaArguments):
        return base
    bases = MisaArguments, base
    return RELEASE.subclass(
        "MisaServerArgs", bases, Fields, __module__=__name__, _base=base
    )


def _restored(base: type, *state: Any) -> Any:
    """Arguments from a pickle or a copy: a class that `with_misa` made has no name to be found by."""
    args = RELEASE.restored(with_misa(base), *state)
    # They reach a scheduler before it loads its plugins; from here on it must not do without this one.
    process.requires_misa |= args.enable_misa
    return args


# The hooks on ServerArgs. The class itself stays, and so do its instances without MISA: whoever has made some before
# plugins load can use them, and another plugin can replace the class.


def add_cli_args(_, parser: argparse.ArgumentParser) -> None:
    """After `ServerArgs.add_cli_args`."""
    add_cli_args_from_dataclass(parser, Fields)


def from_cli_args(original, *args):
    """Around the classmethod `ServerArgs.from_cli_args`.

    SGLang hands it over without its class where that is another plugin's and inherits the method.
    """
    *cls, namespace = args
    if not getattr(namespace, "enable_misa", False):
        return original(*args)
    (cls,) = cls or (original.__self__,)
    return getattr(original, "__func__", original)(with_misa(cls), namespace)


def initialize(original, self, *args, **values) -> None:
    """Around `ServerArgs.__init__` of a dataclass: with `enable_misa`, `self` gets the class that has it.

    Raises:
        ValueError: SGLANG_MISA_EVAL_SELECTION is set and `enable_misa` is not.
    """
    misa = _taken_out(values)
    if misa.get("enable_misa"):
        self.__class__ = with_misa(self.__class__)
        self.__init__(*args, **values, **misa)
        return
    original(self, *args, **values)
    _check_without_misa()


def resolve_once(original, self) -> None:
    """Around `ServerArgs.resolve_once` of a record: check what was resolved.

    Raises:
        ValueError: SGLANG_MISA_EVAL_SELECTION is set and `enable_misa` is not, or see `MisaArguments.check`.
        RuntimeError: see `MisaArguments.check`.
    """
    if getattr(self, "_resolution_finished", False):
        return
    original(self)
    try:
        if isinstance(self, MisaArguments):
            self.check()
        else:
            _check_without_misa()
    except BaseException:
        # As SGLang does, so that whoever goes on with them is refused again.
        self._resolution_finished, self._resolution_failed = False, True
        raise


def engine_arguments(original: type, **values) -> Any:
    """In place of `Engine.server_args_class` where that is a record, whose class chooses no other on its own."""
    if original.__module__ == sglang.srt.server_args.__name__:
        # Another plugin may have replaced it since, and Engine would have been imported after that.
        original = sglang.srt.server_args.ServerArgs
    misa = _taken_out(values)
    if not misa.get("enable_misa"):
        return original(**values)
    return with_misa(original)(**values, **misa)


def _taken_out(values: Dict[str, Any]) -> Dict[str, Any]:
    """MISA's arguments out of a call's, which without `enable_misa` mean nothing."""
    names = [field.name for field in fields(Fields) if field.name in values]
    return {name: values.pop(name) for name in names}


def _check_without_misa() -> None:
    if _eval_selection() is not None:
        raise ValueError(
            f"{EVAL_SELECTION} is set without --enable-misa; add --enable-misa or unset it."
        )


def _eval_selection() -> Optional[str]:
    return os.environ.get(EVAL_SELECTION) or None


def misa_config(server_args: ServerArgs) -> Optional[MisaConfig]:
    """The configuration of a server with all defaults filled in, or None where MISA is off."""
    if not isinstance(server_args, MisaArguments) or not server_args.enable_misa:
        return None
    block_size = server_args.misa_block_size
    if server_args.misa_router == "pooled" and block_size is None:
        block_size = DEFAULT_BLOCK_SIZE
    return MisaConfig(
        router=server_args.misa_router,
        active_heads=server_args.misa_active_heads,
        block_size=block_size,
        rerank_candidates=_rerank_candidates(server_args),
        # The only one that `check_misa_server_args` decides.
        min_context=RELEASE.resolved(server_args).misa_min_context or 0,
        decode=server_args.misa_decode,
    )


def _rerank_candidates(args: Any) -> int:
    if args.misa_rerank_candidates is not None:
        return args.misa_rerank_candidates
    # What is evaluated has a single stage.
    if args.misa_router == "pooled" or _eval_selection() is not None:
        return 0
    return DEFAULT_RERANK_CANDIDATES


REFUSALS = (
    Refusal(
        lambda args: is_hip() or args.device not in ("cuda", "cpu"),
        "--enable-misa needs an NVIDIA GPU: ROCm, NPU and XPU are not supported; drop --enable-misa.",
    ),
    Refusal(
        lambda args: args.device == "cpu" and not is_cpu(),
        "--enable-misa on --device cpu needs the CPU engine of the test suite; set SGLANG_USE_CPU_ENGINE=1.",
    ),
    Refusal(
        lambda args: args.use_ray,
        "--enable-misa does not support Ray: SGLang loads no plugins in its actors; drop --use-ray.",
    ),
    Refusal(
        lambda args: args.dcp_size > 1,
        "--enable-misa does not support decode context parallelism; drop --dcp-size.",
    ),
    # Index K goes wherever the KV cache does. Page means would have to be computed anew where it arrives.
    Refusal(
        lambda args: args.misa_router == "pooled"
        and args.disaggregation_mode != "null",
        "--enable-misa with --misa-router pooled does not support PD disaggregation, which sends no page means; drop --misa-router or --disaggregation-mode.",
    ),
    Refusal(
        lambda args: args.misa_router == "pooled" and args.enable_hierarchical_cache,
        "--enable-misa with --misa-router pooled does not support HiCache, which restores no page means; drop --misa-router or --enable-hierarchical-cache.",
    ),
    # What SGLang leaves behind itself.
    Refusal(
        lambda args: args.enable_hierarchical_cache
        and args.speculative_algorithm is not None,
        "--enable-misa does not support HiCache with speculative decoding, for SGLang does not restore the draft's index K; drop --enable-hierarchical-cache or --speculative-algorithm.",
    ),
    Refusal(
        lambda args: args.enable_hierarchical_cache
        and args.disaggregation_mode == "decode",
        "--enable-misa does not support HiCache in a decode server, where SGLang never ends the load of a DSA model's prefix; drop --enable-hierarchical-cache there.",
    ),
    Refusal(
        lambda args: args.disaggregation_decode_enable_offload_kvcache,
        "--enable-misa does not support the offload of a decode server's KV cache, which leaves index K behind; drop --disaggregation-decode-enable-offload-kvcache.",
    ),
    Refusal(
        lambda args: args.enable_lmcache or args.enable_flexkv,
        "--enable-misa does not support external KV caches yet; drop --enable-lmcache and --enable-flexkv.",
    ),
    Refusal(
        lambda args: args.enable_hisparse,
        "--enable-misa does not support HiSparse; drop --enable-hisparse.",
    ),
    Refusal(
        lambda args: args.enable_dsa_cache_layer_split,
        "--enable-misa does not support the DSA cache layer split; drop --enable-dsa-cache-layer-split.",
    ),
    Refusal(
        lambda args: args.speculative_algorithm not in (None, "EAGLE"),
        "--enable-misa supports speculative decoding with the model's own NextN layer only; set --speculative-algorithm to EAGLE or drop it.",
    ),
    Refusal(
        lambda args: args.speculative_algorithm is not None
        and args.enable_multi_layer_eagle,
        "--enable-misa supports speculative decoding with a single NextN layer; drop --enable-multi-layer-eagle.",
    ),
    Refusal(
        lambda args: args.speculative_draft_attention_backend not in (None, "dsa"),
        "--enable-misa needs the dsa attention backend for the draft model too; drop --speculative-draft-attention-backend.",
    ),
    Refusal(
        lambda args: args.page_size != PAGE_SIZE,
        "--enable-misa needs pages of 64 tokens; drop --page-size or set it to 64.",
    ),
    Refusal(
        lambda args: set(RELEASE.attention_backends(args)) != {"dsa"},
        "--enable-misa needs the dsa attention backend; drop --attention-backend, --prefill-attention-backend and --decode-attention-backend.",
    ),
    Refusal(
        lambda args: args.cuda_graph_config.prefill.backend == Backend.FULL,
        "--enable-misa takes the lengths of prompts from the host; drop --cuda-graph-backend-prefill full.",
    ),
    # These two choose how SGLang's own indexer decodes. Where it does, they do what they say.
    Refusal(
        lambda args: args.misa_decode == "misa"
        and args.dsa_topk_backend == "flashinfer",
        "--enable-misa with --misa-decode misa has a top-k of its own, with its own tie-break; drop --dsa-topk-backend flashinfer.",
    ),
    Refusal(
        lambda args: args.misa_decode == "misa"
        and args.dsa_paged_mqa_logits_backend not in ("auto", "deepgemm"),
        "--enable-misa with --misa-decode misa does its own scoring; drop --dsa-paged-mqa-logits-backend.",
    ),
    Refusal(
        lambda args: (_eval_selection() or "hisa") not in SELECTIONS,
        f"--enable-misa knows no such {EVAL_SELECTION}; set it to {', '.join(SELECTIONS)} or unset it.",
    ),
    Refusal(
        lambda args: _eval_selection() is not None and _selects_in_cuda_graphs(args),
        f"--enable-misa with {EVAL_SELECTION} waits for the device; add --disable-cuda-graph.",
    ),
    Refusal(
        lambda args: _eval_selection() is not None
        and bool(args.misa_rerank_candidates or args.misa_min_context),
        f"--enable-misa with {EVAL_SELECTION} has a single stage; drop --misa-rerank-candidates and --misa-min-context.",
    ),
    Refusal(
        lambda args: _eval_selection() is not None and args.misa_audit_interval > 0,
        f"--enable-misa with {EVAL_SELECTION} has nothing to audit; drop --misa-audit-interval.",
    ),
)


def _selects_in_cuda_graphs(args: Any) -> bool:
    graphs = [args.cuda_graph_config.prefill]
    if args.misa_decode == "misa" or args.speculative_algorithm is not None:
        graphs.append(args.cuda_graph_config.decode)
    return any(graph.backend != Backend.DISABLED for graph in graphs)


def check_misa_server_args(args: Any) -> None:
    """Refuse what MISA can't serve, in one sentence that names the flag and the remedy.

    Raises:
        ValueError: a value or a combination is not supported.
        RuntimeError: a hook on SGLang did not engage.
    """
    check_engaged()
    hf_config = RELEASE.model_config(args).hf_config
    if not is_deepseek_dsa(hf_config):
        raise ValueError(
            f"--enable-misa needs a model with DeepSeek Sparse Attention, which {args.model_path} "
            f"({', '.join(hf_config.architectures)}) is not; drop --enable-misa."
        )
    resolved = RELEASE.resolved(args)
    for refusal in (*RELEASE.REFUSALS, *REFUSALS):
        if refusal.applies(resolved):
            raise ValueError(refusal.message)
    num_heads, topk = (
        _positive(args, hf_config, name) for name in ("index_n_heads", "index_topk")
    )
    _check_values(args, num_heads, topk)
    if resolved.device == "cuda":
        _check_kernels(args, num_heads, topk)
        if args.misa_min_context is None and _rerank_candidates(args):
            least = DEFAULT_MIN_CONTEXT.get(num_heads, 0)
            RELEASE.decide(args, misa_min_context=least)


def _positive(args: Any, hf_config, name: str) -> int:
    value = getattr(hf_config, name, None)
    if type(value) is not int or value < 1:
        raise ValueError(
            f"--enable-misa needs a model whose config has a positive number as {name}, which {args.model_path} "
            f"({name}={value!r}) has not; drop --enable-misa."
        )
    return value


def _check_values(args: Any, num_heads: int, topk: int) -> None:
    if topk < PAGE_SIZE:
        raise ValueError(
            f"--enable-misa needs a model that selects at least {PAGE_SIZE} tokens, not index_topk={topk}; "
            "drop --enable-misa."
        )
    # The command line knows its choices; a program may hand over anything.
    for name, choices in (("router", ROUTERS), ("decode", DECODES)):
        value = getattr(args, f"misa_{name}")
        if value not in get_args(choices):
            raise ValueError(
                f"--misa-{name} {value} is not {' or '.join(get_args(choices))}; drop --misa-{name}."
            )
    if not 1 <= args.misa_active_heads <= num_heads:
        raise ValueError(
            f"--misa-active-heads {args.misa_active_heads} is not between 1 and {num_heads}, the indexer heads of "
            f"{args.model_path}; {num_heads} means exactly DSA."
        )
    _check_block_size(args)
    candidates = _rerank_candidates(args)
    if candidates and candidates < topk:
        raise ValueError(
            f"--misa-rerank-candidates {candidates} is less than the {topk} tokens that "
            f"{args.model_path} selects; use 0 for a single stage or at least {topk}."
        )
    if candidates > MAX_CONTEXT:
        raise ValueError(
            f"--misa-rerank-candidates {candidates} is more than any sequence has; use at most "
            f"{MAX_CONTEXT}, or 0 for a single stage."
        )
    if args.misa_min_context is not None and args.misa_min_context < 0:
        raise ValueError(
            f"--misa-min-context {args.misa_min_context} is negative; use 0 to route every prompt token."
        )
    if args.misa_audit_interval < 0:
        raise ValueError(
            f"--misa-audit-interval {args.misa_audit_interval} is negative; use 0 to audit nothing."
        )
    if args.misa_audit_interval and args.misa_active_heads >= num_heads:
        raise ValueError(
            f"--misa-audit-interval {args.misa_audit_interval} compares with all heads, and those of --misa-active-heads "
            f"{args.misa_active_heads} are all; drop --misa-audit-interval."
        )


def _check_block_size(args: Any) -> None:
    block_size = args.misa_block_size
    if block_size is None:
        return
    if args.misa_router != "pooled":
        raise ValueError(
            f"--misa-block-size {block_size} is for the pooled router, and the {args.misa_router} one has no blocks; drop "
            "--misa-block-size or add --misa-router pooled."
        )
    if block_size < PAGE_SIZE or block_size % PAGE_SIZE:
        raise ValueError(
            f"--misa-block-size {block_size} is not a positive multiple of {PAGE_SIZE}; the default is "
            f"{DEFAULT_BLOCK_SIZE}."
        )
    if block_size > MAX_CONTEXT:
        raise ValueError(
            f"--misa-block-size {block_size} is longer than any sequence; use at most {MAX_CONTEXT}, which makes one block "
            "of every prefix."
        )


def _check_kernels(args: Any, num_heads: int, topk: int) -> None:
    if problem := kernels_problem():
        raise ValueError(f"--enable-misa: {problem}.")
    kernels = operations(torch.device("cuda"))
    if num_heads not in kernels.HEADS:
        raise ValueError(
            f"--enable-misa has kernels for indexers of {' or '.join(map(str, kernels.HEADS))} heads, not for the "
            f"{num_heads} of {args.model_path}; drop --enable-misa."
        )
    limit = f"a multiple of {kernels.TOPK_MULTIPLE} up to {kernels.MAX_TOPK}, which the kernels need"
    if topk % kernels.TOPK_MULTIPLE or topk > kernels.MAX_TOPK:
        raise ValueError(
            f"--enable-misa: index_topk={topk} of {args.model_path} is not {limit}; drop --enable-misa."
        )
    rows = RELEASE.max_draft_tokens(args)
    if rows is not None and rows > kernels.MAX_ROWS:
        raise ValueError(
            f"--speculative-num-draft-tokens {rows} is more than the {kernels.MAX_ROWS} rows a sequence that --enable-misa "
            f"has kernels for; use at most {kernels.MAX_ROWS}."
        )
    candidates = _rerank_candidates(args)
    if candidates % kernels.TOPK_MULTIPLE or candidates > kernels.MAX_TOPK:
        raise ValueError(
            f"--misa-rerank-candidates {candidates} is not {limit}; use 0 for a single stage or such a multiple."
        )
