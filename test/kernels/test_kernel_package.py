"""The package on a machine without a GPU: it imports, knows its results' shapes and says what is missing or wrong."""

import pytest
import sgl_kernel_misa
import torch
from hopper import needs_hopper
from torch._subclasses.fake_tensor import FakeTensorMode

TOKENS, HEADS, SEQUENCES, PAGES = 12, 64, 3, 40
OPS = (
    "update_pooled_keys",
    "route",
    "topk_prefill",
    "topk_decode",
    "route_topk_decode",
    "rerank",
)


def tensors(device):
    def empty(*shape, dtype):
        return torch.zeros(shape, dtype=torch.uint8, device=device).to(dtype)

    return dict(
        q=empty(TOKENS, HEADS, 128, dtype=torch.float8_e4m3fn),
        weights=empty(TOKENS, HEADS, dtype=torch.float32),
        index_k=empty(PAGES, 8448, dtype=torch.uint8),
        pooled_keys=empty(PAGES, 128, dtype=torch.bfloat16),
        page_table=empty(SEQUENCES, 10, dtype=torch.int32),
        cu_rows=empty(SEQUENCES + 1, dtype=torch.int32),
        lengths=empty(TOKENS, dtype=torch.int32),
        heads=empty(TOKENS, 8, dtype=torch.int32),
        candidates=empty(TOKENS, 4096, dtype=torch.int32),
        slots=empty(7, dtype=torch.int64),
        offsets=empty(TOKENS, dtype=torch.int32),
    )


PARAMETERS = {
    "update_pooled_keys": "index_k slots pooled_keys",
    "route": "q weights pooled_keys page_table cu_rows lengths active_heads block_size",
    "topk_prefill": "q weights heads index_k page_table cu_rows lengths topk",
    "topk_decode": "q weights heads index_k page_table rows_per_seq lengths topk",
    "route_topk_decode": "q weights pooled_keys index_k page_table rows_per_seq lengths active_heads "
    "block_size topk",
    "rerank": "q weights candidates index_k page_table cu_rows lengths topk",
}
NUMBERS = dict(active_heads=8, block_size=1024, topk=2048, rows_per_seq=4)
OPTIONS = ("max_context", "init_tokens", "local_tokens", "output")


def call(op, device, **changes):
    """Call an op with arguments that fit, but for the changes."""
    values = {**tensors(device), **NUMBERS, **changes}
    args = [values[name] for name in PARAMETERS[op].split()]
    options = {name: changes[name] for name in OPTIONS if name in changes}
    if changes.get("output") == "ragged":
        options["offsets"] = values["offsets"]
    return getattr(sgl_kernel_misa, op)(*args, **options)


@pytest.mark.parametrize("op", OPS)
def test_ops_are_registered(op):
    assert callable(getattr(torch.ops.sgl_kernel_misa, op))


def check_results(device):
    assert call("update_pooled_keys", device) is None
    heads = call("route", device)
    assert heads.shape == (TOKENS, 8) and heads.dtype == torch.int32
    for op in ("topk_prefill", "topk_decode", "rerank"):
        for topk in (64, 2048, 16_384):
            for output in ("positions", "slots", "ragged"):
                out = call(op, device, topk=topk, output=output)
                assert out.shape == (TOKENS, topk) and out.dtype == torch.int32
                assert out.device.type == device
    heads, out = call("route_topk_decode", device)
    assert heads.shape == (TOKENS, 8) and out.shape == (TOKENS, 2048)
    for op in ("topk_prefill", "topk_decode"):
        assert call(op, device, heads=None).shape == (TOKENS, 2048)
    assert call("topk_prefill", device, max_context=640).shape == (TOKENS, 2048)


def test_results_on_meta_tensors():
    check_results("meta")


def test_results_on_fake_tensors():
    with FakeTensorMode():
        check_results("cpu")


WRONG = [
    ("update_pooled_keys", "index_k", torch.float32),
    ("update_pooled_keys", "slots", torch.float32),
    ("update_pooled_keys", "pooled_keys", torch.float32),
    ("route", "q", torch.bfloat16),
    ("route", "weights", torch.bfloat16),
    ("route", "pooled_keys", torch.float32),
    ("route", "page_table", torch.int64),
    ("route", "cu_rows", torch.int64),
    ("route", "lengths", torch.int64),
    ("topk_prefill", "q", torch.bfloat16),
    ("topk_prefill", "weights", torch.bfloat16),
    ("topk_prefill", "heads", torch.int64),
    ("topk_prefill", "index_k", torch.int8),
    ("topk_prefill", "page_table", torch.int64),
    ("topk_prefill", "cu_rows", torch.int64),
    ("topk_prefill", "lengths", torch.int64),
    ("topk_decode", "q", torch.bfloat16),
    ("topk_decode", "heads", torch.int64),
    ("topk_decode", "page_table", torch.int64),
    ("topk_decode", "lengths", torch.int64),
    ("route_topk_decode", "pooled_keys", torch.float32),
    ("route_topk_decode", "index_k", torch.int8),
    ("rerank", "candidates", torch.int64),
    ("rerank", "lengths", torch.int64),
]


