"""Recall is what it says, for selections that are known."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inputs import make_inputs

BENCHMARK = Path(__file__).parents[2] / "benchmark" / "quality"
sys.path.insert(0, str(BENCHMARK))

from recall import Rows, future_means, measure, recall, selections, some_rows

from sglang.srt.layers.misa import reference

TOPK = 128


def rows_of(kind="random", heads=16, tokens=1500, rows=6) -> Rows:
    return Rows(*make_inputs(kind, rows, heads, tokens))


def record_of(rows: Rows) -> dict:
    return rows._asdict()


def test_recall():
    selected = torch.tensor([[0, 2, 4, -1], [0, 1, 2, 3]])
    wanted = torch.tensor([[0, 1, 2, 3], [4, 5, -1, -1]])
    assert recall(selected, wanted, 6).tolist() == [0.5, 0.0]


def test_selections():
    rows = rows_of()
    wanted = reference.dsa(*rows, TOPK)
    shares = {
        variant: recall(select(), wanted, len(rows.k)).mean().item()
        for variant, select in selections(rows, TOPK)
    }
    by_name = {}
    for variant, share in shares.items():
        by_name.setdefault(variant.variant, []).append((variant.active_heads, share))
        assert 0 <= share <= 1
    assert all(share == 1 for heads, share in by_name["misa"] if heads == 16)
    # As many candidates as there are tokens: the second stage is DSA.
    assert all(share == 1 for _, share in by_name["misa-hierarchical"])
    assert all(share == 1 for _, share in by_name["hisa"])
    for variant, select in selections(rows, TOPK):
        if variant.variant == "misa":
            numbers = variant._asdict()
            del numbers["variant"]
            assert torch.equal(select(), reference.misa(*rows, TOPK, **numbers))
    # Random keys: small blocks still say something of them, large ones do not.
    (routed,) = [s for v, s in shares.items() if v[:3] == ("misa", 8, 64)]
    assert routed > by_name["random-heads"][0][1] + 0.1
    assert set(by_name) == {
        *("misa", "misa-hierarchical", "hisa", "random-heads"),
        *("heaviest-heads", "future-means", "own-key"),
    }


def test_shortcuts_differ_from_the_definition():
    """The future counts where the last block is not complete, and only there."""
    rows = rows_of(tokens=4096)
    for length, same in ((3072, True), (3200, False)):
        cut = rows._replace(lengths=torch.full_like(rows.lengths, length))
        misa = reference.misa(*cut, TOPK, active_heads=8, block_size=1024)
        assert torch.equal(future_means(cut, TOPK, 8, 1024), misa) == same


@pytest.mark.parametrize("count", [1, 3, 100])
def test_some_rows(count):
    record = record_of(rows_of(rows=20, tokens=TOPK + 10))
    rows = some_rows(record, TOPK, count, "cpu")
    assert len(rows.q) == min(count, 10)
    assert (rows.lengths > TOPK).all() and rows.lengths[0] == TOPK + 1
    assert len(some_rows(record, 10_000, count, "cpu").q) == 0


def test_command(tmp_path):
    for layer in range(2):
        rows = rows_of(heads=8, tokens=2000 + layer)
        torch.save(record_of(rows), tmp_path / f"{layer}.pt")
    command = [sys.executable, BENCHMARK / "recall.py", tmp_path]
    options = ["--topk", str(TOPK), "--rows", "4", "--output", tmp_path / "out.json"]
    subprocess.run([*command, *options], check=True)
    results = json.loads((tmp_path / "out.json").read_text())
    assert {r["n"] for r in results} == {8} and {r["context"] for r in results} == {
        2048
    }
    assert {r["metric"] for r in results} == {"recall"}
    (hisa,) = [r for r in results if r["variant"] == "hisa"]
    assert hisa["value"] == 1 and hisa["ci95"] == 0
    records = [torch.load(tmp_path / f"{layer}.pt") for layer in range(2)]
    assert results == measure(records, TOPK, 4, "cpu")

    failed = subprocess.run(
        [*command, "--topk", "4000", "--output", tmp_path / "none.json"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert failed.returncode and "more than 4000 tokens" in failed.stderr
