"""Where an operation meets its implementation."""

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch

from sglang.srt.layers.misa import config, operations, reference, torch_operations
from sglang.srt.layers.misa.testing.batches import write_cache
from sglang.srt.layers.misa.testing.inputs import make_inputs

NAMES = [
    "update_pooled_keys",
    "route",
    "route_sampled",
    "topk_prefill",
    "topk_decode",
    "route_topk_decode",
    "route_sampled_topk_decode",
    "route_sampled_topk_prefill",
    "rerank",
]


def check_device():
    raise RuntimeError("compute capability 8.0, not 9.0.\nSee the README.")


def test_a_gpu_takes_the_kernels_and_a_cpu_does_not(monkeypatch):
    kernels = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "sgl_kernel_misa", kernels)
    assert operations.operations(torch.device("cuda", 1)) is kernels
    assert operations.operations(torch.device("cpu")) is torch_operations


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_take_the_same_arguments(name):
    kernels = pytest.importorskip("sgl_kernel_misa")

    def parameters(module):
        signature = inspect.signature(getattr(module, name))
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert parameters(kernels) == parameters(torch_operations)


def test_the_longest_context_is_the_kernels():
    constants = pytest.importorskip("sgl_kernel_misa.constants")
    assert config.MAX_CONTEXT == constants.MAX_CONTEXT


def test_as_many_rows_a_sequence_as_the_kernels():
    kernels = pytest.importorskip("sgl_kernel_misa")
    assert torch_operations.MAX_ROWS == kernels.MAX_ROWS


def test_kernels_that_run(monkeypatch):
    module = SimpleNamespace(check_device=lambda: None)
    monkeypatch.setitem(sys.modules, "sgl_kernel_misa", module)
    assert operations.kernels_problem() is None


def test_kernels_that_do_not_run_here(monkeypatch):
    module = SimpleNamespace(check_device=check_device)
    monkeypatch.setitem(sys.modules, "sgl_kernel_misa", module)
    problem = operations.kernels_problem()
    assert "(compute capability 8.0, not 9.0. See the README)" in problem
    assert operations.INSTALL_KERNELS in problem


def test_kernels_that_are_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sgl_kernel_misa", None)
    problem = operations.kernels_problem()
    assert "cannot be imported" in problem and operations.INSTALL_KERNELS in problem
    with pytest.raises(ImportError):
        operations.operations(torch.device("cuda"))


def arguments():
    """The arguments of topk_prefill for two sequences of the same keys."""
    inputs = make_inputs("random", rows=6, heads=4, tokens=100)
    index_k, page_table = write_cache(inputs)
    return {
        "q": inputs.q,
        "weights": inputs.weights,
        "heads": None,
        "index_k": index_k,
        "page_table": page_table.repeat(2, 1),
        "cu_rows": torch.tensor([0, 4, 6], dtype=torch.int32),
        "lengths": inputs.lengths.int(),
        "topk": 64,
    }


@pytest.mark.parametrize(
    "name, change",
    [
        ("weights", lambda x: x.double()),
        ("weights", lambda x: x[:5]),
        ("weights", lambda x: x.T.contiguous().T),
        ("weights", lambda x: x[:, :, None]),
        ("q", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
        ("page_table", lambda x: x.long()),
        ("page_table", lambda x: x[:1]),
        ("page_table", lambda x: x.repeat_interleave(2, 1)[:, ::2]),
        ("cu_rows", lambda x: x.long()),
        ("lengths", lambda x: x.long()),
        ("lengths", lambda x: x[:5]),
    ],
)
def test_the_torch_operations_are_as_strict_as_the_kernels(name, change):
    given = arguments()
    assert torch_operations.topk_prefill(**given).shape == (6, 64)
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=name):
        torch_operations.topk_prefill(**given)


def test_rows_of_a_page_table_may_lie_apart():
    given = arguments()
    expected = torch_operations.topk_prefill(**given)
    wide = torch.zeros(2, 50, dtype=torch.int32)
    wide[:, :2] = given["page_table"]
    given["page_table"] = wide[:, :2]
    assert torch.equal(torch_operations.topk_prefill(**given), expected)


def test_a_length_beyond_max_context():
    with pytest.raises(ValueError, match="max_context=99"):
        torch_operations.topk_prefill(**arguments(), max_context=99)


def test_several_rows_a_sequence_in_decode():
    given = arguments()
    del given["cu_rows"]
    with pytest.raises(ValueError, match="6 rows are not 2 rows a sequence"):
        torch_operations.topk_decode(**given, rows_per_seq=2)
    for rows in (0, 9):
        with pytest.raises(
            ValueError, match=f"rows_per_seq must be 1 to 8, not {rows}"
        ):
            torch_operations.topk_decode(**given, rows_per_seq=rows)
    expected = torch_operations.topk_prefill(**arguments())
    assert torch.equal(torch_operations.topk_decode(**given, rows_per_seq=3), expected)


def test_a_key_that_is_nan():
    """Every row that sees it selects as many tokens as ever, as the reference does, and that key last."""
    inputs = make_inputs("random", rows=6, heads=4, tokens=100)
    inputs.k_scale[70] = float("nan")
    index_k, page_table = write_cache(inputs)
    given = {**arguments(), "index_k": index_k, "page_table": page_table[None]}
    given["cu_rows"] = torch.tensor([0, 6], dtype=torch.int32)
    selected = torch_operations.topk_prefill(**given)
    assert torch.equal(selected.long(), reference.dsa(*inputs, 64))
    assert (selected >= 0).all() and not (selected == 70).any()
    everything = torch_operations.topk_prefill(**{**given, "topk": 128})
    assert torch.equal((everything >= 0).sum(1), given["lengths"])


def test_rows_that_see_nothing():
    given = arguments()
    given["lengths"] = torch.tensor([0, 0, 0, 0, 0, 64], dtype=torch.int32)
    selected = torch_operations.topk_prefill(**given)
    assert (selected[:5] == -1).all() and selected[5].tolist() == list(range(64))
    routed = torch_operations.route(
        *(given[name] for name in ("q", "weights")),
        torch.zeros(len(given["index_k"]), 128).bfloat16(),
        *(given[name] for name in ("page_table", "cu_rows", "lengths")),
        2,
        64,
    )
    assert routed.tolist() == [[0, 1]] * 6
