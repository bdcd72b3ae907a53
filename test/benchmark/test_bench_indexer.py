"""The benchmark of the indexer: what it checks, counts, writes and says; a GPU runs the rest."""

import json
from argparse import Namespace
from types import SimpleNamespace

import bench_indexer
import pytest
import torch
from indexer import profile, report, run, timing, work
from indexer.cases import CASES, Case
from indexer.check import (
    Sample,
    all_right,
    check_ours,
    check_production,
    in_order,
    outcome,
    well_formed,
)
from indexer.data import KEYS, contiguous_keys, make_layers, make_step
from indexer.misa import Routed
from indexer.text import Text
from indexer.timing import Spread

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.testing.judge import SharedHead

TOPK, HEADS, BLOCK = 64, 32, 128
PREFILL = Case("prefill", "prefill", (700, 300), 6, HEADS)
DECODE = Case("decode", "decode", (700, 300, 40), 1, HEADS)


class Fake:
    """A variant of ours by the reference, which writes what its case asks for; `fault` spoils what it writes."""

    def __init__(self, case, candidates=0, router="pooled", keys="gaussian"):
        (self.layer,) = make_layers(case, keys, 1, seed=0, text=None)
        self.step = make_step(case, [self.layer])
        self.router, self.active_heads = router, 4
        self.candidates, self.block_size = candidates, BLOCK
        self.fault = lambda positions: positions
        self.calls = 0

    def each(self, function):
        """int32 of all rows, of `function` of every sequence and its rows."""
        parts = [function(*pair) for pair in self.layer.rows()]
        return torch.cat(parts).int()

    def route(self, _):
        if self.router is None:
            return Routed(None)
        if self.router == "sampled":
            parts = [
                reference.route_sampled(*sequence, self.active_heads)
                for sequence, _ in self.layer.rows()
            ]
            heads, query, scale = zip(*parts)
            query = torch.cat([part.view(torch.uint8) for part in query])
            shared = SharedHead(query.view(torch.float8_e4m3fn), torch.cat(scale))
            return Routed(torch.cat(heads).int(), shared)

        def heads(sequence, rows):
            q, weights, k, k_scale, lengths = sequence
            means = reference.page_means(k, k_scale)
            return reference.route(q, weights, means, lengths, self.active_heads, BLOCK)

        return Routed(self.each(heads))

    def scored(self, routed, topk, candidates=None):
        def best(sequence, rows):
            q, weights, k, k_scale, lengths = sequence
            if routed.heads is not None:
                q, weights = reference.of_heads(q, weights, routed.heads[rows].long())
            allowed = reference.visible(lengths, len(k))
            if candidates is not None:
                allowed &= reference.members(candidates[rows].long(), len(k))
            shared = () if routed.shared is None else routed.shared.of_rows(rows)
            scores = reference.token_scores(q, weights, k, k_scale, *shared)
            return reference.top_positions(scores, allowed, topk)

        return self.each(best)

    def score_select(self, _, routed):
        return self.scored(routed, self.candidates or TOPK)

    def total(self, i):
        self.calls += 1
        positions = self.score_select(i, self.route(i))
        if self.candidates:
            positions = self.scored(Routed(None), TOPK, positions)
        positions = self.fault(positions)
        there = positions >= 0
        if self.step.case.mode == "prefill":
            written = positions + self.step.offsets[:, None]
        else:
            sequence = self.layer.row_sequence()
            pages = self.step.page_table[sequence]
            pages = pages.gather(1, positions.clamp(min=0).long() // 64)
            written = pages * 64 + positions % 64
        return written.where(there, -1).int()

    def positions(self, output):
        return self.step.positions(self.layer, output)

    def check(self, checker=check_ours):
        return checker(self, Sample(self.layer, 16))


VARIANTS = [
    dict(),
    dict(candidates=128),
    dict(router="sampled"),
    dict(router="sampled", candidates=128),
    dict(router=None),
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("case", [PREFILL, DECODE], ids=lambda case: case.label)
@pytest.mark.parametrize("keys", ["gaussian", "rare", "equal"])
def test_the_reference_is_exact(case, options, keys):
    checks = Fake(case, **options, keys=keys).check()
    assert all_right(checks) and outcome("misa", checks) == "exact"
    assert 0 <= checks["selection_error"] < 1e-3
    json.dumps(checks)


def last_for_first(positions):
    """A token that was not selected in the place of one that was, in the first row."""
    row = positions[0].tolist()
    other = next(p for p in range(600) if p not in row)
    positions[0] = torch.tensor(sorted(row[1:] + [other]))
    return positions


def unsorted(positions):
    """In a row that is not among those judged by their scores."""
    positions[1] = positions[1].flip(0)
    return positions


def short(positions):
    """One position too few in the last row, which may have fewer than topk."""
    last = int((positions[-1] >= 0).sum()) - 1
    positions[-1, last] = -1
    return positions


def of_another_sequence(positions):
    positions[-1, 0] = 699
    return positions


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("case", [PREFILL, DECODE], ids=lambda case: case.label)
@pytest.mark.parametrize(
    "fault", [last_for_first, unsorted, short, of_another_sequence]
)
def test_faults_are_wrong(case, options, fault):
    if case is DECODE and fault is short:
        fault = lambda positions: positions.masked_fill(
            positions == 3, -1
        )  # noqa: E731
    variant = Fake(case, **options)
    variant.fault = fault
    checks = variant.check()
    assert not all_right(checks) and outcome("misa", checks) == "wrong"


@pytest.mark.parametrize("router", ["pooled", "sampled"])
def test_wrong_heads_are_wrong(router):
    variant = Fake(PREFILL, router=router)
    right = variant.route(0)
    other = next(h for h in range(HEADS) if h not in right.heads[0])
    wrong = right.heads.clone()
    wrong[0, 0] = other
    wrong[0] = wrong[0].sort().values
    variant.route = lambda _: right._replace(heads=wrong)
    checks = variant.check()
    # The selection is judged by the heads that were chosen, so it is right.
    assert checks["selection_problem"] is None
    assert "a lower score" in checks["routing_problem"] and checks["routing_error"] > 0
    assert outcome("misa", checks) == "wrong"


def test_results_that_change_are_wrong():
    variant = Fake(PREFILL)
    variant.fault = lambda p: last_for_first(p) if variant.calls == 2 else p
    checks = variant.check()
    assert checks["selection_problem"] is None and checks["deterministic"] is False
    assert outcome("misa", checks) == "wrong"


class TestProduction:
    def make(self, keys="gaussian"):
        return Fake(PREFILL, router=None, keys=keys)

    def test_the_order_does_not_matter(self):
        variant = self.make()
        variant.fault = lambda positions: positions.flip(1)
        assert outcome("dsa", variant.check(check_production)) == "exact"
        assert outcome("misa", variant.check()) == "wrong"

    def test_ties_are_broken_as_it_likes(self):
        variant = self.make("equal")
        variant.fault = lambda positions: positions + 100
        assert outcome("dsa", variant.check(check_production)) == "exact"
        assert outcome("misa", variant.check()) == "wrong"

    def test_dropped_candidates_have_a_name_of_their_own(self):
        variant = self.make()
        variant.fault = last_for_first
        checks = variant.check(check_production)
        assert checks["selection_error"] > 0.001
        assert outcome("dsa", checks) == "production inexact"

    def test_in_order(self):
        positions = torch.tensor([[5, -1, 2, -1], [1, 0, 3, -2]])
        assert in_order(positions).tolist() == [[2, 5, -1, -1], [-2, 0, 1, 3]]


def test_well_formed():
    lengths = torch.tensor([10, 2], dtype=torch.int32)
    right = torch.tensor([[1, 4, 9], [0, 1, -1]])
    assert well_formed(right, lengths)
    for row, wrong in ((0, [1, 4, 10]), (0, [4, 1, 9]), (1, [0, -1, 1]), (1, [0, 1, 2]), (1, [0, -1, -1]), (0, [1, 1, 9])):  # fmt: skip
        other = right.clone()
        other[row] = torch.tensor(wrong)
        assert not well_formed(other, lengths)


def test_layers_share_a_page_table_and_nothing_else():
    one, two = make_layers(DECODE, "gaussian", 2, seed=0, text=None)
    assert torch.equal(one.page_table, two.page_table)
    assert not torch.equal(one.index_k, two.index_k)
    assert not torch.equal(one.q.float(), two.q.float())
    k, k_scale = contiguous_keys(one)
    assert len(k) == len(k_scale) == sum(DECODE.contexts)
    step = make_step(PREFILL, make_layers(PREFILL, "few", 1, seed=0, text=None))
    assert step.offsets.tolist() == [0] * 6 + [700] * 6
    assert step.lengths[[0, 5, 6, 11]].tolist() == [695, 700, 295, 300]


def fake_text(windows=3, layers=2, tokens=100, rows=8, heads=64):
    """Each key holds its window, its layer and its position, as far as FP8 can tell them apart."""
    k = torch.zeros(windows, layers, tokens, 128)
    k[..., 0] = torch.arange(windows)[:, None, None] + 1
    k[..., 1] = torch.arange(layers)[:, None] + 1
    q = torch.zeros(windows, layers, rows, heads, 128)
    q[..., 0] = torch.arange(windows)[:, None, None, None] + 1
    return Text(
        {
            "q": q.to(torch.float8_e4m3fn),
            "weights": torch.arange(heads).float().expand(windows, layers, rows, -1),
            "k": k.to(torch.float8_e4m3fn),
            "k_scale": torch.arange(tokens).float().expand(windows, layers, -1),
        }
    )


def test_text_is_laid_out_in_windows():
    text = fake_text()
    inputs = text.inputs(4, 32, 250, layer=3, sequence=1, device="cpu")
    windows = inputs.k[:, 0].float()
    # Layer 3 is layer 1 of the second round, so sequence 1 begins with window 2; the first 50 tokens are cut off.
    assert windows.tolist() == [3] * 50 + [1] * 100 + [2] * 100
    assert (inputs.k[:, 1].float() == 2).all() and (inputs.q[..., 0].float() == 2).all()
    assert inputs.k_scale[:50].tolist() == list(range(50, 100))
    assert inputs.weights[0].tolist() == list(range(0, 64, 2))
    assert inputs.lengths.tolist() == [247, 248, 249, 250]
    short = text.inputs(4, 64, 30, layer=0, sequence=0, device="cpu")
    assert short.k_scale.tolist() == list(range(70, 100))
    with pytest.raises(ValueError, match="text of 300 tokens"):
        text.inputs(4, 64, 301, layer=0, sequence=0, device="cpu")
    with pytest.raises(ValueError, match="8 rows, not 9"):
        text.inputs(9, 64, 100, layer=0, sequence=0, device="cpu")


def test_text_makes_layers():
    case = Case("prefill", "prefill", (150,), 4, 64)
    (layer,) = make_layers(case, "text", 1, seed=0, text=fake_text())
    assert len(layer.sequences[0].k) == 150 and len(layer.q) == 4


def test_work():
    case = Case("x", "prefill", (1000, 100), 2, 64)
    assert work.lengths(case) == [999, 1000, 99, 100]
    assert work.operations(case, None, 64, 0, 0) == 256 * 64 * (999 + 1000 + 99 + 100)
    # 15 complete pages are two blocks of 8, one page is one.
    routed = 8 * 2198 + 64 * (2 + 2 + 1 + 1)
    assert work.operations(case, "pooled", 8, 512, 0) == 256 * routed
    sampled = 8 * 2198 + 64 * (249 + 250 + 99 + 100)
    assert work.operations(case, "sampled", 8, 0, 0) == 256 * sampled
    assert work.bytes_moved(case, "sampled", 2048) == work.bytes_moved(case, None, 2048)
    again = 64 * (300 + 300 + 99 + 100)
    assert work.operations(case, "pooled", 8, 512, 300) == 256 * (routed + again)
    moved = 1100 * 132 + 4 * 64 * 132 + 4 * 2048 * 4
    assert work.bytes_moved(case, None, 2048) == moved
    assert work.bytes_moved(case, "pooled", 2048) == moved + 17 * 256
    rates = work.rates(10**12, 10**9, 2.0, 1000.0)
    assert rates == {"tflops": 500.0, "gbps": 500.0, "copy_share": 0.5}


def make_args(*arguments):
    return bench_indexer.parse_arguments(list(arguments))


DEVICE = {"device": "X 1", "copy_gbps": 2000.0, "versions": {}, "date": "2026-01-01"}


def make_record(keys="gaussian", variant="misa", ms=1.0, base=2.0, checks=None):
    """A record as a run writes it."""
    case, args = CASES[0], make_args()
    checks = {"well_formed": True} if checks is None else checks
    spreads = {"dsa": base, variant: ms}
    done = SimpleNamespace(
        case=case,
        errors={},
        variants={variant: None} | {"dsa": SimpleNamespace(path="called")},
        checks={"dsa": {"selection_problem": "dropped"}, variant: checks},
        workspace={"dsa": 10, variant: 5},
        layers=[0] * 4,
        times_of=lambda name, extras=False: (
            {} if extras else {"total": Spread(spreads[name], 0.9, 1.1)}
        ),
        host_ms=lambda name: None if name == "dsa" else 0.125,
    )
    description = run.describe(case, keys, variant, args, DEVICE)
    return run.record(done, description, args)


def test_a_record():
    record = make_record()
    assert record["keys"] == "gaussian" and record["router"] == "sampled"
    assert record["outcome"] == "exact" and record["exact"] is True
    assert record["speedup"] == 2 and record["baseline_exact"] is False
    assert record["gbps"] == pytest.approx(
        work.bytes_moved(CASES[0], "sampled", 2048) / 1e6
    )
    assert record["copy_share"] == record["gbps"] / 2000
    line = report.line(record)
    assert f"{record['tflops']:.0f}" in line and f"{record['copy_share']:.0%}" in line
    assert record["host_ms"] == 0.125 and "125.0 us" in line
    assert record["baseline_host_ms"] is None
    names = {name.strip() for name in report.HEADER.split("  ") if name.strip()}
    assert "variant" in names and "TFLOPS" in report.HEADER


def test_the_time_of_the_host(monkeypatch):
    """Of one call; what the device still has to do is waited for before, not within."""
    now, clock = [0.0], SimpleNamespace(perf_counter=lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: spend(5.0))
    runs = {"a": lambda i: spend(0.001), "b": lambda i: spend(0.002 * (i < 5))}
    times = timing.host_times(runs, 3)
    assert times["a"].median == pytest.approx(1.0)
    assert times["b"].median == pytest.approx(1.0)


def test_outcomes():
    wrong = make_record(checks={"selection_problem": "bad"})
    assert wrong["outcome"] == "wrong" and wrong["exact"] is False
    assert "wrong: selection_problem bad" in report.why_not_exact(wrong)
    dropped = make_record(variant="dsa", checks={"selection_problem": "dropped"})
    assert dropped["outcome"] == "production inexact"
    failed = run.failure(run.describe(CASES[0], "few", "misa", make_args(), DEVICE), "no")  # fmt: skip
    assert failed["outcome"] == "failed" and "ERROR no" in report.line(failed)
    assert report.failures([wrong, dropped, failed, make_record()]) == [wrong, failed]


def test_records_replace_those_of_the_same(tmp_path):
    path = tmp_path / "out.json"
    report.write([make_record(), make_record("rare")], path)
    report.write([make_record("rare", ms=3.0)], path)
    read = json.loads(path.read_text())
    assert [(r["keys"], r["ms"]["total"]) for r in read] == [("gaussian", 1), ("rare", 3)]  # fmt: skip
    report.write([make_record() | {"active_heads": 4}], path)
    assert [r["active_heads"] for r in json.loads(path.read_text())] == [8, 8, 4]


def test_the_worst_keys():
    records = [
        make_record("gaussian", ms=1.0),
        make_record("rare", ms=5.0),
        make_record("few", ms=1.2),
        make_record("gaussian", variant="dsa-misa-select", ms=1.0),
    ]
    failed = run.describe(CASES[0], "equal", "misa", make_args(), DEVICE)
    records.append(run.failure(failed, "no"))
    ((key, (usual, slow)),) = report.worst(records, "gaussian").items()
    assert key == (CASES[0].name, "misa", "sampled")
    assert (usual["keys"], slow["keys"]) == ("gaussian", "rare")
    text = report.worst_keys(records, "gaussian")
    assert "rare" in text and "5.00 times" in text and "0.40 instead of 2.00" in text
    assert [r["keys"] for r in report.lowest_speedups(records)] == ["rare"]
    assert report.worst_keys(records[:1], "gaussian") == ""


def test_arguments():
    assert make_args().keys == ["gaussian"]
    assert make_args("--keys", "*").keys == list(KEYS)
    assert make_args("--keys", "r*", "text").keys == ["text", "rare", "rising", "runs"]
    with pytest.raises(SystemExit):
        make_args("--keys", "few", "nothing")
    with pytest.raises(SystemExit):
        make_args("--cases", "nothing")


def test_all_cases_are_run_on_all_keys_and_written_one_by_one(monkeypatch, tmp_path):
    calls, written = [], []

    def run_case(case, keys, args, device, text):
        calls.append((case.name, keys, text))
        return [case.name + keys]

    monkeypatch.setattr(bench_indexer, "run_case", run_case)
    monkeypatch.setattr(report, "write", lambda records, path: written.append(records))
    args = Namespace(cases_chosen=CASES[:2], keys=["few", "text"])
    records = bench_indexer.run_all(args, DEVICE, "a text", tmp_path)
    expected = [(case.name, k, "a text") for case in CASES[:2] for k in ("few", "text")]
    assert calls == expected
    assert records == [part for results in written for part in results]


def work_of(kernel, candidates=0):
    return profile.work_of(kernel, profile.Call(PREFILL, 4, BLOCK, candidates, 64))


def test_what_a_kernel_has_to_do():
    """Two sequences of 700 and 300 tokens with six rows each, 32 heads of which 4 slots score."""
    rows, seen, keys = 12, 6 * 700 - 15 + 6 * 300 - 15, 1000 * 132
    slots = rows * 4 * 132
    assert work_of("score_planes_4_kernel") == (
        2 * 128 * 4 * seen,
        slots + keys + seen // 4,
    )
    # Of so short contexts one token in 8 is a sample.
    samples = slots + keys // 8 + seen // 8 * 4
    assert work_of("score_samples_4_kernel") == (2 * 128 * 4 * (seen // 8), samples)
    assert work_of("threshold_kernel") == (0, seen // 8 * 4)
    assert work_of("sample_kernel") == (0, 2 * (keys // 8))
    assert work_of("select_4_3072_kernel") == (0, seen // 4 + rows * 64 * 4)
    # The samples that the last row of a sequence looks at serve the others too.
    counts = [len(reference.sample_positions(n)) for n in work.lengths(PREFILL)]
    assert counts[5] == 175 and counts[11] == 150
    queries = rows * 32 * 132
    assert work_of("route_sampled_32_kernel") == (
        2 * 128 * 32 * sum(counts),
        queries + (175 + 150) * 132 + rows * (3 * 4 + 132),
    )
    assert work_of("rerank_32_4096_1_kernel", candidates=128) == (
        2 * 128 * 32 * rows * 128,
        queries + keys + rows * (128 + 64) * 4,
    )
    # The first stage writes the candidates.
    assert work_of("select_4_3072_kernel", candidates=128)[1] == seen // 4 + rows * 512
    logits = 2 * 128 * 32 * seen, queries + keys + 4 * seen
    assert work_of("void deep_gemm::sm90_fp8_mqa_logits<...>(...)") == logits
    assert work_of("fast_topk_transform") == (0, 4 * seen + rows * 64 * 4)
    # 10 and 4 complete pages are 5 and 2 blocks of 128 tokens.
    pooled = work_of("route_32_kernel")
    assert pooled[1] == queries + (5 + 2) * 256 + rows * 4 * 4
    assert work_of("vectorized_elementwise_kernel") is None


def test_a_profile():
    device = {"copy_gbps": 1000.0, "fp8_tflops": 1.0}
    call = profile.Call(DECODE, 4, 0, 0, 64)
    kernels = [("decode_score_8_4_kernel", 1, 50.0), ("fill", 2, 3.0)]
    known, unknown = profile.describe(kernels, call, device)
    assert known["operations"] == 2 * 128 * 4 * 1040
    assert known["bytes"] == 3 * 4 * 132 + 1040 * 132 + 4 * 1040
    at_rates = known["us_at_rates"]
    assert at_rates["bytes"] == pytest.approx(known["bytes"] / 1e6)
    assert at_rates["operations"] == pytest.approx(known["operations"] / 1e6)
    # 1.06 of 50 us.
    assert profile.line(known).split()[4:6] == ["1.1", "2%"]
    assert unknown["us_at_rates"] is None and "-  fill" in profile.line(unknown)


def test_a_kernel_that_waits_for_another_counts_from_its_end():
    kernels = [("b", 4, 12), ("a", 0, 10), ("c", 20, 25), ("a", 11, 13)]

    assert timing.added_times(kernels) == [("a", 2, 11), ("c", 1, 5), ("b", 1, 2)]
