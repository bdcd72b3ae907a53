"""The audit: rows that all heads select for as well, when, and what is counted."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from marks import needs_gpu
from test_hooks import CONFIG, EXTENDS, HEADS, LAYER, LENGTHS, PAGED, TOPK, Batch

from sglang.srt.environ import envs
from sglang.srt.layers.misa import audit, hooks, reference
from sglang.srt.layers.misa.audit import Audit, Counts, Step
from sglang.srt.layers.misa.batch import Batch as AllRows
from sglang.srt.layers.misa.config import MisaConfig
from sglang.srt.model_executor.forward_batch_info import ForwardMode

POOLED = MisaConfig("pooled", 3, 128, decode="misa")


class Module(SimpleNamespace):
    """Has a hash, as a module has."""

    __hash__ = object.__hash__


@pytest.fixture
def started(monkeypatch):
    """started(batch, interval) -> the audit of the batch's indexer, in step 7."""

    def start(batch, interval=1, **options):
        found = Audit()
        found.number = 7
        batch.indexer = Module(**vars(batch.indexer))
        options = {"decode": True, **options}
        found.start(
            interval,
            indexers=frozenset([batch.indexer]),
            step=lambda: found.number,
            **options,
        )
        monkeypatch.setattr(hooks, "AUDIT", found)
        return found

    return start


def by_reference(batch, rows):
    """What the reference says of some rows: the tokens that DSA selects, and those of them that MISA selects."""
    options, define = dict(active_heads=3, **batch.forced), reference.misa_shared
    if batch.config.pools_keys:
        options["block_size"], define = 128, reference.misa
    wanted = selected = first = 0
    for inputs in batch.sequences:
        mine = [row - first for row in rows if 0 <= row - first < len(inputs.q)]
        first += len(inputs.q)
        if not mine:
            continue
        q, weights, k, k_scale, lengths = inputs
        given = q[mine], weights[mine], k, k_scale, lengths[mine], TOPK
        dsa = reference.members(reference.dsa(*given, **batch.forced), len(k))
        misa = reference.members(define(*given, **options), len(k))
        wanted, selected = wanted + dsa.sum(), selected + (dsa & misa).sum()
    return int(wanted), int(selected)


@pytest.mark.parametrize(
    "decode, config, forced, fused",
    [
        (False, CONFIG, (0, 0), True),
        (False, POOLED, (4, 70), False),
        (True, CONFIG, (4, 70), False),
        (True, POOLED, (0, 0), True),
    ],
    ids=lambda x: x.router if isinstance(x, MisaConfig) else str(x),
)
def test_counts_are_those_of_the_reference(
    decode, config, forced, fused, device, monkeypatch, started
):
    rows = [1] * len(LENGTHS) if decode else EXTENDS
    batch = Batch(LENGTHS, rows, device, monkeypatch, forced, config)
    audited = started(batch)
    lengths = torch.cat([s.lengths for s in batch.sequences])
    routed = (lengths > TOPK).nonzero()[:, 0].tolist()
    chosen = range(len(rows)) if decode else audit.spread(sum(rows), 16, seed=7)
    routed = [row for row in chosen if row in routed]
    select = batch.select_paged if decode else batch.select_ragged
    with envs.SGLANG_DSA_FUSE_TOPK.override(fused):
        select(method=PAGED, unfused=not fused)
    if device == "cuda":
        torch.cuda.synchronize()
    audited.collect()
    counts = audited.layers[LAYER]
    assert list(audited.layers) == [LAYER]
    assert counts.rows == len(routed) > 2
    wanted, selected = by_reference(batch, routed)
    assert counts.tokens == wanted == TOPK * len(routed)
    assert 0.3 < selected / wanted < 1, "a comparison with itself would show nothing"
    if device == "cpu":
        assert counts.selected == selected and counts.recall == selected / wanted
    else:
        assert abs(counts.selected - selected) < 0.01 * wanted
    slots = config.active_heads - (not config.pools_keys)
    assert len(counts.heads) == HEADS and sum(counts.heads) == slots * len(routed)


