"""The sampled router: which heads score a row, and the shared head that stands for the lines of all others."""

import functools
from typing import Tuple, Union

import torch
from sgl_kernel_misa import checks
from sgl_kernel_misa.constants import HEAD_DIM, ROUTER_CTAS_PER_SM
from sgl_kernel_misa.device import num_sms
from sgl_kernel_misa.library import SHAPES, Chain, Step
from sgl_kernel_misa.registration import launching, operation
from sgl_kernel_misa.tensors import KEYS_AND_SCALES

TENSORS = (
    *("q", "weights", "index_k", "page_table", "cu_rows", "lengths"),
    *("heads", "shared_q", "shared_scale", "dealt"),
)


@operation()
def route_sampled(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    cu_rows: torch.Tensor,
    lengths: torch.Tensor,
    active_heads: int,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The heads that a line says least of, for all slots but one, and the shared head for that one.

    A row's results are functions of its query and its prefix: the same bits in any batch, here and in `route_sampled_topk_decode`.
    Rows that see nothing, and padding, get heads 0 .. active_heads - 2 and a shared head of 0.

    Args:
        active_heads: slots, the shared head's among them: 1 to H - 1.

    Returns:
        heads, int32 [T, active_heads - 1], ascending; shared_q, float8_e4m3fn [T, 128]; shared_scale, float32 [T], powers of two.

    Raises:
        ValueError: a dtype, a shape or a number is wrong.
    """
    checks.cache(index_k)
    checks.sequences(page_table, cu_rows)
    routed = checked_slots(q, weights, lengths, active_heads)
    if launching(q):
        # No kernel of a prefill deals out pages.
        dealt = lengths.new_empty(1)
        launch_route_sampled(
            q, weights, index_k, page_table, cu_rows, lengths, *routed, dealt
        )
    return routed


def checked_slots(
    q: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor, active_heads: int
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check what the router takes; returns room for its results."""
    checks.queries(q, weights, lengths)
    rows, num_heads, _ = q.shape
    checks.require(
        1 <= active_heads < num_heads,
        f"active_heads must be 1 to {num_heads - 1}, not {active_heads}",
    )
    return (
        lengths.new_empty(rows, active_heads - 1),
        q.new_empty(rows, HEAD_DIM),
        weights.new_empty(rows),
    )


def launch_route_sampled(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_k: torch.Tensor,
    page_table: torch.Tensor,
    rows_of: Union[torch.Tensor, int],
    lengths: torch.Tensor,
    heads: torch.Tensor,
    shared_q: torch.Tensor,
    shared_scale: torch.Tensor,
    dealt: torch.Tensor,
) -> None:
    """Write the results; clears `dealt`, int32 [1], for `decode_score`, which may begin while it works.

    Args:
        rows_of: `cu_rows`, or the rows of every sequence.
    """
    batch, max_pages = page_table.shape
    if isinstance(rows_of, int):
        rows_per_seq, cu_rows = rows_of, lengths  # lengths: not read
    else:
        rows_per_seq, cu_rows = 0, rows_of
    _chain(
        q.shape[1],
        num_sms(q.device),
        rows_per_seq=rows_per_seq,
        rows=q.shape[0],
        pages=index_k.shape[0],
        batch=batch,
        max_pages=max_pages,
        table_stride=page_table.stride(0),
        routed=heads.shape[1],
        bounds=cu_rows.shape[0],
    )(
        q,
        weights,
        index_k,
        page_table,
        cu_rows,
        lengths,
        heads,
        shared_q,
        shared_scale,
        dealt,
    )


@functools.lru_cache(maxsize=SHAPES)
def _chain(num_heads: int, sms: int, **numbers: int) -> Chain:
    return Chain(TENSORS, step(num_heads, sms, **numbers), inside=KEYS_AND_SCALES)


def step(
    num_heads: int, sms: int, *, rows_per_seq: int, rows: int, batch: int, **numbers
) -> Step:
    """The router's launch, with the tensors of TENSORS and KEYS_AND_SCALES."""
    # Rows that share what is copied of the keys: so few that all SMs have some. A row's bits do not depend on it.
    tile_rows = -(-rows // (ROUTER_CTAS_PER_SM * sms))
    if rows_per_seq:
        tiles = batch * -(-rows_per_seq // tile_rows)
    else:
        tiles = rows // tile_rows + batch + 1
    own = dict(rows_per_seq=rows_per_seq, tile_rows=tile_rows, tiles=tiles)
    numbers = dict(own, rows=rows, batch=batch, **numbers)
    return Step(f"route_sampled_{num_heads}", numbers)
