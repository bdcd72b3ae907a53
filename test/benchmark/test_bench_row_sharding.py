"""The benchmark of shared rows: what it runs, and what it makes of the times; several GPUs run the rest."""

import bench_row_sharding as bench
import pytest
import torch
from indexer.cases import Case
from indexer.data import make_layers, make_step
from indexer.timing import spread

from sglang.srt.layers.misa import row_sharding
from sglang.srt.layers.misa.config import MisaConfig

CASE = Case("prefill", "prefill", (300, 250), 40, 32)


class Group:
    """A group whose other ranks have selected before."""

    def __init__(self, others):
        self.others, self.world_size = others, len(others) + 1

    def all_gather(self, own, dim):
        return torch.cat([*self.others, own])


def test_shares_make_up_the_whole(monkeypatch):
    """Of 80 rows of two sequences, 48 and 32."""
    monkeypatch.setattr(bench, "TOPK", 64)
    monkeypatch.setattr(row_sharding, "SHARE_MULTIPLE", 16)
    layers = make_layers(CASE, "gaussian", 1, seed=0, text=None)
    step, config = make_step(CASE, layers), MisaConfig(active_heads=3)
    alone = bench.Shared(bench.Rank(step, layers, config, 1, 0), None).total(0)
    assert alone.shape == (80, 64)
    first = bench.Rank(step, layers, config, 2, 0).select(0)
    assert torch.equal(first, alone[:48])
    second = bench.Shared(bench.Rank(step, layers, config, 2, 1), Group([first]))
    filled = torch.cat([alone[48:], alone.new_empty(16, 64)])
    assert len(second.mine.select(0)) == 32 and len(filled) == 48
    assert torch.equal(second.total(0), alone)


def test_records():
    """The slowest rank of each round counts."""
    of_ranks = [
        {(1, "total"): [4.0, 4.0], (2, "total"): [1.0, 3.0]},
        {(1, "total"): [2.0, 8.0], (2, "total"): [2.0, 2.0]},
    ]
    spreads = bench.slowest(of_ranks)
    assert spreads == {
        (1, "total"): spread([4.0, 8.0]),
        (2, "total"): spread([2.0, 3.0]),
    }
    case = bench.prefill(128, 64, 8192)
    one, two = bench.records_of(
        case, "misa", spreads, {1: True, 2: False}, {"device": "X"}
    )
    assert (one["speedup"], two["speedup"]) == (1, 6 / 2.5)
    assert (one["shared"], two["shared"]) == (False, True)
    assert (two["rows"], two["context"], two["device"]) == (8192, 128 << 10, "X")
    assert "2.40 times" in bench.line(two) and "NOT WHAT" in bench.line(two)
    assert "NOT WHAT" not in bench.line(one)


def test_arguments(capsys):
    args = bench.parse_arguments(["--shapes", "8192x128", "7x1"])
    assert args.shapes == [(8192, 128), (7, 1)]
    assert (8192, 128) in bench.parse_arguments([]).shapes
    with pytest.raises(SystemExit):
        bench.parse_arguments(["--shapes", "many"])
    assert "many is not ROWSxTHOUSANDS" in capsys.readouterr().err
