"""The ops in torch.compile, and their fake implementations against the real ones."""

import pytest
import torch
from hopper import needs_hopper
from kernel_ops import rerank, route, topk_decode, topk_prefill

from sglang.srt.layers.misa.testing.batches import make_batch, random_heads

pytestmark = needs_hopper

OPS = torch.ops.sgl_kernel_misa


@pytest.fixture(scope="module")
def batch():
    return make_batch("random", [(2, 3000), (2, 500)], 64)


def opcheck(op, *args):
    torch.library.opcheck(op.default, args, test_utils="test_faketensor")


def test_fake_implementations_agree(batch):
    q, weights, index_k, pooled_keys, page_table, cu_rows, lengths = batch[1:]
    heads = random_heads(batch, 8)
    slots = torch.arange(200, device=q.device)
    opcheck(OPS.update_pooled_keys, index_k, slots, pooled_keys.clone())
    where = page_table, cu_rows, lengths
    opcheck(OPS.route, q, weights, pooled_keys, *where, 8, 1024)
    for scoring in (heads, None):
        opcheck(OPS.topk_prefill, q, weights, scoring, index_k, *where, 64)
        where_decode = page_table, 2, lengths
        opcheck(OPS.topk_decode, q, weights, scoring, index_k, *where_decode, 64)
    cache = pooled_keys, index_k, page_table
    opcheck(OPS.route_topk_decode, q, weights, *cache, 2, lengths, 8, 1024, 64)
    candidates = topk_prefill(batch, heads, 256)
    opcheck(OPS.rerank, q, weights, candidates, index_k, *where, 64)


@pytest.mark.parametrize("op", [topk_prefill, topk_decode])
def test_compiles_without_a_graph_break(batch, op):
    tensors = batch[1:]

    def select(*tensors):
        given = type(batch)(None, *tensors)
        heads = route(given, 8, 1024)
        return rerank(given, op(given, heads, 1024), 64)

    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), select(*tensors))
