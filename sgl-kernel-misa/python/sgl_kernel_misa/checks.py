"""What the operations ask of their arguments. Shapes and dtypes only: nothing here reads the device."""

from typing import Optional, Sequence

import torch
from sgl_kernel_misa.constants import (
    FORMS,
    HEAD_DIM,
    MAX_CONTEXT,
    MAX_TOPK,
    NUM_HEADS,
    PAGE_BYTES,
    PAGE_SIZE,
)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def tensor(
    name: str, value: torch.Tensor, dtype: torch.dtype, shape: Sequence[Optional[int]]
) -> None:
    """Raise ValueError unless `value` is contiguous, of `dtype` and of `shape` (None: any size)."""
    # Every call of an operation comes here ten times, before its kernels are launched: what is right costs little.
    have = value.shape
    if value.dtype is dtype and len(have) == len(shape) and value.is_contiguous():
        for size, want in zip(have, shape):
            if want is not None and size != want:
                break
        else:
            return
    raise _wrong(name, value, dtype, shape)


def _wrong(
    name: str, value: torch.Tensor, dtype: torch.dtype, shape: Sequence[Optional[int]]
) -> ValueError:
    """What is wrong with a tensor."""
    if value.dtype != dtype:
        return ValueError(f"{name} must be {dtype}, not {value.dtype}")
    if value.dim() != len(shape) or any(
        want not in (None, have) for have, want in zip(value.shape, shape)
    ):
        wanted = ", ".join("*" if want is None else str(want) for want in shape)
        return ValueError(f"{name} must be [{wanted}], not {list(value.shape)}")
    return ValueError(f"{name} must be contiguous")


def queries(q: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor) -> None:
    tensor("q", q, torch.float8_e4m3fn, (None, None, HEAD_DIM))
    rows, num_heads, _ = q.shape
    if num_heads not in NUM_HEADS:
        known = " or ".join(map(str, NUM_HEADS))
        raise ValueError(f"q must have {known} heads, not {num_heads}")
    tensor("weights", weights, torch.float32, (rows, num_heads))
    tensor("lengths", lengths, torch.int32, (rows,))


def heads(
    value: Optional[torch.Tensor],
    q: torch.Tensor,
    shared_q: Optional[torch.Tensor] = None,
    shared_scale: Optional[torch.Tensor] = None,
) -> None:
    require(
        (shared_q is None) == (shared_scale is None),
        "shared_q and shared_scale come together",
    )
    shared = shared_q is not None
    if shared_q is not None and shared_scale is not None:
        tensor("shared_q", shared_q, torch.float8_e4m3fn, (q.shape[0], HEAD_DIM))
        tensor("shared_scale", shared_scale, torch.float32, (q.shape[0],))
        require(value is not None, "all heads leave none to share")
    if value is not None:
        tensor("heads", value, torch.int32, (q.shape[0], None))
        least, most = (0, q.shape[1] - 1) if shared else (1, q.shape[1])
        count = value.shape[1]
        if not least <= count <= most:
            raise ValueError(
                f"heads must name {least} to {most} heads a row, not {count}"
            )


def cache(index_k: torch.Tensor) -> None:
    tensor("index_k", index_k, torch.uint8, (None, PAGE_BYTES))


def pages(page_table: torch.Tensor) -> None:
    if page_table.dtype != torch.int32:
        raise ValueError(f"page_table must be torch.int32, not {page_table.dtype}")
    require(
        page_table.dim() == 2 and page_table.stride(1) == 1,
        "page_table must be [sequences, pages] with contiguous rows",
    )


def sequences(page_table: torch.Tensor, cu_rows: torch.Tensor) -> None:
    pages(page_table)
    tensor("cu_rows", cu_rows, torch.int32, (page_table.shape[0] + 1,))


def context(value: int) -> None:
    if value > MAX_CONTEXT:
        raise ValueError(
            f"max_context must be at most {MAX_CONTEXT} tokens, not {value}"
        )


def count(name: str, value: int) -> None:
    """Of tokens that a kernel selects."""
    if not PAGE_SIZE <= value <= MAX_TOPK or value % PAGE_SIZE:
        raise ValueError(
            f"{name} must be a multiple of {PAGE_SIZE} from {PAGE_SIZE} to {MAX_TOPK}, not {value}"
        )


def selection(
    lengths: torch.Tensor, topk: int, output: str, offsets: Optional[torch.Tensor]
) -> torch.Tensor:
    """Check how a selection is to be written; returns room for it, int32 [T, topk]."""
    count("topk", topk)
    if output not in FORMS:
        known = ", ".join(FORMS)
        raise ValueError(f"output must be one of {known}, not {output}")
    rows = lengths.shape[0]
    if output == "ragged":
        require(offsets is not None, 'offsets are needed for output "ragged"')
        tensor("offsets", offsets, torch.int32, (rows,))
    return lengths.new_empty(rows, topk)
