# SPDX-License-Identifier: Apache-2.0
"""What a test may change in a running server."""

from sglang.srt.managers.io_struct import (
    SetInternalStateReq,
    SetInternalStateReqOutput,
)
from sglang.srt.managers.scheduler import Scheduler

_set_internal_state = Scheduler.set_internal_state


def set_internal_state(
    self: Scheduler, request: SetInternalStateReq
) -> SetInternalStateReqOutput:
    """SGLang's own, which takes "chunked_prefill_size" too: the scheduler reads it for every batch."""
    values = request.server_args
    if "chunked_prefill_size" in values:
        self.chunked_prefill_size = values.pop("chunked_prefill_size")
    return _set_internal_state(self, request)
