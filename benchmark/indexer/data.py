"""The inputs of a case: several layers of one forward step, each a batch of sequences with keys of its own.

What the keys, queries and gates look like is `keys`, one of `KEYS`.
"""

from dataclasses import dataclass

import torch

from sglang.srt.layers.misa.index_k_cache import HEAD_DIM, PAGE_SIZE
from sglang.srt.layers.misa.testing.batches import (
    DEVICE,
    PAGE_BYTES,
    Batch,
    positions_from_ragged,
    positions_from_slots,
    write_batch,
)
from sglang.srt.layers.misa.testing.inputs import DATA_KINDS, make_inputs

from .cases import Case
from .text import Text

# Gaussian is the usual one: the others are compared with it.
USUAL = "gaussian"
KEYS = (USUAL, "text", *(kind for kind in DATA_KINDS if kind != USUAL))


@dataclass
class Step:
    """What all layers of one forward step share.

    page_table    int32 [B, P]      page of each 64 tokens of a sequence
    cu_rows       int32 [B + 1]     rows of each sequence
    lengths       int32 [T]         tokens visible to each row
    offsets       int32 [T]         first key of the row's sequence among the contiguous keys of the batch
    """

    case: Case
    page_table: torch.Tensor
    cu_rows: torch.Tensor
    lengths: torch.Tensor
    offsets: torch.Tensor

    def positions(self, batch: Batch, output: torch.Tensor) -> torch.Tensor:
        """What a variant wrote, int32 [T, k], as positions int64 [T, k]: ragged indices in prefill, else slots."""
        if self.case.mode == "prefill":
            return positions_from_ragged(output, self.offsets)
        return positions_from_slots(batch, output)


def make_layers(
    case: Case, keys: str, count: int, seed: int, text: Text | None
) -> list[Batch]:
    """`count` layers on one page table; `text` is needed for keys "text"."""
    layers = []
    for i in range(count):
        sequences = []
        for b, context in enumerate(case.contexts):
            sizes = (case.rows_per_seq, case.heads, context)
            if keys == "text":
                inputs = text.inputs(*sizes, layer=i, sequence=b, device=DEVICE)
            else:
                own = 1_000_003 * seed + 1009 * i + b
                inputs = make_inputs(keys, *sizes, seed=own, device=DEVICE)
            sequences.append(inputs)
        layers.append(write_batch(sequences, spare_columns=0, seed=seed))
    return layers


def make_step(case: Case, layers: list[Batch]) -> Step:
    contexts = torch.tensor(case.contexts, device=DEVICE)
    starts = contexts.cumsum(0) - contexts
    return Step(
        case=case,
        page_table=layers[0].page_table,
        cu_rows=layers[0].cu_rows,
        lengths=layers[0].lengths,
        offsets=starts.repeat_interleave(case.rows_per_seq).int(),
    )


def contiguous_keys(batch: Batch):
    """The keys of all sequences one after another: float8_e4m3fn [S, 128], float32 [S]."""
    k = torch.cat([sequence.k.view(torch.uint8) for sequence in batch.sequences])
    k_scale = torch.cat([sequence.k_scale for sequence in batch.sequences])
    return k.view(torch.float8_e4m3fn), k_scale


def layer_bytes(case: Case) -> int:
    """Bytes of keys and queries that one layer reads."""
    keys = sum(-(-context // PAGE_SIZE) * PAGE_BYTES for context in case.contexts)
    return keys + case.rows * case.heads * HEAD_DIM


def layers_needed(case: Case, l2_bytes: int) -> int:
    """Layers in rotation so that four L2 caches of other data pass between two uses of one: at least 4."""
    return max(4, 4 * l2_bytes // layer_bytes(case) + 2)
