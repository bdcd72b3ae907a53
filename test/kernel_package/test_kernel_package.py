"""The package on a machine without a GPU: it imports, knows its results' shapes and says what is missing or wrong."""

import contextlib
import ctypes
import gc
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import sgl_kernel_misa
import torch
from hopper import needs_hopper
from sgl_kernel_misa import device as devices
from sgl_kernel_misa import library
from sgl_kernel_misa.constants import RERANK_CAPACITIES
from torch._subclasses.fake_tensor import FakeTensorMode

from builder import INCLUDE
from builder import launches as launches_of_kernels

TOKENS, HEADS, SEQUENCES, PAGES = 12, 64, 3, 40
OPS = (
    "update_pooled_keys",
    "route",
    "route_sampled",
    "topk_prefill",
    "topk_decode",
    "route_topk_decode",
    "route_sampled_topk_decode",
    "route_sampled_topk_prefill",
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
        shared_q=empty(TOKENS, 128, dtype=torch.float8_e4m3fn),
        shared_scale=empty(TOKENS, dtype=torch.float32),
        candidates=empty(TOKENS, 4096, dtype=torch.int32),
        slots=empty(7, dtype=torch.int64),
        offsets=empty(TOKENS, dtype=torch.int32),
    )


PARAMETERS = {
    "update_pooled_keys": "index_k slots pooled_keys",
    "route": "q weights pooled_keys page_table cu_rows lengths active_heads block_size",
    "route_sampled": "q weights index_k page_table cu_rows lengths active_heads",
    "topk_prefill": "q weights heads index_k page_table cu_rows lengths topk",
    "topk_decode": "q weights heads index_k page_table rows_per_seq lengths topk",
    "route_topk_decode": "q weights pooled_keys index_k page_table rows_per_seq lengths active_heads "
    "block_size topk",
    "route_sampled_topk_decode": "q weights index_k page_table rows_per_seq lengths active_heads topk",
    "route_sampled_topk_prefill": "q weights index_k page_table cu_rows lengths active_heads topk",
    "rerank": "q weights candidates index_k page_table cu_rows lengths topk",
}
NUMBERS = dict(active_heads=8, block_size=1024, topk=2048, rows_per_seq=4)
OPTIONS = (
    "rerank_candidates",
    "max_context",
    "shared_q",
    "shared_scale",
    "init_tokens",
    "local_tokens",
    "output",
)


def call(op, device, function=None, **changes):
    """Call an op, or its function, with arguments that fit, but for the changes."""
    values = {**tensors(device), **NUMBERS, **changes}
    args = [values[name] for name in PARAMETERS[op].split()]
    options = {name: changes[name] for name in OPTIONS if name in changes}
    if changes.get("output") == "ragged":
        options["offsets"] = values["offsets"]
    return (function or getattr(sgl_kernel_misa, op))(*args, **options)