def test_rows_up_to_min_context_are_not_counted(monkeypatch, started):
    config = replace(CONFIG, min_context=200)
    batch = Batch(LENGTHS, EXTENDS, "cpu", monkeypatch, config=config)
    audited = started(batch)
    batch.select_ragged(method=PAGED)
    audited.collect()
    lengths = torch.cat([s.lengths for s in batch.sequences])
    routed = (lengths > 200).nonzero()[:, 0].tolist()
    rows = [routed[x] for x in audit.spread(len(routed), 16, 7)]
    assert 0 < audited.layers[LAYER].rows == len(rows) < len(routed)
    expected = by_reference(batch, rows)
    assert (audited.layers[LAYER].tokens, audited.layers[LAYER].selected) == expected


def audits(batch, audited, steps, select="select_ragged"):
    """The steps in which the batch is audited."""
    found = []
    for audited.number in steps:
        getattr(batch, select)(method=PAGED)
        if audited._pending:
            found.append(audited._pending.pop().number)
    return found


def test_interval(monkeypatch, started):
    batch = Batch([300, 129], [3, 1], "cpu", monkeypatch)
    audited = started(batch, 10)
    # A prompt is audited as soon as there is one, decode in steps that all ranks know.
    assert audits(batch, audited, [8, 9, 17, 23, 24, 33]) == [8, 23, 33]
    # SGLang counts anew.
    assert audits(batch, audited, [2, 3, 12]) == [2, 12]
    batch = Batch([300, 129], [1, 1], "cpu", monkeypatch)
    audited = started(batch, 10)
    assert audits(batch, audited, range(8, 32), "select_paged") == [10, 20, 30]
    audited = started(batch, 10, decode=False)
    assert audits(batch, audited, range(8, 32), "select_paged") == []


def test_all_layers_of_a_step(monkeypatch, started):
    batch = Batch(LENGTHS, EXTENDS, "cpu", monkeypatch)
    audited = started(batch, 100)
    for layer_id in (LAYER, LAYER + 1):
        monkeypatch.setattr("test_hooks.LAYER", layer_id)
        batch.select_ragged(method=PAGED)
    (step,) = audited._pending
    assert list(step.layers) == [LAYER, LAYER + 1]


def test_what_is_not_audited(monkeypatch, started):
    """Rows that select all they see, all heads, and the layers of a draft model; none of them uses up the audit."""
    short = Batch([TOPK, 70], [TOPK, 3], "cpu", monkeypatch)
    audited = started(short, 100)
    assert audits(short, audited, [8]) == []
    batch = Batch([300], [3], "cpu", monkeypatch)
    batch.indexer = Module(**vars(batch.indexer), of_a_draft_model=True)
    assert audits(batch, audited, [9]) == []
    batch.indexer = short.indexer
    assert audits(batch, audited, [10]) == [10]
    batch = Batch([300], [3], "cpu", monkeypatch, config=MisaConfig("sampled", HEADS))
    assert audits(batch, started(batch, 100), [8]) == []


def test_off_nothing_is_looked_at(monkeypatch):
    batch = Batch(LENGTHS, EXTENDS, "cpu", monkeypatch)
    assert hooks.AUDIT.interval == 0
    for name in ("is_due", "compare", "collect"):
        monkeypatch.setattr(Audit, name, None)
    batch.select_ragged(method=PAGED)
    hooks.report_audits(None, None)


@pytest.mark.parametrize("mode", ["DECODE", "IDLE", "TARGET_VERIFY", "EXTEND"])
def test_an_audited_decode_step_leaves_the_graph(mode, monkeypatch, started):
    batch = Batch([300], [1], "cpu", monkeypatch)
    forward_batch = SimpleNamespace(forward_mode=ForwardMode[mode])

    def runs_in_graph():
        return hooks.audited_outside_of_the_graph(
            lambda *_: "original", None, forward_batch
        )

    assert runs_in_graph() == "original"
    for options, leaves in (
        ({"interval": 7}, mode in ("DECODE", "IDLE")),
        ({"interval": 6}, False),
        ({"interval": 7, "decode": False}, False),
    ):
        started(batch, **options)
        assert runs_in_graph() == (False if leaves else "original")


