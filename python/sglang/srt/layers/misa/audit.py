"""What MISA misses in a running server: now and then a few rows are selected by all heads as well, and compared.

Nothing here waits for the device. A layer's call leaves counts in pinned memory, and `collect` reads those that have arrived.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Deque, Dict, FrozenSet, List, Optional

import torch

from sglang.srt.layers.misa.batch import Batch
from sglang.srt.layers.misa.indexer import MisaIndexer, Selection

logger = logging.getLogger(__name__)

# Rows of one call that are selected again, at most: scoring them with all heads takes far less than the call itself.
ROWS = 16


@dataclass
class Counts:
    """What a layer's audits have counted.

    Attributes:
        rows: rows that were selected again.
        tokens: tokens that all heads select for them.
        selected: those of them that MISA selected too.
        heads: for every head of the layer, the rows for which it was routed.
    """

    rows: int = 0
    tokens: int = 0
    selected: int = 0
    heads: List[int] = field(default_factory=list)

    @classmethod
    def of(cls, counts: torch.Tensor) -> Counts:
        """From what `count` returns."""
        rows, tokens, selected, *heads = counts.tolist()
        return cls(rows, tokens, selected, heads)

    def add(self, other: Counts) -> None:
        self.rows += other.rows
        self.tokens += other.tokens
        self.selected += other.selected
        heads = self.heads or [0] * len(other.heads)
        self.heads = [a + b for a, b in zip(heads, other.heads)]

    @property
    def recall(self) -> float:
        """The share of the tokens that MISA selected."""
        return self.selected / self.tokens


@dataclass
class Step:
    """One audited forward step: each layer's counts, and what says that they have arrived."""

    number: int
    layers: Dict[int, torch.Tensor] = field(default_factory=dict)
    copied: Optional[torch.cuda.Event] = None

    def add(self, layer_id: int, counts: torch.Tensor) -> None:
        """Copy a layer's counts to the host, behind what the current stream has to do."""
        if counts.is_cuda:
            pinned = torch.empty_like(counts, device="cpu", pin_memory=True)
            self.layers[layer_id] = pinned.copy_(counts, non_blocking=True)
            self.copied = self.copied or torch.cuda.Event()
            self.copied.record()
        else:
            self.layers[layer_id] = counts

    def arrived(self) -> bool:
        return self.copied is None or self.copied.query()


