# SPDX-License-Identifier: Apache-2.0
"""All that a server imports of SGLang, for the process that servers are forked from.

Plugins are left to each server. They come after the modules that they patch, as in `sglang.Engine`.
"""

import gc
import logging
import sys
import warnings

_path = list(sys.path)

# There is much that SGLang misses on a CPU, and each server says the same in its log.
logging.disable()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sglang.srt.entrypoints.http_server
    import sglang.srt.models.registry  # noqa: F401
logging.disable(logging.NOTSET)
# All of it stays, in every server: the collector need not look at it again.
gc.freeze()


def restore_path() -> None:
    """A process gets the path of the one that starts it, with the folders of tests. Back to that of a server."""
    sys.path[:] = _path
