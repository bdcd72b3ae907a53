"""Recording what the indexer was given and what it chose, for tests and for measuring recall.

With SGLANG_MISA_CAPTURE_DIR set, every call of the indexer, MISA's or SGLang's own, leaves one file a sequence. Beside those of
a prefill there is another one, with the attention's own queries of some rows and the keys that they might attend to.
Calls under a CUDA graph leave nothing, those of a prefill graph included: add --disable-cuda-graph to record on a GPU, and
SGLANG_DSA_FUSE_TOPK=false where SGLang's own indexer selects, in decode too: fused, it chooses no positions.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Dict, List, Optional, Tuple, Union

import torch

from sglang.srt.layers.misa.index_k_cache import PAGE_SIZE, read_pages

# Attention is recorded of the rows that see a multiple of this many tokens: a prime, so that they end anywhere in a page.
ATTENTION_STRIDE = 61


class Recorder:
    """Writes records, dictionaries of CPU tensors, into a directory, numbered in the order of the calls.

    Creates the directory with the first record.
    """

    def __init__(self, directory: Union[str, Path]):
        self.directory = Path(directory)
        self.count = itertools.count()
        # The last record of each layer and request, and the tokens of its longest row.
        self.latest: Dict[Tuple[int, str], Tuple[int, Path]] = {}

    def record(
        self,
        *,
        layer_id: int,
        rid: str,
        draft: bool,
        decode: bool,
        router: Optional[str],
        q: torch.Tensor,
        weights: torch.Tensor,
        lengths: torch.Tensor,
        index_k: torch.Tensor,
        page_table: torch.Tensor,
        pooled_keys: Optional[torch.Tensor],
        heads: Optional[torch.Tensor],
        shared_q: Optional[torch.Tensor],
        shared_scale: Optional[torch.Tensor],
        positions: torch.Tensor,
    ) -> None:
        """Save the rows of one sequence with the keys that they see.

        Args are those of `MisaIndexer.select` and the parts of its result, with the rows and the page table of the sequence,
        whether the layer is the `draft` model's, whether it is `decode`, in the sense of `Batch`, and MISA's `router`, None
        where SGLang's own indexer selected. The record holds the keys, scales and page means in the order of the sequence, up
        to the longest row, instead of the caches.
        """
        tokens = int(lengths.max())
        pages = page_table[: -(-tokens // PAGE_SIZE)].long()
        keys, scales = read_pages(index_k, pages)
        record = {
            "layer_id": layer_id,
            "rid": rid,
            "draft": draft,
            "decode": decode,
            "router": router,
            "q": q,
            "weights": weights,
            "lengths": lengths.long(),
            "k": keys[:tokens],
            "k_scale": scales[:tokens],
            "pages": pages,
            "page_means": None if pooled_keys is None else pooled_keys[pages],
            "heads": heads,
            "shared_q": shared_q,
            "shared_scale": shared_scale,
            "positions": positions,
        }
        path = self.directory / f"{os.getpid()}-{next(self.count):08d}.pt"
        self.latest[layer_id, rid] = tokens, path
        self._save(record, path)

    def record_attention(
        self,
        *,
        layer_id: int,
        rid: str,
        q: torch.Tensor,
        lengths: torch.Tensor,
        latent: torch.Tensor,
        page_table: torch.Tensor,
        scaling: float,
    ) -> None:
        """Save what decides the attention of some rows of a sequence, beside the record of those rows if there is one.

        Args:
            q: [T, heads, D], the absorbed queries of the rows, D the width of the latent cache.
            lengths: int [T], tokens visible to each row.
            latent: [slots, 1, D], the layer's latent cache, as wide as the queries.
            page_table: int32 [P], the pages of the sequence.
            scaling: of the dot products.

        The record holds q and lengths of every row that sees a multiple of ATTENTION_STRIDE tokens, the keys `k`, [S, D], and
        `scaling`.
        """
        latest = self.latest.get((layer_id, rid))
        rows = (lengths % ATTENTION_STRIDE == 0).nonzero()[:, 0]
        # Where the indexer did not have to select, there is no record of these rows.
        if latest is None or latest[0] != int(lengths.max()) or not len(rows):
            return
        tokens = int(lengths[rows].max())
        pages = page_table[: -(-tokens // PAGE_SIZE)].long()
        keys = latent.view(-1, PAGE_SIZE, latent.shape[-1])[pages].flatten(0, 1)
        record = {
            "q": q[rows],
            "lengths": lengths[rows].long(),
            "k": keys[:tokens],
            "scaling": scaling,
        }
        self._save(record, latest[1].with_suffix(".attention"))

    def _save(self, record: Dict, path: Path) -> None:
        record = {
            name: value.cpu().clone() if isinstance(value, torch.Tensor) else value
            for name, value in record.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        # The name appears when the file is whole, so that a reader may look while the server runs.
        torch.save(record, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)


def load_records(directory: Union[str, Path]) -> List[Dict]:
    """The records of a directory in the order in which they were written."""
    return [torch.load(path) for path in sorted(Path(directory).glob("*.pt"))]