class Audit:
    """The audit of one scheduler. Off until `start` is called.

    Attributes:
        interval: forward steps between two audits; 0 where it is off.
        layers: what was counted since the start, by layer.
    """

    def __init__(self) -> None:
        self.interval = 0
        self.layers: Dict[int, Counts] = {}
        self._decode = False
        self._indexers: FrozenSet[Any] = frozenset()
        self._step: Callable[[], int] = lambda: 0
        self._last = 0
        self._pending: Deque[Step] = deque()
        self._export: Optional[Callable[[int, Counts, Counts], None]] = None

    def start(
        self,
        interval: int,
        *,
        indexers: FrozenSet[Any],
        step: Callable[[], int],
        decode: bool = False,
        export: Optional[Callable[[int, Counts, Counts], None]] = None,
    ) -> None:
        """From now on audit.

        Args:
            interval: forward steps between two audits.
            indexers: those whose calls are audited; the layers of a draft model have numbers of their own.
            step: the number of the forward step that runs.
            decode: whether decode is audited too.
            export: is given each layer that was audited, with what its last audit counted and what all have.
        """
        self.interval, self._last = interval, -interval
        self._indexers, self._step = indexers, step
        self._decode, self._export = decode, export

    def decode_is_due(self) -> bool:
        """Whether this is a step whose decode is audited.

        It follows from the number of the step alone: what runs in several ranks leaves the CUDA graph in all of them at once.
        """
        return self._decode and self._step() % self.interval == 0

    def is_due(self, indexer: Any, batch: Batch) -> bool:
        """Whether a call of the indexer is to be audited. A prompt's is in the first step after the interval that has one."""
        if batch.bounds is None:
            due = self.decode_is_due()
        else:
            # Negative where SGLang counts its steps anew.
            due = not 0 < self._step() - self._last < self.interval
        return due and indexer in self._indexers and not _is_capturing()

    def compare(
        self,
        layer_id: int,
        indexer: MisaIndexer,
        selection: Selection,
        *,
        q: torch.Tensor,
        weights: torch.Tensor,
        index_k: torch.Tensor,
        pooled_keys: Optional[torch.Tensor],
        batch: Batch,
        output: str,
        offsets: Optional[torch.Tensor],
    ) -> None:
        """Select some rows by all heads too, and count what both selections have.

        Args:
            selection: what the indexer selected, given the arguments that follow; see `MisaIndexer.select`.
        """
        config, topk = indexer.config, indexer.topk
        if selection.heads is None:
            return
        # A row that sees no more than are selected gets all, whichever heads score them.
        if batch.bounds is not None and batch.bounds[1] <= topk:
            return
        number = self._last = self._step()
        sample, index = batch.only(spread(len(q), ROWS, seed=number))
        all_heads = replace(config, active_heads=q.shape[1])
        wanted = replace(indexer, config=all_heads).select(
            q=q[index],
            weights=weights[index],
            index_k=index_k,
            pooled_keys=pooled_keys,
            batch=sample,
            output=output,
            offsets=None if offsets is None else offsets[index],
        )
        counts = count(
            selection.indices[index],
            wanted.indices,
            selection.heads[index],
            sample.lengths > topk,
            q.shape[1],
        )
        if not self._pending or self._pending[-1].number != number:
            self._pending.append(Step(number))
        self._pending[-1].add(layer_id, counts)

    def collect(self, log: bool = False) -> None:
        """Add up and export the audits that have arrived, and log each if asked to. Not while a step's calls are made."""
        while self._pending and self._pending[0].arrived():
            layers = {
                layer_id: Counts.of(counts)
                for layer_id, counts in self._pending.popleft().layers.items()
            }
            layers = {layer_id: x for layer_id, x in layers.items() if x.rows}
            for layer_id, counts in layers.items():
                total = self.layers.setdefault(layer_id, Counts())
                total.add(counts)
                if self._export is not None:
                    self._export(layer_id, counts, total)
            if log and layers:
                logger.info(line(layers))


# Of this process's scheduler.
AUDIT = Audit()


def spread(rows: int, count: int, seed: int) -> List[int]:
    """At most `count` of so many rows, equally far apart; where they begin depends on the seed."""
    stride = -(-rows // count)
    # Chunks of a prompt are alike: without it their rows would always be at the same places of a page.
    return list(range(random.Random(seed).randrange(stride), rows, stride))


def count(
    selected: torch.Tensor,
    wanted: torch.Tensor,
    heads: torch.Tensor,
    counted: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """The numbers of a `Counts`: int64 [3 + num_heads].

    Args:
        selected: int32 [T, topk], MISA's selection, -1 padded.
        wanted: int32 [T, topk], that of all heads, in the same form.
        heads: int32 [T, h], the routed heads.
        counted: bool [T], the rows that count.
    """
    # Each has a number once in a row, so that what both have are neighbours in order.
    both = torch.cat([selected, wanted], 1).sort(1).values
    common = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum(1)
    usage = heads[:, :, None] == torch.arange(num_heads, device=heads.device)
    per_row = torch.column_stack(
        [torch.ones_like(common), (wanted >= 0).sum(1), common, usage.sum(1)]
    )
    return (per_row * counted[:, None]).sum(0)


def line(layers: Dict[int, Counts]) -> str:
    """What the log says of one audited step."""
    total = Counts()
    for counts in layers.values():
        total.add(counts)
    lowest = min(layers, key=lambda layer_id: layers[layer_id].recall)
    return (
        f"MISA audit, #row: {total.rows}, recall: {total.recall:.4f}, "
        f"lowest: {layers[lowest].recall:.4f} in layer {lowest}"
    )


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