@pytest.fixture(params=["meta", pytest.param("cuda", marks=needs_hopper)])
def device(request):
    return request.param


@pytest.mark.parametrize("op, name, dtype", WRONG)
def test_wrong_types_are_named(op, name, dtype, device):
    wrong = tensors(device)[name].to(dtype)
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        call(op, device, **{name: wrong})


@pytest.mark.parametrize(
    "op, name, shape",
    [
        ("update_pooled_keys", "index_k", (PAGES, 8192)),
        ("update_pooled_keys", "pooled_keys", (PAGES, 64)),
        ("route", "q", (TOKENS, HEADS, 64)),
        ("route", "weights", (TOKENS, HEADS // 2)),
        ("route", "cu_rows", (SEQUENCES,)),
        ("route", "lengths", (TOKENS + 1,)),
        ("topk_prefill", "q", (TOKENS, 128)),
        ("topk_prefill", "weights", (TOKENS - 1, HEADS)),
        ("topk_prefill", "heads", (TOKENS - 1, 8)),
        ("topk_prefill", "index_k", (PAGES, 8192)),
        ("topk_prefill", "page_table", (SEQUENCES * 10,)),
        ("topk_prefill", "cu_rows", (SEQUENCES + 2,)),
        ("topk_prefill", "lengths", (TOKENS - 1,)),
        ("topk_decode", "heads", (TOKENS - 1, 8)),
        ("topk_decode", "lengths", (TOKENS - 1,)),
        ("rerank", "candidates", (TOKENS - 1, 4096)),
    ],
)
def test_wrong_shapes_are_named(op, name, shape, device):
    dtype = tensors(device)[name].dtype
    wrong = torch.zeros(shape, dtype=torch.uint8, device=device).to(dtype)
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        call(op, device, **{name: wrong})


@pytest.mark.parametrize(
    "op, name, value",
    [
        ("route", "active_heads", 0),
        ("route", "active_heads", HEADS + 1),
        ("route", "block_size", 0),
        ("route", "block_size", 100),
        ("topk_decode", "rows_per_seq", 0),
        ("topk_decode", "rows_per_seq", 5),
        ("route_topk_decode", "active_heads", HEADS + 1),
        ("route_topk_decode", "rows_per_seq", 5),
    ]
    + [
        (op, name, value)
        for op in ("topk_prefill", "topk_decode", "route_topk_decode", "rerank")
        for name, value in [
            ("topk", 0),
            ("topk", -64),
            ("topk", 100),
            ("topk", 16_384 + 64),
            ("output", "nonsense"),
        ]
    ],
)
def test_wrong_values_are_named(op, name, value, device):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        call(op, device, **{name: value})


@pytest.mark.parametrize("op", ["topk_prefill", "topk_decode", "rerank"])
def test_ragged_positions_need_offsets(op, device):
    with pytest.raises(ValueError, match=r"\boffsets\b"):
        call(op, device, output="ragged", offsets=None)


@pytest.mark.parametrize("heads", [16, 48, 128])
def test_head_counts_that_were_not_built_are_named(heads, device):
    q = torch.zeros(TOKENS, heads, 128, dtype=torch.uint8, device=device)
    weights = torch.zeros(TOKENS, heads, device=device)
    with pytest.raises(ValueError, match=r"\bq\b|heads"):
        call("topk_prefill", device, q=q.to(torch.float8_e4m3fn), weights=weights)


@pytest.mark.parametrize("op", OPS)
def test_there_is_no_cpu_implementation(op):
    with pytest.raises(NotImplementedError):
        call(op, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named():
    with pytest.raises(RuntimeError, match=r"(?i)cuda|gpu"):
        sgl_kernel_misa.check_device()


@needs_hopper
def test_a_hopper_gpu_will_do():
    assert sgl_kernel_misa.check_device() is None
    assert sgl_kernel_misa.check_device("cuda:0") is None
