"""What the operations ask of their arguments. Shapes and dtypes only: nothing here reads the device."""

from typing import Optional, Sequence

import torch

PAGE_SIZE = 64
PAGE_BYTES = 8448
HEAD_DIM = 128
NUM_HEADS = (32, 64)
MAX_TOPK = 16384
MAX_CONTEXT = 1 << 22  # positions are 22 bits of a sort key
OUTPUTS = ("positions", "slots", "ragged")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def tensor(
    name: str, value: torch.Tensor, dtype: torch.dtype, shape: Sequence[Optional[int]]
) -> None:
    """Raise ValueError unless `value` is contiguous, of `dtype` and of `shape` (None: any size)."""
    require(value.dtype == dtype, f"{name} must be {dtype}, not {value.dtype}")
    matches = value.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(value.shape, shape)
    )
    wanted = ", ".join("*" if want is None else str(want) for want in shape)
    require(matches, f"{name} must be [{wanted}], not {list(value.shape)}")
    require(value.is_contiguous(), f"{name} must be contiguous")


def queries(q: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor) -> None:
    tensor("q", q, torch.float8_e4m3fn, (None, None, HEAD_DIM))
    rows, num_heads, _ = q.shape
    require(num_heads in NUM_HEADS, f"q must have 32 or 64 heads, not {num_heads}")
    tensor("weights", weights, torch.float32, (rows, num_heads))
    tensor("lengths", lengths, torch.int32, (rows,))


def heads(value: Optional[torch.Tensor], q: torch.Tensor) -> None:
    if value is not None:
        tensor("heads", value, torch.int32, (q.shape[0], None))
        count = value.shape[1]
        require(
            1 <= count <= q.shape[1],
            f"heads must name 1 to {q.shape[1]} heads a row, not {count}",
        )


def cache(index_k: torch.Tensor) -> None:
    tensor("index_k", index_k, torch.uint8, (None, PAGE_BYTES))


def pages(page_table: torch.Tensor) -> None:
    require(
        page_table.dtype == torch.int32,
        f"page_table must be torch.int32, not {page_table.dtype}",
    )
    require(
        page_table.dim() == 2 and page_table.stride(1) == 1,
        "page_table must be [sequences, pages] with contiguous rows",
    )


def sequences(page_table: torch.Tensor, cu_rows: torch.Tensor) -> None:
    pages(page_table)
    tensor("cu_rows", cu_rows, torch.int32, (page_table.shape[0] + 1,))


def topk(value: int) -> None:
    require(
        PAGE_SIZE <= value <= MAX_TOPK and value % PAGE_SIZE == 0,
        f"topk must be a multiple of {PAGE_SIZE} from {PAGE_SIZE} to {MAX_TOPK}, not {value}",
    )


def context(value: int) -> None:
    require(
        value <= MAX_CONTEXT,
        f"max_context must be at most {MAX_CONTEXT} tokens, not {value}",
    )


def output(form: str, offsets: Optional[torch.Tensor], rows: int) -> None:
    require(form in OUTPUTS, f"output must be one of {', '.join(OUTPUTS)}, not {form}")
    if form == "ragged":
        require(offsets is not None, 'offsets are needed for output "ragged"')
        tensor("offsets", offsets, torch.int32, (rows,))
