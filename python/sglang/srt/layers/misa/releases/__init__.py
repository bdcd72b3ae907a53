"""The releases of SGLang that MISA knows, a module each; `installed` has `RELEASE`, the module of the one that is installed.

What differs between releases is in these modules, which have the same names, or in the table of hooks (`patches`), whose rows
say for which releases they are. Nothing else asks for a release. Each module has:

    Record                          what a class of server arguments with MISA's has beside its fields; its `check` is called
                                    once the arguments are resolved
    REFUSALS                        what is refused with this release only
    subclass(name, bases, fields)   the class of server arguments that has `fields`, a dataclass, behind its own
    field_names(class)              of server arguments
    state(args)                     what a pickle of server arguments has to hold, a tuple
    restored(class, *state)         server arguments from that, without resolving them again
    resolve(args)                   as a launcher does
    resolved(args)                  a view of the arguments as they were resolved
    decide(args, name=value)        change resolved arguments, before a server is launched with them
    model_config(args)              SGLang's ModelConfig
    attention_backends(args)        those of prefill and decode
    max_draft_tokens(args)          of a speculative step, or None
    deals_rows_out(forward_batch)   whether context parallelism gives each rank every so many rows of an extend batch
"""

from __future__ import annotations

from typing import Dict, Optional

MODULES: Dict[str, str] = {"0.5.17": "v0_5_17", "0.5.23": "v0_5_23"}
# In the order in which they came out.
KNOWN = tuple(MODULES)


def problem(version: str) -> Optional[str]:
    """Why MISA does not start with this release of SGLang, a sentence; None where it does."""
    if version in MODULES:
        return None
    return f"SGLang {version} is installed, and MISA knows {' and '.join(KNOWN)}; install sglang=={KNOWN[-1]}."


def closest(version: str) -> str:
    """The release as which SGLang is treated: of one that is not known the newest, so that MISA gets as far as refusing it."""
    return version if version in MODULES else KNOWN[-1]