SHARED_HEAD = "Tensor? shared_q=None, Tensor? shared_scale=None"
OPTIONS_OF_A_SELECTION = (
    "int init_tokens=0, int local_tokens=0, "
    'str output="positions", Tensor? offsets=None'
)
SCHEMAS = {
    "update_pooled_keys": "(Tensor index_k, Tensor slots, Tensor(a2!) pooled_keys) -> ()",
    "route": "(Tensor q, Tensor weights, Tensor pooled_keys, Tensor page_table, Tensor cu_rows, Tensor lengths, "
    "int active_heads, int block_size) -> Tensor",
    "topk_prefill": "(Tensor q, Tensor weights, Tensor? heads, Tensor index_k, Tensor page_table, Tensor cu_rows, "
    f"Tensor lengths, int topk, *, int? max_context=None, {SHARED_HEAD}, {OPTIONS_OF_A_SELECTION}) -> Tensor",
    "topk_decode": "(Tensor q, Tensor weights, Tensor? heads, Tensor index_k, Tensor page_table, int rows_per_seq, "
    f"Tensor lengths, int topk, *, {SHARED_HEAD}, {OPTIONS_OF_A_SELECTION}) -> Tensor",
    "route_sampled": "(Tensor q, Tensor weights, Tensor index_k, Tensor page_table, Tensor cu_rows, Tensor lengths, "
    "int active_heads) -> (Tensor, Tensor, Tensor)",
    "route_sampled_topk_decode": "(Tensor q, Tensor weights, Tensor index_k, Tensor page_table, int rows_per_seq, "
    f"Tensor lengths, int active_heads, int topk, *, {OPTIONS_OF_A_SELECTION}) -> (Tensor, Tensor, Tensor, Tensor)",
    "route_sampled_topk_prefill": "(Tensor q, Tensor weights, Tensor index_k, Tensor page_table, Tensor cu_rows, "
    "Tensor lengths, int active_heads, int topk, *, int rerank_candidates=0, int? max_context=None, "
    f"{OPTIONS_OF_A_SELECTION}) -> (Tensor, Tensor, Tensor, Tensor)",
    "route_topk_decode": "(Tensor q, Tensor weights, Tensor pooled_keys, Tensor index_k, Tensor page_table, "
    "int rows_per_seq, Tensor lengths, int active_heads, int block_size, int topk, *, "
    f"{OPTIONS_OF_A_SELECTION}) -> (Tensor, Tensor)",
    "rerank": "(Tensor q, Tensor weights, Tensor candidates, Tensor index_k, Tensor page_table, Tensor cu_rows, "
    f"Tensor lengths, int topk, *, {OPTIONS_OF_A_SELECTION}) -> Tensor",
}


@pytest.mark.parametrize("op", OPS)
def test_schemas(op):
    """What others have traced or exported names these."""
    schema = getattr(torch.ops.sgl_kernel_misa, op).default._schema
    assert str(schema) == f"sgl_kernel_misa::{op}{SCHEMAS[op]}"


@pytest.mark.parametrize("op", OPS)
def test_functions_are_described(op):
    function = getattr(sgl_kernel_misa, op)
    assert function.__doc__ and op in sgl_kernel_misa.__all__


def test_limits_are_known_without_compiled_kernels(tmp_path):
    package = Path(sgl_kernel_misa.__file__).parent
    shutil.copytree(
        package, tmp_path / package.name, ignore=shutil.ignore_patterns("lib")
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sgl_kernel_misa as m; print(m.__file__, m.HEADS, m.MAX_TOPK, m.TOPK_MULTIPLE, m.MAX_ROWS)",
        ],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    expected = tmp_path / package.name / "__init__.py"
    assert done.stdout.strip() == f"{expected} (32, 64) 16384 64 8"


