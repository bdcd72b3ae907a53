"""The kernels on a Hopper GPU, whose free memory holds nothing that would be mistaken for a result."""

import kernel_ops
import pytest
import torch

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs an NVIDIA Hopper GPU",
)


def poison() -> None:
    """Fill the memory that the next allocations get with NaN, as an integer INT_MAX: what is not written shows."""
    torch.cuda.empty_cache()
    sizes = [1 << 19] * 8 + [1 << 24] * 2 + [1 << 29]
    blocks = [
        torch.full((size // 4,), 2**31 - 1, dtype=torch.int32, device="cuda")
        for size in sizes
    ]
    del blocks


def poisoned(op):
    """The op on a GPU whose free memory is poisoned."""

    def run(*args, **options):
        poison()
        return op(*args, **options)

    return run


route = poisoned(kernel_ops.route)
prefill = poisoned(kernel_ops.topk_prefill)
decode = poisoned(kernel_ops.topk_decode)
routed_decode = poisoned(kernel_ops.route_topk_decode)
route_sampled = poisoned(kernel_ops.route_sampled)
sampled_decode = poisoned(kernel_ops.route_sampled_topk_decode)
sampled_prefill = poisoned(kernel_ops.route_sampled_topk_prefill)
rerank = poisoned(kernel_ops.rerank)