def test_collect(caplog):
    """In the order of the steps, each when it has arrived."""
    exported, audited = [], Audit()
    export = lambda layer_id, last, total: exported.append((layer_id, last, total.rows))
    audited.start(1, indexers=frozenset(), step=lambda: 0, export=export)
    arrived = False
    event = SimpleNamespace(query=lambda: arrived)
    counts = [torch.tensor([2, 10, n, 1, 1]) for n in (9, 5)]
    audited._pending.extend(
        [Step(1, {0: counts[0], 3: counts[1]}), Step(2, {0: counts[1]}, event)]
    )
    with caplog.at_level(logging.INFO, audit.__name__):
        audited.collect(log=True)
        audited.collect(log=True)
    (logged,) = caplog.messages
    assert logged == "MISA audit, #row: 4, recall: 0.7000, lowest: 0.5000 in layer 3"
    assert exported == [
        (0, Counts(2, 10, 9, [1, 1]), 2),
        (3, Counts(2, 10, 5, [1, 1]), 2),
    ]
    arrived = True
    audited.collect()
    assert exported[2:] == [(0, Counts(2, 10, 5, [1, 1]), 4)]
    assert audited.layers[0] == Counts(4, 20, 14, [2, 2])


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 300, 8192])
def test_spread(rows):
    found = [audit.spread(rows, 16, seed) for seed in range(20)]
    for chosen in found:
        assert min(rows, 8) <= len(chosen) <= 16
        assert 0 <= chosen[0] and chosen[-1] < rows
        assert len({b - a for a, b in zip(chosen, chosen[1:])}) <= 1
    assert len({tuple(chosen) for chosen in found}) > 1 or rows <= 16


@pytest.mark.parametrize("rows", [[0], [2, 3, 4], [5, 8], [0, 2, 4, 6, 8]])
def test_some_rows_of_a_batch(rows):
    """With sequences that have no rows, before and between others."""
    counts = [0, 3, 0, 2, 4]
    owner = torch.arange(5).repeat_interleave(torch.tensor(counts))
    batch = AllRows(
        page_table=torch.arange(5, dtype=torch.int32)[:, None],
        cu_rows=torch.tensor([0, *counts]).cumsum(0).int(),
        lengths=torch.arange(9, dtype=torch.int32) + 10,
        rows=counts,
        bounds=(10, 18),
    )
    some, index = batch.only(rows)
    assert index.tolist() == rows and some.bounds == batch.bounds
    assert some.lengths.tolist() == [row + 10 for row in rows]
    pages = some.page_table[:, 0].repeat_interleave(torch.tensor(some.rows))
    assert pages.tolist() == owner[rows].tolist() and all(some.rows)
    assert some.cu_rows.tolist() == [0, *torch.tensor(some.rows).cumsum(0)]
    # In decode each row has pages of its own.
    decode = replace(batch, page_table=owner.int()[:, None], bounds=None)
    some, _ = decode.only(rows)
    assert some.page_table[:, 0].tolist() == owner[rows].tolist()
    assert some.rows == [1] * len(rows) and len(some.cu_rows) == len(rows) + 1


@needs_gpu
def test_an_audit_takes_less_than_what_it_audits(monkeypatch, started):
    """2048 rows that see 128K tokens: so, every 1000 steps, it takes less than a thousandth."""
    config = MisaConfig(rerank_candidates=4096)
    monkeypatch.setattr("test_hooks.HEADS", 64)
    batch = Batch([1 << 17], [2048], "cuda", monkeypatch, config=config)
    batch.indexer.index_topk = 2048

    def milliseconds():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        batch.select_ragged(method=PAGED)
        start.record()
        for _ in range(10):
            batch.select_ragged(method=PAGED)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 10

    without = milliseconds()
    audited = started(batch)
    with_audit = milliseconds()
    audited.collect()
    print(f"2048 rows at 128K: {without:.3f} ms, audited {with_audit:.3f} ms")
    assert audited.layers[LAYER].rows > 8 * 11
    assert with_audit < 2 * without
