"""The CPU engine fits the SGLang that is installed, or says that it does not."""

import pytest
import torch

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the CPU engine is not installed on a GPU"
)


def test_a_release_that_is_not_known(monkeypatch):
    from sglang_cpu_engine import releases

    monkeypatch.setattr(releases, "__version__", "0.5.18")
    with pytest.raises(SystemExit, match="0.5.17 or 0.5.23, not 0.5.18"):
        releases.installed()


@pytest.mark.parametrize("target", ["no_such_module.f", "server_args.no_such_name"])
def test_a_target_that_is_gone(target):
    from sglang_cpu_engine.patches import Patch, apply

    target = f"sglang.srt.{target}"
    with pytest.raises(SystemExit, match=f"no {target}"):
        apply([Patch(target, None, "renamed")])


@pytest.mark.parametrize("expanded", [False, True], ids=["requests", "rows"])
def test_slots_of_what_is_selected(expanded):
    from sglang_cpu_engine.kernels.page_table import transform_prefill

    requests = torch.tensor([[10, 11, 12], [20, 21, 22]], dtype=torch.int32)
    table = requests[[0, 0, 1]] if expanded else requests
    selected = torch.tensor([[0, -1], [2, 1], [1, 0], [7, 7]], dtype=torch.int32)
    slots = transform_prefill(
        table,
        selected,
        [2, 1],
        output_num_tokens=5,
        page_table_is_expanded=expanded,
    )
    # Rows of padding are ignored, whatever they select.
    assert slots.tolist() == [[10, -1], [12, 11], [21, 20], [-1, -1], [-1, -1]]


def test_rotation():
    """The Walsh-Hadamard transform of more rows than go through it at once."""
    from sglang_cpu_engine.kernels import quantization

    matrix = torch.ones(1, 1)
    for _ in range(7):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    x = torch.randn(3, 1000, 128)
    assert x.shape[:2].numel() > quantization.ROTATED_AT_ONCE
    found = quantization.rotate_activation(x)
    torch.testing.assert_close(found, x @ matrix * 128**-0.5)


@pytest.mark.parametrize(
    "changes, forks",
    [
        ({}, True),
        ({"SGLANG_MISA_CAPTURE_DIR": "folder"}, True),
        ({"SGLANG_MISA_CAPTURE_DIR": "folder", "SGLANG_PLUGINS": "misa"}, False),
        ({"SGLANG_CPU_ENGINE_FORKS": "0"}, False),
    ],
)
def test_servers_that_are_forked(changes, forks, monkeypatch, tmp_path):
    """Those whose environment is that in which SGLang was imported, but for what is read later."""
    from sglang_cpu_engine import forked

    here, elsewhere = object(), object()
    monkeypatch.setattr(forked, "Forked", lambda *_: here)
    monkeypatch.setattr(forked.subprocess, "Popen", lambda *_, **__: elsewhere)
    with (tmp_path / "log").open("w") as log:
        started = forked.start(
            ["python"],
            env={**forked._environment(), **changes},
            stdout=log,
            stderr=forked.subprocess.STDOUT,
        )
    assert started is (here if forks else elsewhere)
