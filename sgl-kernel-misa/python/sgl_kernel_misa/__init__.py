"""The MISA indexer on Hopper GPUs: routing, scoring and exact top-k over SGLang's paged index-K cache."""

from sgl_kernel_misa.library import check_device
from sgl_kernel_misa.ops import (
    rerank,
    route,
    route_topk_decode,
    topk_decode,
    topk_prefill,
    update_pooled_keys,
)
from sgl_kernel_misa.version import __version__

__all__ = [
    "__version__",
    "check_device",
    "rerank",
    "route",
    "route_topk_decode",
    "topk_decode",
    "topk_prefill",
    "update_pooled_keys",
]
