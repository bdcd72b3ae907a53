"""The kernels on a `Batch`."""

import sgl_kernel_misa
import torch

from sglang.srt.layers.misa.testing.batches import Batch


def route(batch: Batch, active_heads: int, block_size: int) -> torch.Tensor:
    return sgl_kernel_misa.route(
        batch.q,
        batch.weights,
        batch.pooled_keys,
        batch.page_table,
        batch.cu_rows,
        batch.lengths,
        active_heads,
        block_size,
    )


def _sampled(batch: Batch) -> tuple:
    """What the sampled router takes of a batch with `cu_rows`."""
    query = batch.q, batch.weights
    return *query, batch.index_k, batch.page_table, batch.cu_rows, batch.lengths


def route_sampled(batch: Batch, active_heads: int):
    """heads, shared_q, shared_scale"""
    return sgl_kernel_misa.route_sampled(
        *_sampled(batch),
        active_heads,
    )


def route_sampled_topk_decode(batch: Batch, active_heads: int, topk: int, **options):
    """For a batch whose sequences have equally many rows -> heads, shared_q, shared_scale, selection."""
    return sgl_kernel_misa.route_sampled_topk_decode(
        batch.q,
        batch.weights,
        batch.index_k,
        batch.page_table,
        len(batch.q) // len(batch.page_table),
        batch.lengths,
        active_heads,
        topk,
        **options,
    )


def route_sampled_topk_prefill(batch: Batch, active_heads: int, topk: int, **options):
    """heads, shared_q, shared_scale, selection"""
    return sgl_kernel_misa.route_sampled_topk_prefill(
        *_sampled(batch),
        active_heads,
        topk,
        **options,
    )


def topk_prefill(batch: Batch, heads, topk: int, **options) -> torch.Tensor:
    return sgl_kernel_misa.topk_prefill(
        batch.q,
        batch.weights,
        heads,
        batch.index_k,
        batch.page_table,
        batch.cu_rows,
        batch.lengths,
        topk,
        **options,
    )


def topk_decode(batch: Batch, heads, topk: int, **options) -> torch.Tensor:
    """For a batch whose sequences have equally many rows."""
    return sgl_kernel_misa.topk_decode(
        batch.q,
        batch.weights,
        heads,
        batch.index_k,
        batch.page_table,
        len(batch.q) // len(batch.page_table),
        batch.lengths,
        topk,
        **options,
    )


def route_topk_decode(
    batch: Batch, active_heads: int, block_size: int, topk: int, **options
):
    """For a batch whose sequences have equally many rows -> heads, selection."""
    return sgl_kernel_misa.route_topk_decode(
        batch.q,
        batch.weights,
        batch.pooled_keys,
        batch.index_k,
        batch.page_table,
        len(batch.q) // len(batch.page_table),
        batch.lengths,
        active_heads,
        block_size,
        topk,
        **options,
    )


def rerank(batch: Batch, candidates, topk: int, **options) -> torch.Tensor:
    return sgl_kernel_misa.rerank(
        batch.q,
        batch.weights,
        candidates,
        batch.index_k,
        batch.page_table,
        batch.cu_rows,
        batch.lengths,
        topk,
        **options,
    )


def captured(function):
    """Capture a function's launches in a CUDA graph -> its result, and the function that computes it again."""
    function()  # whatever is set up once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return out, graph.replay
