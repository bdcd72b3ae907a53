"""Random inputs, made on the device: keys in SGLang's paged index-K cache, queries, head gates.

FP8 values are quantized as SGLang does, one scale a token (or query head) of amax / 448. Keys share a mean, and so do
the queries of a head, so that heads differ in what they contribute and the router has something to find.
"""

from dataclasses import dataclass

import torch

from sglang.srt.layers.misa import reference

from .cases import Case

PAGE_SIZE = 64
HEAD_DIM = 128
KEY_BYTES = PAGE_SIZE * HEAD_DIM  # of a page; its 64 float32 scales follow
PAGE_BYTES = KEY_BYTES + PAGE_SIZE * 4
PAGES_AT_ONCE = 2048
WRONG = -2  # a position that does not belong to the row's sequence


@dataclass
class Step:
    """What all layers of one forward step share.

    page_table    int32 [B, P]      page of each 64 tokens of a sequence; unused entries 0
    cu_rows       int32 [B + 1]     rows of each sequence
    lengths       int32 [T]         tokens visible to each row
    offsets       int32 [T]         first key of the row's sequence among the contiguous keys of the batch
    row_sequence  int64 [T]         sequence of each row
    page_owner    int64 [pages]     sequence of each page, -1 if none
    page_rank     int64 [pages]     index of each page in its sequence
    """

    case: Case
    page_table: torch.Tensor
    cu_rows: torch.Tensor
    lengths: torch.Tensor
    offsets: torch.Tensor
    row_sequence: torch.Tensor
    page_owner: torch.Tensor
    page_rank: torch.Tensor

    @property
    def num_pages(self) -> int:
        return len(self.page_owner)

    def pages(self, sequence: int) -> torch.Tensor:
        """Pages of one sequence -> int64 [P]."""
        count = -(-self.case.contexts[sequence] // PAGE_SIZE)
        return self.page_table[sequence, :count].long()


@dataclass
class Layer:
    """The indexer's inputs in one layer.

    q            float8_e4m3fn [T, H, 128]
    weights      float32 [T, H]              q's scale folded in
    index_k      uint8 [pages, 8448]         64 keys x 128 fp8, then 64 float32 scales
    pooled_keys  bfloat16 [pages, 128]       mean key of each page
    k, k_scale   float8_e4m3fn [S, 128], float32 [S]: the keys of all sequences one after another; prefill only
    """

    q: torch.Tensor
    weights: torch.Tensor
    index_k: torch.Tensor
    pooled_keys: torch.Tensor
    k: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None


def make_step(case: Case, device: str = "cuda") -> Step:
    counts = [-(-context // PAGE_SIZE) for context in case.contexts]
    shuffled = 1 + torch.randperm(sum(counts), device=device)  # page 0 is padding
    page_table = torch.zeros(case.batch, max(counts), dtype=torch.int32, device=device)
    owner = torch.full((sum(counts) + 1,), -1, device=device)
    rank = torch.zeros_like(owner)
    for b, pages in enumerate(shuffled.split(counts)):
        page_table[b, : len(pages)] = pages
        owner[pages] = b
        rank[pages] = torch.arange(len(pages), device=device)

    rows = case.rows_per_seq
    contexts = torch.tensor(case.contexts, device=device)
    last_rows = torch.arange(1 - rows, 1, device=device)
    starts = contexts.cumsum(0) - contexts
    return Step(
        case=case,
        page_table=page_table,
        cu_rows=(torch.arange(case.batch + 1, device=device) * rows).int(),
        lengths=(contexts[:, None] + last_rows).flatten().int(),
        offsets=starts.repeat_interleave(rows).int(),
        row_sequence=torch.arange(case.batch, device=device).repeat_interleave(rows),
        page_owner=owner,
        page_rank=rank,
    )


def quantize(x: torch.Tensor):
    """float32 [..., 128] -> float8_e4m3fn [..., 128] and its float32 scale [...]."""
    scale = x.abs().amax(-1) / 448
    return (x / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def make_layer(step: Step) -> Layer:
    case, device = step.case, step.page_table.device
    shape = (case.rows, case.heads, HEAD_DIM)
    head_mean = torch.randn(shape[1:], device=device)
    q, q_scale = quantize(torch.randn(shape, device=device) + head_mean)
    gates = torch.randn(shape[:2], device=device) * (case.heads * HEAD_DIM) ** -0.5
    layer = Layer(
        q=q,
        weights=gates * q_scale,
        index_k=torch.empty(
            step.num_pages, PAGE_BYTES, dtype=torch.uint8, device=device
        ),
        pooled_keys=torch.empty(
            step.num_pages, HEAD_DIM, dtype=torch.bfloat16, device=device
        ),
    )
    mean = torch.randn(HEAD_DIM, device=device)
    for first in range(0, step.num_pages, PAGES_AT_ONCE):
        fill_pages(layer, slice(first, first + PAGES_AT_ONCE), mean)
    if case.mode == "prefill":
        k, k_scale = zip(*(keys_of(step, layer, b) for b in range(case.batch)))
        k = torch.cat([part.view(torch.uint8) for part in k])
        layer.k, layer.k_scale = k.view(torch.float8_e4m3fn), torch.cat(k_scale)
    return layer


def fill_pages(layer: Layer, pages: slice, mean: torch.Tensor) -> None:
    """Random keys around `mean`, float32 [128], in some pages of a layer, and the pages' means."""
    index_k = layer.index_k[pages]
    count = len(index_k)
    shift = torch.randn(count, 1, HEAD_DIM, device=mean.device) / 2
    noise = torch.randn(count, PAGE_SIZE, HEAD_DIM, device=mean.device)
    k, k_scale = quantize((noise + shift + mean).flatten(0, 1))
    index_k[:, :KEY_BYTES] = k.view(torch.uint8).view(count, -1)
    index_k[:, KEY_BYTES:] = k_scale.view(torch.uint8).view(count, -1)
    layer.pooled_keys[pages] = reference.page_means(k, k_scale)


def keys_of(step: Step, layer: Layer, sequence: int):
    """The keys of one sequence in order: float8_e4m3fn [S, 128] and float32 [S]."""
    context = step.case.contexts[sequence]
    pages = layer.index_k[step.pages(sequence)]
    k = pages[:, :KEY_BYTES].reshape(-1, HEAD_DIM)[:context]
    k_scale = pages[:, KEY_BYTES:].contiguous().view(torch.float32).flatten()[:context]
    return k.view(torch.float8_e4m3fn), k_scale


def layer_bytes(case: Case) -> int:
    """Bytes of keys and queries that one layer reads."""
    keys = sum(-(-context // PAGE_SIZE) * PAGE_BYTES for context in case.contexts)
    return keys + case.rows * case.heads * HEAD_DIM


def layers_needed(case: Case, l2_bytes: int) -> int:
    """Layers in rotation so that four L2 caches of other data pass between two uses of one: at least 4."""
    return max(4, 4 * l2_bytes // layer_bytes(case) + 2)


def positions_from_slots(step: Step, slots: torch.Tensor) -> torch.Tensor:
    """Cache slots int32 [T, k], -1 padded -> positions int64 [T, k]; WRONG for a slot of another sequence."""
    slots = slots.long()
    page = slots.clamp(0, step.num_pages * PAGE_SIZE - 1) // PAGE_SIZE
    position = step.page_rank[page] * PAGE_SIZE + slots % PAGE_SIZE
    wrong = (step.page_owner[page] != step.row_sequence[:, None]) | (slots < -1)
    wrong |= slots >= step.num_pages * PAGE_SIZE
    return position.masked_fill(wrong, WRONG).masked_fill(slots == -1, -1)


def positions_from_ragged(step: Step, indices: torch.Tensor) -> torch.Tensor:
    """Indices into the batch's contiguous keys int32 [T, k], -1 padded -> positions int64 [T, k]."""
    position = indices.long() - step.offsets[:, None]
    return position.masked_fill(position < 0, WRONG).masked_fill(indices == -1, -1)
