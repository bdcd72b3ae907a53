"""SGLang 0.5.17: server arguments are a dataclass, which resolves itself where it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Optional, Tuple

from sglang.srt.layers.attention.dsa.utils import (
    can_dsa_prefill_cp_round_robin_split as deals_rows_out,
)
from sglang.srt.layers.misa.refusal import Refusal

__all__ = ["deals_rows_out"]

# What `subclass` puts behind Record has all the other arguments: to a type checker it may be anything.
_Behind: Any = object


class Record(_Behind):
    """Arguments that are checked where they are made."""

    def __post_init__(self):
        super().__post_init__()
        self.check()


def _context_parallel(args: Any) -> bool:
    return args.attn_cp_size > 1 or args.enable_prefill_cp


def _deals_rows_out(args: Any) -> bool:
    return args.enable_prefill_cp and args.cp_strategy == "interleave"


REFUSALS: Tuple[Refusal, ...] = (
    Refusal(
        lambda args: _context_parallel(args) and args.misa_router == "pooled",
        "--enable-misa with --misa-router pooled does not support context parallelism; use --misa-router sampled, or drop --enable-prefill-cp and --attn-cp-size.",
    ),
    Refusal(
        lambda args: _context_parallel(args) and not _deals_rows_out(args),
        "--enable-misa supports context parallelism by --enable-prefill-cp --cp-strategy interleave (round-robin-split) only; use these, or drop --attn-cp-size, --enable-prefill-cp and --cp-strategy zigzag (in-seq-split).",
    ),
)


def subclass(name: str, bases: Tuple[type, ...], more: type, **members: Any) -> type:
    # Fields of a class come behind those of the classes behind it.
    *first, last = bases
    return dataclass(type(name, (*first, more, last), members))


def field_names(cls: type) -> Tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


def state(args: Any) -> Tuple[Any, ...]:
    return (dict(args.__dict__),)


def restored(cls: type, values: dict) -> Any:
    args: Any = object.__new__(cls)
    args.__dict__.update(values)
    return args


def resolve(args: Any) -> None:
    """They have been since they were made."""


def resolved(args: Any) -> Any:
    return args


def decide(args: Any, **values: Any) -> None:
    for name, value in values.items():
        # SGLang's arguments are read-only once they are resolved.
        object.__setattr__(args, name, value)


def model_config(args: Any) -> Any:
    return args.get_model_config()


def attention_backends(args: Any) -> Tuple[Optional[str], Optional[str]]:
    return args.get_attention_backends()


def max_draft_tokens(args: Any) -> Optional[int]:
    return args.max_speculative_num_draft_tokens
