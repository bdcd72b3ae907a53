"""Recording what the indexer was given and what it chose, for tests and for measuring recall.

With SGLANG_MISA_CAPTURE_DIR set, every call of the indexer, MISA's or SGLang's own, leaves one file a sequence.
Calls under a CUDA graph leave nothing, those of a prefill graph included: add --disable-cuda-graph to record on a GPU.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Dict, List, Optional

import torch

from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE, read_pages

CAPTURE_DIR_ENV = "SGLANG_MISA_CAPTURE_DIR"


class Recorder:
    """Writes records, dictionaries of CPU tensors, into a directory, numbered in the order of the calls."""

    def __init__(self, directory: str):
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.count = itertools.count()

    def record(
        self,
        *,
        layer_id: int,
        rid: str,
        q: torch.Tensor,
        weights: torch.Tensor,
        lengths: torch.Tensor,
        index_k: torch.Tensor,
        page_table: torch.Tensor,
        pooled_keys: Optional[torch.Tensor],
        heads: Optional[torch.Tensor],
        positions: torch.Tensor,
    ) -> None:
        """Save the rows of one sequence with the keys that they see.

        Args are those of `MisaIndexer.select`, with the rows and the page table of the sequence; the record holds the
        keys, scales and page means in the order of the sequence, up to the longest row, instead of the caches.
        """
        tokens = int(lengths.max())
        pages = page_table[: -(-tokens // PAGE_SIZE)].long()
        keys, scales = read_pages(index_k, pages)
        record = {
            "layer_id": layer_id,
            "rid": rid,
            "q": q,
            "weights": weights,
            "lengths": lengths.long(),
            "k": keys[:tokens],
            "k_scale": scales[:tokens],
            "pages": pages,
            "page_means": None if pooled_keys is None else pooled_keys[pages],
            "heads": heads,
            "positions": positions,
        }
        record = {
            name: value.cpu().clone() if isinstance(value, torch.Tensor) else value
            for name, value in record.items()
        }
        path = self.directory / f"{os.getpid()}-{next(self.count):08d}.pt"
        # The name appears when the file is whole, so that a reader may look while the server runs.
        torch.save(record, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)


def load_records(directory: str) -> List[Dict]:
    """The records of a directory in the order in which they were written."""
    return [torch.load(path) for path in sorted(Path(directory).glob("*.pt"))]


_recorder = (
    Recorder(os.environ[CAPTURE_DIR_ENV]) if os.environ.get(CAPTURE_DIR_ENV) else None
)


def active_recorder() -> Optional[Recorder]:
    """The recorder, if this call is to be recorded."""
    if _recorder is None:
        return None
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None
    return _recorder
