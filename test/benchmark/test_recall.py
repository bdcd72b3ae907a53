"""Recall is what it says, for selections that are known."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang.srt.layers.misa.testing.inputs import make_inputs

BENCHMARK = Path(__file__).parents[2] / "benchmark" / "quality"
from recall import (
    Observation,
    Rows,
    Variant,
    attention_mass,
    dense_attention,
    future_means,
    heaviest_by_layer,
    main,
    selections,
    shared_selections,
    some_rows,
    spread_lengths,
    summarize,
)

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.evaluation.capture import ATTENTION_STRIDE
from sglang.srt.layers.misa.evaluation.selections import heaviest_heads
from sglang.srt.layers.misa.testing.recall import recall

TOPK = 128


def rows_of(kind="random", heads=16, tokens=1500, rows=6) -> Rows:
    return Rows(*make_inputs(kind, rows, heads, tokens))


def record_of(rows: Rows, layer=0, rid="a") -> dict:
    return rows._asdict() | {"layer_id": layer, "rid": rid}


def attention_of(rows: Rows, seed=0) -> dict:
    """An attention record of two heads for the rows that would be recorded."""
    rng = torch.Generator().manual_seed(seed)
    lengths = rows.lengths[rows.lengths % ATTENTION_STRIDE == 0]
    q = torch.randn(len(lengths), 2, 16, generator=rng).bfloat16()
    k = torch.randn(int(lengths.max()), 16, generator=rng).bfloat16()
    return {"q": q, "k": k, "lengths": lengths, "scaling": 0.25}


def test_recall_and_mass():
    selected = reference.members(torch.tensor([[0, 2, 4, -1], [0, 1, 2, 3]]), 6)
    wanted = reference.members(torch.tensor([[0, 1, 2, 3], [4, 5, -1, -1]]), 6)
    assert recall(selected, wanted).tolist() == [0.5, 0.0]
    attention = torch.tensor([[0.5, 0.25, 0.125, 0.125, 0.0]]).expand(2, -1)
    assert attention_mass(selected, attention).tolist() == [0.625, 1.0]


def test_dense_attention():
    rows = rows_of(rows=200, tokens=600)
    record = attention_of(rows)
    lengths = record["lengths"][1:]
    attention = dense_attention(record, lengths)
    for i, length in enumerate(lengths.tolist()):
        q, k = record["q"][i + 1].double(), record["k"][:length].double()
        expected = (q @ k.T / 4).softmax(1).mean(0)
        torch.testing.assert_close(attention[i, :length].double(), expected)
        assert not attention[i, length:].any()


def test_selections():
    rows = rows_of()
    heaviest = heaviest_heads(rows.weights, 8)
    wanted = reference.members(reference.dsa(*rows, TOPK), len(rows.k))
    shares = {
        variant: recall(reference.members(select(), len(rows.k)), wanted).mean().item()
        for variant, select in selections(rows, TOPK, heaviest)
    }
    by_name = {}
    for variant, share in shares.items():
        by_name.setdefault(variant.variant, []).append((variant.active_heads, share))
        assert 0 <= share <= 1
    assert all(
        share == 1
        for variant, share in shares.items()
        if variant[:2] == ("misa", 16) and variant.router == "pooled"
    )
    # As many candidates as there are tokens: the second stage is DSA.
    whole = {v: s for v, s in shares.items() if v.variant == "misa-hierarchical"}
    assert all(share == 1 for variant, share in whole.items() if variant.taken == 0)
    assert {v.taken for v in whole if v.router == "sampled"} == {0, 32, 48, 64}
    assert all(share == 1 for _, share in by_name["hisa"] + by_name["dsa"])
    for variant, select in selections(rows, TOPK, heaviest):
        if variant.variant == "misa":
            numbers = variant._asdict()
            del numbers["variant"], numbers["router"]
            misa = reference.misa
            if variant.router == "sampled":
                misa = reference.misa_shared
                del numbers["block_size"]
            assert torch.equal(select(), misa(*rows, TOPK, **numbers))
        if variant.variant == "heaviest-heads":
            scored = reference.of_heads(*rows[:2], heaviest.expand(len(rows.q), -1))
            assert torch.equal(select(), reference.dsa(*scored, *rows[2:], TOPK))
    # Random keys: small blocks still say something of them, large ones do not.
    (routed,) = [s for v, s in shares.items() if v[:3] == ("misa", 8, 64)]
    assert routed > by_name["random-heads"][0][1] + 0.1
    shared = {
        v.active_heads: s
        for v, s in shares.items()
        if v.router == "sampled" and v.variant == "misa"
    }
    assert list(shared) == [1, 2, 4, 8] and shared[8] > routed
    # It counts which heads are routed.
    ((heads, share),) = by_name["random-heads-shared"]
    assert heads == 8 and share < shared[8]
    assert set(by_name) == {
        *("dsa", "misa", "misa-hierarchical", "hisa", "random-heads"),
        *("heaviest-heads", "future-means", "own-key"),
        *("random-heads-shared", "half-slopes"),
    }


def test_slopes_count_where_heads_do_not_fire_half_of_the_time():
    rows = rows_of()
    q, k = (rows.q.float() - 30, rows.k.float() + 30)
    q, k = (x.clamp(-448, 448).to(rows.q.dtype) for x in (q, k))
    rows = rows._replace(q=q, k=k)
    wanted = reference.members(reference.dsa(*rows, TOPK), len(k))
    shares = {
        variant: recall(reference.members(select(), len(k)), wanted).mean()
        for variant, select in shared_selections(rows, TOPK)
        if variant in (Variant("misa", 8, router="sampled"), Variant("half-slopes", 8))
    }
    measured, halves = shares.values()
    assert measured > halves + 0.05


def test_shortcuts_differ_from_the_definition():
    """The future counts where the last block is not complete, and only there."""
    rows = rows_of(tokens=4096)
    for length, same in ((3072, True), (3200, False)):
        cut = rows._replace(lengths=torch.full_like(rows.lengths, length))
        misa = reference.misa(*cut, TOPK, active_heads=8, block_size=1024)
        assert torch.equal(future_means(cut, TOPK, 8, 1024), misa) == same


@pytest.mark.parametrize("count", [1, 3, 100])
def test_rows(count):
    """Evenly spread over a prompt, and found in whichever record holds them."""
    lengths = spread_lengths(2000, TOPK, count)
    assert len(lengths) == min(
        count, 2000 // ATTENTION_STRIDE - TOPK // ATTENTION_STRIDE
    )
    assert lengths[0] > TOPK and (lengths % ATTENTION_STRIDE == 0).all()
    if count > 1:
        assert lengths[-1] == 2000 // ATTENTION_STRIDE * ATTENTION_STRIDE
        assert lengths.diff().max() - lengths.diff().min() <= ATTENTION_STRIDE
    assert len(spread_lengths(150, TOPK, count)) == 0
    first, last = (record_of(rows_of(rows=n, tokens=n)) for n in (900, 2000))
    last["lengths"] = last["lengths"][900:]
    found = [some_rows(record, lengths, "cpu") for record in (first, last)]
    assert torch.equal(torch.cat([rows.lengths for rows in found]), lengths)


def test_summary():
    """Every prompt counts once, however many rows it has."""
    dsa, misa = Variant("dsa"), Variant("misa", 8, 64)
    observations = [
        Observation(variant, 4096, "recall", layer, position, prompt, value)
        for variant, layer, position, prompt, value in (
            (misa, 0, 2048, "a", 0.5),
            (misa, 0, 4096, "a", 0.6),
            (misa, 1, 4096, "a", 1.0),
            (misa, 0, 4096, "b", 0.9),
            (dsa, 0, 4096, "b", 1.0),
        )
    ]
    routed, whole = summarize(observations)
    assert routed["value"] == pytest.approx((0.7 + 0.9) / 2) and routed["n"] == 2
    # Student's t of one degree of freedom.
    assert routed["ci95"] == pytest.approx(12.7062047 * 0.1)
    assert (routed["variant"], routed["block_size"], routed["context"]) == (
        "misa",
        64,
        4096,
    )
    assert (whole["value"], whole["n"], whole["ci95"]) == (1.0, 1, None)
    assert "layer" not in routed
    cells = {
        (r["variant"], r["layer"], r["position"]): (r["value"], r["n"])
        for r in summarize(observations, ("layer", "position"))
    }
    assert cells.pop(("misa", 0, 4096)) == (pytest.approx(0.75), 2)
    assert cells == {
        ("misa", 0, 2048): (0.5, 1),
        ("misa", 1, 4096): (1.0, 1),
        ("dsa", 0, 4096): (1.0, 1),
    }


def test_heaviest_heads(tmp_path):
    """Those of all records of a layer; the first one's would be chance, and a server's is its own short prompt."""
    rows = [rows_of(tokens=100, rows=count) for count in (9, 90)]
    # The longer record has most rows, so that its heads have the largest average.
    rows[0].weights[:, 4:12] *= 3
    rows[1].weights[:, 8:16] *= 2
    paths = [tmp_path / f"{i}.pt" for i in range(3)]
    for path, record in zip(
        paths, (record_of(rows[0]), record_of(rows[1]), record_of(rows[0], layer=1))
    ):
        torch.save(record, path)
    for order in (paths, paths[::-1]):
        chosen = heaviest_by_layer(order)
        assert chosen[0].tolist() == list(range(8, 16))
        assert chosen[1].tolist() == list(range(4, 12))


def test_command(tmp_path, monkeypatch, capsys):
    # Two layers of two prompts; attention is known of the first one alone.
    for i in range(4):
        rows = rows_of(tokens=2000 + i, rows=1000)
        layer, prompt = i % 2, "ab"[i // 2]
        torch.save(record_of(rows, layer, prompt), tmp_path / f"{i}.pt")
        if prompt == "a":
            torch.save(attention_of(rows, i), tmp_path / f"{i}.attention")
    command = [sys.executable, BENCHMARK / "recall.py", tmp_path]
    options = ["--topk", str(TOPK), "--rows", "4", "--output", tmp_path / "out.json"]
    subprocess.run([*command, *options], check=True)
    results = json.loads((tmp_path / "out.json").read_text())
    assert {r["context"] for r in results} == {2048}
    assert {(r["metric"], r["n"]) for r in results} == {
        ("recall", 2),
        ("attention_mass", 1),
    }
    recalls = {r["variant"]: r for r in results if r["metric"] == "recall"}
    assert recalls["hisa"]["value"] == recalls["dsa"]["value"] == 1
    assert recalls["hisa"]["ci95"] == 0 and recalls["random-heads"]["value"] < 1
    (mass,) = [
        r["value"]
        for r in results
        if (r["variant"], r["metric"]) == ("dsa", "attention_mass")
    ]
    expected = []
    for i in range(2):
        record = torch.load(tmp_path / f"{i}.pt")
        rows = some_rows(record, spread_lengths(2001, TOPK, 4), "cpu")
        attention = dense_attention(
            torch.load(tmp_path / f"{i}.attention"), rows.lengths
        )
        for row, chosen in zip(attention, reference.dsa(*rows, TOPK)):
            expected.append(row[chosen].sum().item())
    assert mass == pytest.approx(sum(expected) / len(expected)) and 0 < mass < 1

    cells = json.loads((tmp_path / "out_by_layer_and_position.json").read_text())
    assert {(r["layer"], r["position"]) for r in cells} == {(0, 2048), (1, 2048)}
    assert len(cells) == 2 * len(results)

    # Here: to import SGLang once more takes long.
    options = ["--topk", "4000", "--output", str(tmp_path / "none.json")]
    monkeypatch.setattr(sys, "argv", ["recall.py", str(tmp_path), *options])
    with pytest.raises(SystemExit):
        main()
    assert "more than 4000 tokens" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()
