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

__version__ = "0.1.0"

__all__ = [
    "check_device",
    "rerank",
    "route",
    "route_topk_decode",
    "topk_decode",
    "topk_prefill",
    "update_pooled_keys",
]
