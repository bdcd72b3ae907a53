"""SGLang 0.5.23: server arguments are a msgspec record of what was given, with what was resolved beside; `resolve_once` resolves them."""

from __future__ import annotations

import dataclasses
from typing import Any, Optional, Tuple, get_type_hints

import msgspec

from sglang.srt.arg_groups.model_override_base import (
    attention_backends_of,
    model_config_of,
    resolving_view,
)
from sglang.srt.arg_groups.overrides import (
    declare_resolution,
    max_speculative_num_draft_tokens,
)
from sglang.srt.configs.model_config import get_dsa_index_kpool
from sglang.srt.layers.attention.dsa.utils import (
    can_dsa_prefill_cp_interleave as deals_rows_out,
)
from sglang.srt.layers.misa.refusal import Refusal

__all__ = ["deals_rows_out"]


class Record:
    """Arguments that `server_args.resolve_once` checks."""


def _pools_index_keys(args: Any) -> bool:
    return get_dsa_index_kpool(model_config(args).hf_config) > 1


REFUSALS: Tuple[Refusal, ...] = (
    Refusal(
        _pools_index_keys,
        "--enable-misa does not support IndexerKPool, the indexer of models with index_kpool (Glm5Next), which scores pooled keys; drop --enable-misa.",
    ),
    Refusal(
        lambda args: args.attn_cp_size > 1 or args.enable_prefill_cp,
        "--enable-misa does not support context parallelism with SGLang 0.5.23 yet; drop --enable-prefill-cp, --cp-strategy and --attn-cp-size, or install sglang==0.5.17.",
    ),
    Refusal(
        lambda args: args.enable_kv_cache_sharding,
        "--enable-misa does not support KV cache sharding, with which a rank has some pages of index K only; drop --enable-kv-cache-sharding.",
    ),
    Refusal(
        lambda args: args.enable_unified_cache_external_linker
        or args.enable_linker_mla_dedup,
        "--enable-misa does not support external KV stores yet; drop --enable-unified-cache-external-linker and --enable-linker-mla-dedup.",
    ),
    Refusal(
        lambda args: args.disaggregation_decode_retraction_backup == "host_pool",
        "--enable-misa does not support --disaggregation-decode-retraction-backup host_pool yet; drop it.",
    ),
    Refusal(
        lambda args: args.enable_pd_role_switch,
        "--enable-misa does not support servers that change between prefill and decode; drop --enable-pd-role-switch.",
    ),
    Refusal(
        lambda args: args.enable_nvidia_megakernel,
        "--enable-misa does not support the NVIDIA megakernel, which goes round the indexer; drop --enable-nvidia-megakernel.",
    ),
    # A draft model decodes with SGLang's own indexer where the target model does.
    Refusal(
        lambda args: args.misa_decode == "misa"
        and args.speculative_algorithm is not None
        and args.speculative_dsa_topk_backend == "flashinfer",
        "--enable-misa with --misa-decode misa has a top-k of its own, for the draft model too; drop --speculative-dsa-topk-backend flashinfer.",
    ),
)


def subclass(name: str, bases: Tuple[type, ...], more: type, **members: Any) -> type:
    hints = get_type_hints(more, include_extras=True)
    return msgspec.defstruct(
        name,
        [(x.name, hints[x.name], x.default) for x in dataclasses.fields(more)],
        bases=bases,
        namespace=members,
        # For what SGLang keeps beside the fields.
        dict=True,
    )


def field_names(cls: type) -> Tuple[str, ...]:
    return cls.__struct_fields__  # type: ignore[attr-defined]


def state(args: Any) -> Tuple[Any, ...]:
    return msgspec.structs.asdict(args), dict(args.__dict__)


def restored(cls: type, values: dict, beside: dict) -> Any:
    args = cls(**values)
    # Among it is that they are resolved, and read-only.
    args.__dict__.update(beside)
    return args


def resolve(args: Any) -> None:
    args.resolve_once()


def resolved(args: Any) -> Any:
    return resolving_view(args)


def decide(args: Any, **values: Any) -> None:
    declare_resolution(args, "misa", **values)


def model_config(args: Any) -> Any:
    return model_config_of(args)


def attention_backends(args: Any) -> Tuple[Optional[str], Optional[str]]:
    return attention_backends_of(resolving_view(args))


def max_draft_tokens(args: Any) -> Optional[int]:
    return max_speculative_num_draft_tokens(args)
