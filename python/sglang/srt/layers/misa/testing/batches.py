"""Batches as the kernels take them: several sequences, their keys in pages in random order in one cache."""

from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.index_k_cache import HEAD_DIM, PAGE_SIZE
from sglang.srt.layers.misa.testing.inputs import Inputs, make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE_BYTES = PAGE_SIZE * (HEAD_DIM + 4)
FREE_PAGES = 5
# What the mean of a page still being filled may be: whatever its last owner left.
STALE_MEAN = 1e4
# What a slot or an index turns into that belongs to another sequence, or to none.
WRONG = -2


class Batch(NamedTuple):
    """The tensors of the kernels, and the same sequences as the reference takes them.

    q            float8_e4m3fn [T, H, 128]
    weights      float32 [T, H]
    index_k      uint8 [pages, 8448]
    pooled_keys  bfloat16 [pages, 128]    mean key of each complete page
    page_table   int32 [B, P]
    cu_rows      int32 [B + 1]            rows before each sequence; rows behind the last one are padding
    lengths      int32 [T]
    """

    sequences: List[Inputs]
    q: torch.Tensor
    weights: torch.Tensor
    index_k: torch.Tensor
    pooled_keys: torch.Tensor
    page_table: torch.Tensor
    cu_rows: torch.Tensor
    lengths: torch.Tensor

    def rows(self):
        """(sequence, slice of its rows) of every sequence."""
        first = 0
        for sequence in self.sequences:
            yield sequence, slice(first, first + len(sequence.q))
            first += len(sequence.q)

    def row_sequence(self) -> torch.Tensor:
        """The sequence of each row that is no padding -> int64 [T]."""
        return torch.repeat_interleave(self.cu_rows.diff().long())

    def pages(self, b: int) -> torch.Tensor:
        """The pages of one sequence -> int64 [P]."""
        return self.page_table[b, : -(-len(self.sequences[b].k) // PAGE_SIZE)].long()


def make_batch(
    kind: str, specs: Sequence[Tuple[int, int]], heads: int, seed: int = 0, **layout
) -> Batch:
    """A batch of `make_inputs`: (rows, tokens) of every sequence. A row before the first token sees nothing."""
    sequences = []
    for i, (rows, tokens) in enumerate(specs):
        inputs = make_inputs(kind, rows, heads, tokens, seed=seed + i, device=DEVICE)
        sequences.append(inputs._replace(lengths=inputs.lengths.clamp(min=0)))
    return write_batch(sequences, seed=seed, **layout)


def write_batch(
    sequences: List[Inputs],
    *,
    padded_rows: int = 0,
    spare_columns: int = 3,
    seed: int = 0,
) -> Batch:
    """Lay sequences out in a paged cache on `DEVICE`.

    Whatever belongs to nobody holds what a kernel must not be misled by: rubbish in free pages and behind the last
    token, pages of others in the unused columns of the page table, stale lengths in padded rows. The page table depends on
    `seed` and the sequences' numbers of pages alone.
    """
    sequences = [sequence.to(DEVICE) for sequence in sequences]
    rng = torch.Generator(DEVICE).manual_seed(seed)
    counts = [-(-len(sequence.k) // PAGE_SIZE) for sequence in sequences]
    columns = max(counts) + spare_columns
    num_pages = 1 + sum(counts) + FREE_PAGES
    # Page 0 is the page of padding.
    free = 1 + torch.randperm(num_pages - 1, generator=rng, device=DEVICE)
    page_table = torch.randint(
        1, num_pages, (len(sequences), columns), generator=rng, device=DEVICE
    )
    index_k = torch.randint(
        120, (num_pages, PAGE_BYTES), generator=rng, device=DEVICE, dtype=torch.uint8
    )
    pooled_keys = torch.full(
        (num_pages, HEAD_DIM), STALE_MEAN, dtype=torch.bfloat16, device=DEVICE
    )
    for b, (sequence, pages) in enumerate(
        zip(sequences, free.split(counts + [FREE_PAGES])[:-1])
    ):
        page_table[b, : len(pages)] = pages
        write_pages(index_k, pages, sequence.k, sequence.k_scale)
        means = reference.page_means(sequence.k, sequence.k_scale)
        pooled_keys[pages[: len(means)]] = means
    # Joined as bytes: not every operation of torch takes FP8.
    q = torch.cat([sequence.q.view(torch.uint8) for sequence in sequences])
    q = torch.cat([q, q.new_zeros(padded_rows, *q.shape[1:])])
    weights = torch.cat([sequence.weights for sequence in sequences])
    lengths = torch.cat([sequence.lengths for sequence in sequences])
    cu_rows = torch.tensor([0] + [len(sequence.q) for sequence in sequences])
    return Batch(
        sequences,
        q.view(torch.float8_e4m3fn),
        torch.cat([weights, weights.new_ones(padded_rows, weights.shape[1])]),
        index_k,
        pooled_keys,
        page_table.int(),
        cu_rows.cumsum(0).int().to(DEVICE),
        torch.cat([lengths, lengths.new_full((padded_rows,), 77)]).int(),
    )


def write_cache(inputs: Inputs, spare_pages: int = 5, seed: int = 0):
    """One sequence in a cache of its own, on its device, with rubbish wherever no key is.

    Returns:
        index_k uint8 [num_pages, 64 * 132] and page_table int32 [P].
    """
    rng = torch.Generator().manual_seed(seed)
    pages = -(-len(inputs.k) // PAGE_SIZE)
    num_pages = pages + spare_pages
    page_table = 1 + torch.randperm(num_pages - 1, generator=rng)[:pages]
    index_k = torch.randint(
        0, 120, (num_pages, PAGE_BYTES), generator=rng, dtype=torch.uint8
    )
    device = inputs.k.device
    index_k, page_table = index_k.to(device), page_table.to(device)
    write_pages(index_k, page_table, inputs.k, inputs.k_scale)
    return index_k, page_table.int()


def write_pages(index_k, pages, k, k_scale) -> None:
    """Write the keys and scales of a sequence into its pages (int64 [P]) of a cache, from the first one's front, in place."""
    content = index_k[pages]
    keys = content[:, : PAGE_SIZE * HEAD_DIM].reshape(-1, HEAD_DIM)
    scales = content[:, PAGE_SIZE * HEAD_DIM :].reshape(-1, 4)
    keys[: len(k)] = k.view(torch.uint8)
    scales[: len(k)] = k_scale.float().view(torch.uint8).view(-1, 4)
    keys, scales = keys.view(len(pages), -1), scales.view(len(pages), -1)
    index_k[pages] = torch.cat([keys, scales], dim=1)


def positions_from_slots(batch: Batch, slots: torch.Tensor) -> torch.Tensor:
    """Cache slots int32 [T, k], -1 padded -> positions int64 [T, k]; `WRONG` where a slot is not one of the row's sequence."""
    num_pages = len(batch.index_k)
    # The sequence of each page, and the page's place in it.
    owner = torch.full((num_pages,), -1, device=slots.device)
    place = torch.zeros_like(owner)
    for b in range(len(batch.sequences)):
        pages = batch.pages(b)
        owner[pages] = b
        place[pages] = torch.arange(len(pages), device=slots.device)
    slots = slots.long()
    page = slots.clamp(0, num_pages * PAGE_SIZE - 1) // PAGE_SIZE
    position = place[page] * PAGE_SIZE + slots % PAGE_SIZE
    wrong = owner[page] != batch.row_sequence()[:, None]
    wrong |= (slots < -1) | (slots >= num_pages * PAGE_SIZE)
    return position.masked_fill(wrong, WRONG).masked_fill(slots == -1, -1)


def positions_from_ragged(indices: torch.Tensor, offsets) -> torch.Tensor:
    """Indices int32 [T, k], -1 padded, that count from each row's offset (int [T]) -> positions int64 [T, k]."""
    position = indices.long() - offsets.long()[:, None]
    return position.masked_fill(position < 0, WRONG).masked_fill(indices == -1, -1)


def random_heads(batch: Batch, active_heads: Optional[int], seed: int = 0):
    """Ascending head ids at random for every row, or None for all heads."""
    if active_heads is None:
        return None
    rng = torch.Generator(DEVICE).manual_seed(seed)
    order = torch.rand(batch.weights.shape, generator=rng, device=DEVICE).argsort(1)
    return order[:, :active_heads].sort(1).values.int()


def integer_inputs(rows: int, heads: int, tokens: int, seed: int) -> Inputs:
    return make_inputs("integers", rows, heads, tokens, seed, DEVICE)


def random_inputs(rows: int, heads: int, tokens: int, seed: int) -> Inputs:
    return make_inputs("random", rows, heads, tokens, seed, DEVICE)