def test_there_is_one_version():
    repository = Path(__file__).resolve().parents[2]
    required = re.findall(
        r"sgl-kernel-misa==([\d.]+)", (repository / "pyproject.toml").read_text()
    )
    assert set(required) <= {sgl_kernel_misa.__version__}


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
    heads, shared_q, shared_scale = call("route_sampled", device)
    assert heads.shape == (TOKENS, 7) and heads.dtype == torch.int32
    assert shared_q.shape == (TOKENS, 128) and shared_q.dtype == torch.float8_e4m3fn
    assert shared_scale.shape == (TOKENS,) and shared_scale.dtype == torch.float32
    for op in ("route_sampled_topk_decode", "route_sampled_topk_prefill"):
        *routed, out = call(op, device)
        assert [x.shape for x in routed] == [(TOKENS, 7), (TOKENS, 128), (TOKENS,)]
        assert out.shape == (TOKENS, 2048)
    shared = dict(shared_q=shared_q, shared_scale=shared_scale)
    for op in ("topk_prefill", "topk_decode"):
        assert call(op, device, **shared).shape == (TOKENS, 2048)
        assert call(op, device, heads=heads[:, :0], **shared).shape == (TOKENS, 2048)
        for wrong in (dict(shared_q=shared_q), dict(heads=None, **shared)):
            with pytest.raises(ValueError, match="share"):
                call(op, device, **wrong)
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
    ("route_sampled", "index_k", torch.int8),
    ("route_sampled", "cu_rows", torch.int64),
    ("topk_prefill", "shared_q", torch.bfloat16),
    ("topk_decode", "shared_scale", torch.bfloat16),
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
    wrong = {name: tensors(device)[name].to(dtype)}
    if name.startswith("shared_"):
        both = "shared_q", "shared_scale"
        wrong = {one: tensors(device)[one] for one in both} | wrong
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        call(op, device, **wrong)


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
        ("topk_decode", "rows_per_seq", 9),
        ("route_topk_decode", "active_heads", HEADS + 1),
        ("route_topk_decode", "rows_per_seq", 9),
        ("route_sampled_topk_decode", "rows_per_seq", 9),
    ]
    + [
        (op, name, value)
        for op in (
            "topk_prefill",
            "topk_decode",
            "route_topk_decode",
            "route_sampled_topk_prefill",
            "rerank",
        )
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


H100, H20 = 132, 78  # their SMs


@pytest.fixture
def launches(monkeypatch):
    """Launches that are checked against the library's manifest instead of carried out: op, changes -> launches."""
    kernels = library._manifest()["sm90a"]["kernels"]
    found, chains = [], []

    def launch_chain(chain, *tensors):
        chains.append(chain)
        given = dict(zip(chain.tensors, tensors, strict=True))
        places = {**{name: name for name in given}}
        places |= {name: tensor for name, (tensor, _) in chain.inside.items()}
        for step in chain.steps:
            expected = dict(kernels[step.kernel])
            numbers = {name for name, kind in expected.items() if kind != "pointer"}
            assert step.numbers.keys() == numbers, step.kernel
            for name in numbers:
                struct.pack(library._TYPES[expected[name]], step.numbers[name])
            arguments = {
                name: given[places[step.renamed.get(name, name)]]
                for name in expected.keys() - numbers
            }
            assert all(isinstance(x, torch.Tensor) for x in arguments.values())
            found.append((step.kernel, {**arguments, **step.numbers}))

    monkeypatch.setattr(library.Chain, "__call__", launch_chain)

    def launches_of(op, sms=H100, **changes):
        monkeypatch.setattr(devices, "_num_sms", lambda index: sms)
        found.clear()
        chains.clear()
        call(op, "cpu", getattr(sgl_kernel_misa, op).__wrapped__, **changes)
        return list(found)

    launches_of.found, launches_of.chains = found, chains
    return launches_of


@pytest.mark.parametrize("sms", [H100, H20])
def test_launches_fit_the_kernels(launches, sms):
    def names(op, **changes):
        return [name for name, _ in launches(op, sms, **changes)]

    assert names("update_pooled_keys") == ["update_pooled_keys_int64"]
    slots = torch.zeros(7, dtype=torch.int32)
    assert names("update_pooled_keys", slots=slots) == ["update_pooled_keys_int32"]
    assert names("route") == ["pool_blocks", "route_64"]
    for heads, scoring, decoding in (
        (1, 2, 8),
        (3, 4, 8),
        (5, 8, 8),
        (9, 16, 16),
        (32, 32, 32),
        (33, 64, 64),
    ):
        given = torch.zeros(TOKENS, heads, dtype=torch.int32)
        # A device with 78 SMs does not hold 12 clusters of 8, but so many candidates need them.
        few = 8 if sms == H100 else 4
        for topk, capacity, ranks in ((64, 3072, few), (16_384, 6144, 8)):
            assert names("topk_prefill", heads=given, topk=topk) == [
                "sample",
                f"score_samples_{scoring}",
                "threshold_128",
                f"score_planes_{scoring}",
                f"select_{scoring}_{capacity}",
            ]
            assert names("topk_decode", heads=given, topk=topk) == [
                f"decode_score_{decoding}_4",
                f"decode_select_{ranks}",
            ]
    assert "score_planes_64" in names("topk_prefill", heads=None)
    for active, scoring in ((1, 2), (2, 2), (3, 4), (8, 8), (9, 16), (63, 64)):
        assert names("route_sampled_topk_prefill", active_heads=active) == [
            "route_sampled_64",
            "sample",
            f"score_samples_{scoring}",
            "threshold_128",
            f"score_planes_{scoring}",
            f"select_{scoring}_3072",
        ]
    assert names("route_topk_decode") == [
        "decode_route_64_4_8",
        "decode_score_8_4",
        f"decode_select_{few}",
    ]
    some, more, most = RERANK_CAPACITIES
    for count, capacity in (
        (1, some),
        (some, some),
        (some + 1, more),
        (more + 1, most),
    ):
        candidates = torch.zeros(TOKENS, count, dtype=torch.int32)
        assert names("rerank", candidates=candidates) == [f"rerank_64_{capacity}_8"]


@pytest.mark.parametrize("candidates", [2048, 4096, 16_384])
@pytest.mark.parametrize("rows", [1, 33, 300, 9000])
@pytest.mark.parametrize("pages", [10, 300, 2048])
def test_one_operation_launches_what_three_do(launches, candidates, rows, pages):
    """Kernel by kernel with the same numbers, and with a workspace whose parts lie apart."""
    given = dict(
        q=torch.zeros(rows, HEADS, 128, dtype=torch.uint8).to(torch.float8_e4m3fn),
        weights=torch.zeros(rows, HEADS),
        lengths=torch.zeros(rows, dtype=torch.int32),
        offsets=torch.zeros(rows, dtype=torch.int32),
        page_table=torch.zeros(3, pages, dtype=torch.int32),
        cu_rows=torch.zeros(4, dtype=torch.int32),
    )
    forced = dict(init_tokens=3, local_tokens=70)
    written = dict(output="ragged", **forced)
    found = launches(
        "route_sampled_topk_prefill", rerank_candidates=candidates, **given, **written
    )
    (fused,) = launches.chains
    routed = dict(
        heads=torch.zeros(rows, 7, dtype=torch.int32),
        shared_q=given["q"][:, 0].contiguous(),
        shared_scale=torch.zeros(rows),
    )
    kept = torch.zeros(rows, candidates, dtype=torch.int32)
    first = launches("route_sampled", **given)
    first += launches("topk_prefill", **given, **routed, **forced, topk=candidates)
    expected = first + launches("rerank", **given, candidates=kept, **written)

    def numbers(of_launches):
        return [
            (name, {k: v for k, v in x.items() if not isinstance(v, torch.Tensor)})
            for name, x in of_launches
        ]

    assert numbers(found) == numbers(expected)
    name, last = found[-1]
    assert name.startswith("rerank") and last["out"].shape == (rows, 2048)
    # What `select` leaves there for `rerank` is nobody else's.
    workspace = last["candidates"]
    assert all(x["out"] is workspace for k, x in found if k.startswith("select"))
    inside = fused.inside
    selects = [step for step in fused.steps if step.kernel.startswith("select")]
    assert {step.renamed.get("out") for step in selects} == {"candidates"}
    owner, start = inside["candidates"]
    assert owner == "workspace" and start % 256 == 0
    others = {
        at
        for name, (tensor, at) in inside.items()
        if name != "candidates" and tensor == owner
    }
    assert all(at < start or at >= start + kept.nbytes for at in others)
    assert start + kept.nbytes <= workspace.nbytes


@pytest.mark.parametrize("op", [op for op in OPS if op != "update_pooled_keys"])
def test_nothing_is_launched_for_no_rows(launches, op):
    values = tensors("cpu")
    rows = ("q", "weights", "lengths", "heads", "candidates", "offsets")
    none = {name: values[name][:0] for name in rows}
    if "rows_per_seq" in PARAMETERS[op]:
        none["page_table"] = values["page_table"][:0]
    assert launches(op, **none) == []


def test_what_is_refused_is_not_begun(launches):
    """All checks of an operation come before its first launch: the router would read rows that are not there."""
    for op, changes in (
        ("route_topk_decode", dict(rows_per_seq=9)),
        ("route_topk_decode", dict(topk=0)),
        ("route_topk_decode", dict(output="nonsense")),
        ("route_sampled_topk_prefill", dict(max_context=641)),
        ("route_sampled_topk_prefill", dict(topk=65)),
        ("route_sampled_topk_prefill", dict(rerank_candidates=65)),
    ):
        with pytest.raises(ValueError):
            launches(op, **changes)
        assert launches.found == []


def sequences_of_rows(batch: int, rows: int) -> dict:
    """Arguments for so many sequences of so many rows each."""
    values = tensors("cpu")
    given = {
        name: torch.zeros(batch * rows, *values[name].shape[1:], dtype=torch.uint8).to(
            values[name].dtype
        )
        for name in ("q", "weights", "heads", "lengths")
    }
    page_table = torch.zeros(batch, 10, dtype=torch.int32)
    return dict(given, page_table=page_table, rows_per_seq=rows)


@pytest.mark.parametrize("rows, compiled", [(1, 4), (4, 4), (5, 8), (8, 8)])
@pytest.mark.parametrize("batch, ranks", [(1, 8), (300, 1)])
def test_rows_of_a_sequence_in_decode(launches, rows, compiled, batch, ranks):
    """Kernels for as many rows; where eight rows may come, at least two CTAs pick their heads."""
    given = sequences_of_rows(batch, rows)
    for op, router in (
        ("topk_decode", []),
        (
            "route_topk_decode",
            [f"decode_route_64_{compiled}_{max(ranks, compiled // 4)}"],
        ),
        ("route_sampled_topk_decode", ["route_sampled_64"]),
    ):
        names = [name for name, _ in launches(op, **given)]
        assert names[:-1] == [*router, f"decode_score_8_{compiled}"]
        assert names[-1].startswith("decode_select_")


@pytest.mark.parametrize("sms", [H100, H20])
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("batch", [1, 32, 100])
def test_the_router_of_decode_uses_the_device(launches, rows, batch, sms):
    """Tiles of rows of one sequence that hold every row once, and as many at once as the device holds."""
    given = sequences_of_rows(batch, rows)
    (_, router), *_ = launches("route_sampled_topk_decode", sms, **given)
    parts, rest = divmod(router["tiles"], batch)
    assert rest == 0
    assert (parts - 1) * router["tile_rows"] < rows <= parts * router["tile_rows"]
    assert parts == rows or router["tiles"] * 2 > min(batch * rows, 2 * sms)


def test_grids_follow_the_device(launches):
    for sms in (H100, H20):
        (_, score), _ = launches("topk_decode", sms)
        assert score["blocks"] == 2 * sms
        (_, score), _ = launches("topk_decode", sms, heads=None)
        assert score["blocks"] == sms


ARGUMENTS = {
    "scale": [
        *(("q", "pointer"), ("out", "pointer")),
        *(("rows", "int32"), ("factor", "float32"), ("bytes", "int64")),
        *(("mask", "uint32"), ("limit", "float64")),
    ],
    "add": [("x", "pointer"), ("out", "pointer"), ("rows", "int32")],
}
SCALED = dict(rows=-3, factor=0.5, bytes=1 << 40, mask=(1 << 32) - 1, limit=1e-300)
VALUES = tuple(map(float, SCALED.values()))
# Kernels that write down how they were called; `add` fails where there are no rows.
KERNELS = """
#include <vector>
std::vector<double> calls;
extern "C" int scale_call(void* q, void* out, int rows, float factor, int64_t bytes, uint32_t mask, double limit, void* stream) {
  for (double x : {1., double(uintptr_t(q)), double(uintptr_t(out)), double(rows), double(factor), double(bytes), double(mask),
                   limit, double(uintptr_t(stream))})
    calls.push_back(x);
  return 0;
}
extern "C" int add_call(void* x, void* out, int rows, void* stream) {
  for (double x : {2., double(uintptr_t(x)), double(uintptr_t(out)), double(rows), double(uintptr_t(stream))}) calls.push_back(x);
  return rows == 0;
}
extern "C" int scale_init() { calls.push_back(0); return 0; }
extern "C" int add_init() { return 0; }
extern "C" const char* scale_get_last_error() { return "scale has failed"; }
extern "C" const char* add_get_last_error() { return "add has failed"; }
extern "C" int taken(double* values) {
  int count = calls.size();
  for (int i = 0; i < count; ++i) values[i] = calls[i];
  calls.clear();
  return count;
}
"""


@pytest.fixture(scope="module")
def host_code(tmp_path_factory):
    """The kernels above in a library with the host code that the builder writes for them."""
    folder = tmp_path_factory.mktemp("launches")
    source, path = folder / "launches.cpp", folder / "launches.so"
    source.write_text(launches_of_kernels.source(ARGUMENTS) + KERNELS)
    flags = ["-std=c++20", "-shared", "-fPIC", "-I", INCLUDE, "-o", path]
    subprocess.run(["g++", *flags, source], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture
def taken(host_code, monkeypatch):
    """The kernels above on device 0, and what they were called with since the last time. A tensor's first value is its device."""
    device, room = 0, (ctypes.c_double * 1000)()
    loaded = library._loaded(host_code, ARGUMENTS, device)
    monkeypatch.setattr(library, "_devices", {device: loaded})
    library._single.cache_clear()
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: int(tensor[0]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    stream = "_cuda_getCurrentRawStream"
    monkeypatch.setattr(torch._C, stream, lambda device: 7, raising=False)
    yield lambda: tuple(room[: host_code.taken(room)])
    library._single.cache_clear()


def test_a_launch(taken):
    """Has the same arguments each time, in whatever order they are named; a kernel is initialized once."""
    q, out = torch.zeros(2), torch.zeros(2)
    call = (1, q.data_ptr(), out.data_ptr(), *VALUES, 7)
    library.launch("scale", out=out, **SCALED, q=q)
    assert taken() == (0, *call)
    library.launch("scale", q=q, out=out, **SCALED)
    assert taken() == call
    library.launch("scale", q=q, out=out, **{**SCALED, "rows": 5})
    assert taken()[3] == 5


def test_a_chain(taken):
    """Of two launches of one kernel and one of another, with a part of a tensor under another name."""
    chain = library.Chain(
        ("out", "q", "workspace"),
        library.Step("scale", SCALED, {"out": "scaled"}),
        library.Step("add", dict(rows=4), {"x": "scaled"}),
        library.Step("add", dict(rows=5), {"x": "q", "out": "workspace"}),
        inside={"scaled": ("workspace", 16)},
    )
    for _ in range(3):
        out, q, workspace = torch.zeros(2), torch.zeros(2), torch.zeros(20)
        chain(out, q, workspace)
        gc.collect()
        out, q, workspace = (x.data_ptr() for x in (out, q, workspace))
        assert taken()[-9 - 5 - 5 :] == (
            *(1, q, workspace + 16, *VALUES, 7),
            *(2, workspace + 16, out, 4, 7),
            *(2, q, workspace, 5, 7),
        )
    with pytest.raises(TypeError, match="q is .*, not a tensor on cuda:0"):
        chain(torch.zeros(2), torch.ones(2), torch.zeros(20))
    assert taken() == ()


def test_a_launch_that_fails_is_named(taken):
    """And those behind it are not carried out."""
    steps = [library.Step("add", dict(rows=rows)) for rows in (1, 0, 2)]
    chain = library.Chain(("x", "out"), *steps)
    with pytest.raises(RuntimeError, match="add on cuda:0: add has failed"):
        chain(torch.zeros(2), torch.zeros(2))
    assert len(taken()) == 2 * 5


SCALE = library.Step("scale", SCALED)


@pytest.mark.parametrize(
    "tensors, steps, inside, message",
    [
        (("q", "oot"), [SCALE], {}, "scale: out is missing; oot is unknown"),
        (("q", "out", "x"), [SCALE], {}, "x is unknown"),
        (("q", "out"), [SCALE], {"x": ("q", 8)}, "x is unknown"),
        (
            ("q", "out"),
            [library.Step("scale", dict(SCALED, rows=1 << 31))],
            {},
            "rows is 2147483648",
        ),
        (
            ("q", "out"),
            [library.Step("scale", dict(SCALED, n=1))],
            {},
            "n is unknown",
        ),
        (("x", "out"), [library.Step("add", {})], {}, "rows is missing"),
        (
            ("x", "out"),
            [library.Step("add", dict(rows=1), {"y": "x"})],
            {},
            "y is unknown",
        ),
    ],
)
def test_a_chain_that_does_not_fit(taken, tensors, steps, inside, message):
    chain = library.Chain(tensors, *steps, inside=inside)
    for _ in range(2):
        with pytest.raises(TypeError, match=message):
            chain(*(torch.zeros(2) for _ in tensors))
    assert taken() == ()


def test_a_kernel_that_is_not_there_is_named(taken):
    with pytest.raises(RuntimeError, match="no kernel divide .*scale, add"):
        library.launch("divide", q=torch.zeros(2))


@pytest.mark.parametrize("rows, context", [(1, 64), (700, 5000), (9000, 1 << 17)])
def test_what_launches_leave_for_one_another_does_not_overlap(
    monkeypatch, rows, context
):
    """In the workspace of a prefill, of one chunk of rows or of several."""
    chains = []
    monkeypatch.setattr(devices, "_num_sms", lambda index: H100)
    monkeypatch.setattr(library.Chain, "__call__", lambda *chain: chains.append(chain))
    values = tensors("cpu")
    for name in ("q", "weights", "lengths", "heads", "shared_q", "shared_scale"):
        values[name] = values[name][:1].expand(rows, *values[name].shape[1:])
        values[name] = values[name].contiguous()
    values["page_table"] = torch.zeros(SEQUENCES, -(-context // 64), dtype=torch.int32)
    function = sgl_kernel_misa.topk_prefill.__wrapped__
    call("topk_prefill", "cpu", function, **values, topk=2048)
    ((chain, *given),) = chains
    workspace = given[chain.tensors.index("workspace")]
    _, scoring, *_ = (step.numbers for step in chain.steps)
    planes = chain.steps[3].numbers
    sizes = {
        "samples": scoring["pages"] * 8448,
        "sampled": scoring["slots"] * scoring["width"] * 4,
        "thresholds": scoring["slots"] * 3 * 4,
        "planes": planes["slots"] * 2 * planes["width"] * 4,
    }
    ranges = sorted((chain.inside[name][1], size) for name, size in sizes.items())
    end = 0
    for start, size in ranges:
        assert start >= end and start % 128 == 0
        end = start + size
    assert end <= workspace.numel()
    many = len(chain.steps) > 5
    assert many == (rows == 9000)


@pytest.mark.parametrize("ctas_per_sm", [1, 2])
def test_clusters_fit_the_device(ctas_per_sm):
    for sms in (H100, H20):
        ranks = [
            devices.cluster_ranks(count, ctas_per_sm, sms) for count in range(1, 400)
        ]
        assert ranks == sorted(ranks, reverse=True) and set(ranks) == {8, 4, 2, 1}
        for count, size in enumerate(ranks, start=1):
            assert size == 1 or count * size <= sms * ctas_per_sm
    # What was measured on an H100.
    assert [devices.cluster_ranks(n, 2, H100) for n in (30, 31, 64, 65, 132, 133)] == [
        8, 4, 4, 2, 2, 1,
    ]  # fmt: skip
