"""The means of complete pages, which routing estimates with."""

import torch
from sgl_kernel_misa import checks
from sgl_kernel_misa.constants import HEAD_DIM
from sgl_kernel_misa.library import launch
from sgl_kernel_misa.registration import launching, operation
from sgl_kernel_misa.tensors import keys_and_scales

SLOTS = {torch.int32: "int32", torch.int64: "int64"}  # dtypes, as the kernels name them


@operation("pooled_keys")
def update_pooled_keys(
    index_k: torch.Tensor, slots: torch.Tensor, pooled_keys: torch.Tensor
) -> None:
    """Write the means of the pages that the tokens just stored have completed.

    Args:
        index_k: the cache, the new tokens included.
        slots: int32 or int64 [N], the slot of every new token; a page is complete when slot % 64 == 63 is among them.
        pooled_keys: written in place.

    Raises:
        ValueError: a dtype or shape is wrong.
    """
    checks.cache(index_k)
    checks.require(
        slots.dtype in SLOTS,
        f"slots must be torch.int32 or torch.int64, not {slots.dtype}",
    )
    checks.tensor("slots", slots, slots.dtype, (None,))
    checks.tensor(
        "pooled_keys", pooled_keys, torch.bfloat16, (index_k.shape[0], HEAD_DIM)
    )
    if launching(slots):
        keys, scales = keys_and_scales(index_k)
        launch(
            f"update_pooled_keys_{SLOTS[slots.dtype]}",
            keys=keys,
            scales=scales,
            slots=slots,
            pooled_keys=pooled_keys,
            pages=index_k.shape[0],
            tokens=slots.shape[0],
        )
