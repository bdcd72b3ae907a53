"""The hooks of the evaluation, where its variables are set."""

import os
from typing import List

from sglang.srt.layers.misa import environment
from sglang.srt.layers.misa.patching import Patch
from sglang.srt.plugins.hook_registry import HookType

MISA = "sglang.srt.layers.misa.hooks"
INDEXER = "sglang.srt.layers.attention.dsa.dsa_indexer.Indexer"
NEVER = "none: it is for evaluation only"


def patches() -> List[Patch]:
    """The patches that this process's environment asks for; some are on MISA's own hooks."""
    selection = os.environ.get(environment.EVAL_SELECTION)
    directory = os.environ.get(environment.CAPTURE_DIR)
    return [
        *(_of_selection(selection) if selection else ()),
        *(_of_recording(directory) if directory else ()),
    ]


def _of_selection(name: str) -> List[Patch]:
    from sglang.srt.layers.misa.evaluation.hooks import OtherSelection

    other = OtherSelection(name)
    return [
        Patch(
            f"{MISA}.select",
            HookType.REPLACE,
            other.select,
            "selects otherwise",
            NEVER,
        ),
        Patch(
            f"{MISA}.sharing",
            HookType.REPLACE,
            other.sharing,
            "has every rank select for all rows",
            NEVER,
        ),
        Patch(
            f"{MISA}.announce",
            HookType.REPLACE,
            other.announce,
            "says so in the log",
            NEVER,
        ),
        Patch(
            "sglang.srt.managers.scheduler.Scheduler.get_init_info",
            HookType.AFTER,
            other.report,
            "says so in the server's information",
            NEVER,
        ),
    ]


def _of_recording(directory: str) -> List[Patch]:
    from sglang.srt.layers.misa.evaluation.hooks import Recording

    recording = Recording(directory)
    return [
        Patch(
            f"{MISA}.select",
            HookType.AROUND,
            recording.select,
            "records what MISA chose",
            NEVER,
        ),
        Patch(
            f"{INDEXER}._get_topk_ragged",
            HookType.AFTER,
            recording.after_ragged,
            "records what SGLang's own indexer chose in extend",
            NEVER,
        ),
        Patch(
            f"{INDEXER}._get_topk_paged",
            HookType.AFTER,
            recording.after_paged,
            "records what it chose in decode",
            NEVER,
        ),
        Patch(
            "sglang.srt.layers.attention.dsa_backend.DeepseekSparseAttnBackend.forward_extend",
            HookType.AFTER,
            recording.after_attention,
            "records the attention that selections are measured by",
            NEVER,
        ),
    ]
