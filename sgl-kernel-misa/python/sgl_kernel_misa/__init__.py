"""The MISA indexer on Hopper GPUs: routing, scoring and exact top-k over SGLang's paged index-K cache.

The operations run on the current stream, never wait for the device, give the same bits in every run and may be captured in
CUDA graphs. They are `torch.ops.sgl_kernel_misa.*` as well. Shapes used throughout, T rows of queries of B sequences:

    q            float8_e4m3fn [T, H, 128], H 32 or 64
    weights      float32 [T, H], the gates of the heads, q's scale folded in
    index_k      uint8 [num_pages, 8448], SGLang's index-K cache: a page holds 64 keys of 128 bytes, then 64 scales
    pooled_keys  bfloat16 [num_pages, 128], the mean dequantized key of every complete page
    page_table   int32 [B, P], the pages of every sequence; may hold more columns than a sequence has pages
    cu_rows      int32 [B + 1], rows cu_rows[b] .. cu_rows[b + 1] belong to sequence b; later rows are padding
    lengths      int32 [T], tokens that each row sees, not descending within a sequence
    heads        int32 [T, h], the heads that score a row, ascending; None for all of them
    shared_q     float8_e4m3fn [T, 128], the query of a row's shared head, which has no relu; None where there is none
    shared_scale float32 [T], its scale

What they can do, which needs no GPU and no compiled kernels to know: HEADS, the numbers of heads H; MAX_TOPK and
TOPK_MULTIPLE, the largest `topk` and what each is a multiple of; MAX_ROWS, the most rows a sequence in decode.

Source of the method: MISA, arXiv 2605.07363.
"""

from sgl_kernel_misa.constants import MAX_ROWS, MAX_TOPK
from sgl_kernel_misa.constants import NUM_HEADS as HEADS
from sgl_kernel_misa.constants import PAGE_SIZE as TOPK_MULTIPLE
from sgl_kernel_misa.decode import (
    route_sampled_topk_decode,
    route_topk_decode,
    topk_decode,
)
from sgl_kernel_misa.library import check_device
from sgl_kernel_misa.pooled_keys import update_pooled_keys
from sgl_kernel_misa.prefill import route_sampled_topk_prefill, topk_prefill
from sgl_kernel_misa.reranking import rerank
from sgl_kernel_misa.routing import route
from sgl_kernel_misa.sampled_routing import route_sampled
from sgl_kernel_misa.version import __version__

__all__ = [
    "HEADS",
    "MAX_ROWS",
    "MAX_TOPK",
    "TOPK_MULTIPLE",
    "__version__",
    "check_device",
    "rerank",
    "route",
    "route_sampled",
    "route_sampled_topk_decode",
    "route_sampled_topk_prefill",
    "route_topk_decode",
    "topk_decode",
    "topk_prefill",
    "update_pooled_keys",
]
