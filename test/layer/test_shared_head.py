"""The definition of the shared head: against Python numbers, in every case that the formulas leave to a rule, and what must
follow from it."""

import math
import operator
import struct
from fractions import Fraction

import pytest
import torch

from sglang.srt.layers.misa import reference
from sglang.srt.layers.misa.testing.inputs import KINDS, Inputs, make_inputs

E4M3 = sorted(
    (value, code)
    for code, value in enumerate(
        torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist()
    )
    if not math.isnan(value) and code != 128  # -0
)
INF = float("inf")


def float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def to_e4m3(x: float) -> float:
    """The nearest value; of two, the one whose last bit is 0."""
    return min(E4M3, key=lambda entry: (abs(entry[0] - x), entry[1] % 2))[0]


def naive_positions(length):
    """In each of the strides, as far into it as the hash of its number is into 32 bits."""
    stride = 1
    while length > 256 * stride:
        stride *= 2
    shares = [
        Fraction((i + 1) * 2654435761 % 2**32, 2**32) for i in range(length // stride)
    ]
    return [stride * i + int(stride * share) for i, share in enumerate(shares)]


def naive_samples(inputs, t, j):
    """x_j on S for row t, in numbers that float32 holds."""
    positions = naive_positions(int(inputs.lengths[t]))
    query, scales = inputs.q[t, j].tolist(), inputs.k_scale.tolist()
    dots = {s: sum(map(operator.mul, query, inputs.k[s].tolist())) for s in positions}
    return [float32(scales[s] * float32(dot)) for s, dot in dots.items()]


def naive_line(xs, number):
    """Slope and variance of the rest, in arithmetic of `number`: float, or Fraction, which does not round."""
    if not xs or all(x <= 0 for x in xs):
        return number(0), number(0)
    if all(x > 0 for x in xs):
        return number(1), number(0)

    def mean(values):
        total = number(0)
        for value in values:
            total += value
        return total / len(values)

    xs = [number(x) for x in xs]
    ys = [max(x, number(0)) for x in xs]
    mean_x, mean_y = mean(xs), mean(ys)
    slope = mean([(y - mean_y) * (x - mean_x) for x, y in zip(xs, ys)])
    slope /= mean([(x - mean_x) * (x - mean_x) for x in xs])
    rest = [y - slope * x for x, y in zip(xs, ys)]
    mean_rest = mean(rest)
    return slope, mean([(r - mean_rest) * (r - mean_rest) for r in rest])


def naive_route(inputs, t, active_heads):
    """Heads, shared query and its scale of row t, in Python floats rounded where the definition rounds."""
    q, weights = inputs.q[t].tolist(), inputs.weights[t].tolist()
    slopes, estimates = [], []
    for j, w in enumerate(weights):
        slope, rest = naive_line(naive_samples(inputs, t, j), float)
        slopes.append(float32(slope))
        estimates.append(float32(abs(w) * math.sqrt(rest)))
    order = sorted(range(len(q)), key=lambda j: (-estimates[j], j))
    heads = sorted(order[: active_heads - 1])
    u = [0.0] * 128
    for j, w in enumerate(weights):
        if j not in heads:
            factor = float32(slopes[j] * w)
            u = [float32(a + float32(factor * b)) for a, b in zip(u, q[j])]
    largest, scale = max(abs(a) for a in u), 2.0**-126
    while largest > 448 * scale:
        scale *= 2
    scale = scale if largest else 1.0
    return heads, [to_e4m3(a / scale) for a in u], scale


def hand_made(xs, weights, length=None) -> Inputs:
    """One query whose head j has x_j = xs[j] on the tokens: whole numbers of at most 16, in a dimension of their own."""
    heads, tokens = len(xs), len(xs[0])
    q, k = torch.zeros(1, heads, 128), torch.zeros(tokens, 128)
    q[0, range(heads), range(heads)] = 1
    k[:, :heads] = torch.tensor(xs, dtype=torch.float32).T
    q, k = q.to(torch.float8_e4m3fn), k.to(torch.float8_e4m3fn)
    lengths = torch.tensor([tokens if length is None else length])
    weights = torch.tensor([weights], dtype=torch.float32)
    return Inputs(q, weights, k, torch.ones(tokens), lengths)


def taken_alone(inputs, t, more=0):
    """Row t with the keys that it sees and `more` behind them."""
    end = int(inputs.lengths[t]) + more
    rows = (x[t : t + 1] for x in (inputs.q, inputs.weights))
    return Inputs(
        *rows, inputs.k[:end], inputs.k_scale[:end], inputs.lengths[t : t + 1]
    )


def at_lengths(inputs, lengths):
    """As many of the queries, at these lengths."""
    lengths = torch.tensor(lengths)
    count = len(lengths)
    return inputs._replace(
        q=inputs.q[:count], weights=inputs.weights[:count], lengths=lengths
    )


def route(inputs, active_heads):
    """-> heads, shared_q in float32, shared_scale."""
    heads, shared_q, shared_scale = reference.route_sampled(*inputs, active_heads)
    assert shared_q.dtype == torch.float8_e4m3fn
    assert shared_scale.dtype == torch.float32
    return heads, shared_q.float(), shared_scale


def test_sampled_positions():
    assert reference.sample_positions(0).tolist() == []
    for length in [*range(1, 2100), 4096, 4097, 33792, 131071, 131072, 131073]:
        positions = reference.sample_positions(length).tolist()
        assert positions == naive_positions(length)
        assert len(positions) in (range(128, 257) if length > 256 else [length])
        assert positions[-1] < length and positions[0] > 0 or length <= 256
    for length, count, stride in (
        *((255, 255, 1), (256, 256, 1), (257, 128, 2), (258, 129, 2), (511, 255, 2)),
        *((512, 256, 2), (513, 128, 4), (131072, 256, 512), (131073, 128, 1024)),
    ):
        positions = reference.sample_positions(length)
        assert (positions // stride).tolist() == list(range(count))
    # A text of lines of 64 tokens is not seen in one phase.
    phases = reference.sample_positions(20000) % 64
    assert phases.bincount(minlength=64).max() <= 4


LENGTHS = [1, 2, 64, 255, 256, 257, 258, 511, 512, 513, 600]


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_formula(kind):
    """Bit for bit in Python's own floats."""
    inputs = make_inputs(kind, rows=len(LENGTHS), heads=4, tokens=600)
    inputs = at_lengths(inputs, LENGTHS)
    heads, shared_q, shared_scale = route(inputs, 3)
    for t in range(len(LENGTHS)):
        expected = naive_route(inputs, t, 3)
        given = heads[t].tolist(), shared_q[t].tolist(), shared_scale[t].item()
        assert given == expected, LENGTHS[t]


@pytest.mark.parametrize("kind", ["random", "rising", "huge", "extremes"])
def test_moments_are_those_of_exact_arithmetic(kind):
    inputs = make_inputs(kind, rows=4, heads=4, tokens=300)
    inputs = at_lengths(inputs, [7, 100, 256, 300])
    slopes, estimates = reference.slopes_and_estimates(*inputs)
    for t in range(4):
        for j in range(4):
            xs = naive_samples(inputs, t, j)
            slope, rest = naive_line(xs, Fraction)
            assert slopes[t, j].item() == pytest.approx(float(slope), rel=1e-6)
            assert 0 <= slope <= 1 and 0 <= slopes[t, j] <= 1
            # What a difference leaves of float64 is relative to what it is taken of.
            size = abs(inputs.weights[t, j].item()) * max(map(abs, xs))
            expected = abs(inputs.weights[t, j].item()) * math.sqrt(rest)
            assert estimates[t, j].item() == pytest.approx(
                expected, rel=1e-6, abs=1e-12 * size
            )


def test_slopes_and_estimates_by_hand():
    xs = [
        [1, -1, 1, -1],  # a line says all of a head that takes two values
        [2, 2, 4, 6],  # all positive
        [-1, 0, -3, 0],  # none positive
        [3, 0, 0, 1],  # none negative: relu is the line itself, though one x is 0
        [2, -2, 0, 0],
    ]
    slopes, estimates = reference.slopes_and_estimates(*hand_made(xs, [1] * 4 + [-3]))
    assert slopes.tolist() == [[0.5, 1, 0, 1, 0.5]]
    # relu(x) - x / 2 is 1, 1, 0, 0 for the last one.
    assert estimates.tolist() == [[0, 0, 0, 0, 1.5]]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("tokens", [1, 3, 255, 700])
def test_equal_keys_have_no_variance(sign, tokens):
    """Sums of thirds would leave a rest of rounding errors; the signs do not."""
    inputs = make_inputs("equal", rows=1, heads=6, tokens=tokens)
    inputs = inputs._replace(
        q=(sign * inputs.k[:1].float()).to(torch.float8_e4m3fn).expand(1, 6, -1),
        k_scale=torch.full((tokens,), 1 / 3),
    )
    slopes, estimates = reference.slopes_and_estimates(*inputs)
    assert (slopes == (sign > 0)).all() and not estimates.any()
    assert reference.route_sampled(*inputs, 4)[0].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_heads_that_always_fire_are_one_head(tokens):
    """All x > 0: u is sum w q, here a number of FP8 exactly, and the shared head alone gives DSA's scores."""
    inputs = make_inputs("random", rows=1, heads=4, tokens=tokens)
    inputs = inputs._replace(
        q=inputs.q[:, :1].float().abs().to(torch.float8_e4m3fn).expand(1, 4, -1),
        k=inputs.k.float().abs().to(torch.float8_e4m3fn),
        weights=torch.tensor([[0.5, -1.5, 2.0, -2.0]]),
    )
    heads, shared_q, shared_scale = route(inputs, 1)
    assert heads.shape == (1, 0)
    assert torch.equal(shared_q * shared_scale, -inputs.q[:, 0].float())
    selected = reference.misa_shared(*inputs, topk=20, active_heads=1)
    assert torch.equal(selected, reference.dsa(*inputs, topk=20))


def test_heads_that_never_fire():
    inputs = make_inputs("zeros", rows=3, heads=6, tokens=300)
    heads, shared_q, shared_scale = route(inputs, 3)
    assert heads.tolist() == [[0, 1]] * 3
    assert not shared_q.any() and shared_scale.tolist() == [1] * 3
    selected = reference.misa_shared(*inputs, topk=50, active_heads=3)
    assert selected.tolist() == [list(range(50))] * 3


def test_gates_of_zero():
    inputs = make_inputs("random", rows=3, heads=6, tokens=300)
    for zero in (0.0, -0.0):
        closed = inputs._replace(weights=torch.full_like(inputs.weights, zero))
        heads, shared_q, shared_scale = route(closed, 4)
        assert heads.tolist() == [[0, 1, 2]] * 3
        assert not shared_q.any() and shared_scale.tolist() == [1] * 3
        selected = reference.misa_shared(*closed, topk=50, active_heads=4)
        assert selected.tolist() == [list(range(50))] * 3


def test_rows_that_see_nothing():
    inputs = at_lengths(make_inputs("random", 3, heads=6, tokens=300), [0, 300, 0])
    heads, shared_q, shared_scale = route(inputs, 3)
    assert heads[::2].tolist() == [[0, 1]] * 2
    assert not shared_q[::2].any() and shared_scale[::2].tolist() == [1, 1]
    for options in ({}, {"rerank_candidates": 80, "taken": 20}):
        selected = reference.misa_shared(*inputs, topk=50, active_heads=3, **options)
        assert (selected[::2] == -1).all() and (selected[1] >= 0).all()


@pytest.mark.parametrize("tokens", [1, 63, 64, 99, 100])
@pytest.mark.parametrize("active_heads", [1, 3, 8])
def test_short_rows_select_everything(tokens, active_heads):
    inputs = make_inputs("random", rows=1, heads=8, tokens=tokens)
    expected = list(range(tokens)) + [-1] * (100 - tokens)
    for options in ({}, {"rerank_candidates": 120, "taken": 60}):
        (selected,) = reference.misa_shared(
            *inputs, topk=100, active_heads=active_heads, **options
        ).tolist()
        assert selected == expected


@pytest.mark.parametrize("kind", KINDS)
def test_all_heads_are_dsa(kind):
    inputs = make_inputs(kind, rows=20, heads=8, tokens=500)
    selected = reference.misa_shared(*inputs, topk=100, active_heads=8)
    assert torch.equal(selected, reference.dsa(*inputs, topk=100))


def test_equal_estimates_go_to_the_lower_head():
    twins = make_inputs("twins", rows=10, heads=8, tokens=300)
    for row in reference.route_sampled(*twins, 4)[0].tolist():
        assert all(head - 1 in row for head in row if head % 2)


@pytest.mark.parametrize(
    "largest, scale",
    [
        (0.0, 1),
        (448.0, 1),
        (math.nextafter(448, 0), 1),
        (float32(448.0001), 2),
        (1.0, 2.0**-8),
        (0.875, 2.0**-9),
        (float32(0.8750001), 2.0**-8),
        (3e38, 2.0**120),
        (2.0**-120, 2.0**-126),
        (2.0**-149, 2.0**-126),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_scale_is_the_smallest_power_of_two(largest, scale, sign):
    q = torch.zeros(1, 1, 128)
    q[0, 0, 3], q[0, 0, 5] = sign, sign / 2
    weights = torch.tensor([[largest]])
    none = torch.empty(1, 0, dtype=torch.int64)
    shared_q, shared_scale = reference.shared_query(
        q.to(torch.float8_e4m3fn), weights, torch.ones(1, 1), none
    )
    assert shared_scale.item() == scale
    wanted = to_e4m3(sign * float32(largest) / scale)
    assert shared_q[0, 3].item() == wanted and abs(wanted) <= 448
    assert shared_q[0, 5].item() == to_e4m3(sign * float32(largest / 2) / scale)


def test_the_shared_query_is_of_the_other_heads_and_keeps_the_signs_of_their_gates():
    q = torch.zeros(1, 3, 128)
    q[0, 0, 0], q[0, 1, 1], q[0, 2, 2] = 2, 4, 8
    weights = torch.tensor([[1.0, -1.0, 100.0]])
    slopes = torch.tensor([[0.5, 0.25, 1.0]])
    shared_q, shared_scale = reference.shared_query(
        q.to(torch.float8_e4m3fn), weights, slopes, torch.tensor([[2]])
    )
    u = (shared_q.float() * shared_scale[:, None])[0]
    assert u[:3].tolist() == [1, -1, 0] and not u[3:].any()


def test_scores_of_a_shared_head_have_no_relu():
    inputs = hand_made([[1, -1, 2], [-2, 3, -4]], [1, 1])
    q, weights, k, k_scale, _ = inputs
    shared_q = q[:, 1]
    scores = reference.token_scores(
        q[:, :1], weights[:, :1], k, 10 * k_scale, shared_q, torch.tensor([0.5])
    )
    assert scores.tolist() == [[10 * (1 - 1), 10 * 1.5, 10 * (2 - 2)]]


@pytest.mark.parametrize("active_heads", [1, 2, 5])
def test_selects_by_its_scores(active_heads):
    inputs = make_inputs("random", rows=4, heads=6, tokens=300)
    heads, shared_q, shared_scale = route(inputs, active_heads)
    selected = reference.misa_shared(*inputs, topk=60, active_heads=active_heads)
    for t, length in enumerate(inputs.lengths.tolist()):
        total = torch.zeros(length)
        k = inputs.k[:length].double()
        for j in heads[t]:
            dots = (k @ inputs.q[t, j].double()).float()
            total += inputs.weights[t, j] * dots.relu()
        total += shared_scale[t] * (k @ shared_q[t].double()).float()
        scores = (total * inputs.k_scale[:length]).tolist()
        order = sorted(range(length), key=lambda s: (-scores[s], s))
        assert selected[t].tolist() == sorted(order[:60])


OPTIONS = [
    {},
    {"active_heads": 1},
    {"rerank_candidates": 150},
    {"rerank_candidates": 150, "taken": 40},
    {"rerank_candidates": 150, "taken": 40, "init_tokens": 3, "local_tokens": 60},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_row_depends_on_its_prefix_only(options):
    """Not on the other rows, nor on the keys behind what it sees."""
    rng = torch.Generator().manual_seed(0)
    options = {"active_heads": 3, **options}
    for seed in range(2):
        inputs = make_inputs("random", rows=12, heads=8, tokens=600, seed=seed)
        lengths = torch.randint(1, 601, (12,), generator=rng)
        inputs = inputs._replace(lengths=lengths)
        together = reference.misa_shared(*inputs, topk=100, **options)
        routed = reference.route_sampled(*inputs, options["active_heads"])
        for t in range(12):
            for more in (0, 600 - int(lengths[t])):
                alone = taken_alone(inputs, t, more)
                selected = reference.misa_shared(*alone, topk=100, **options)
                assert torch.equal(selected, together[t : t + 1])
                again = reference.route_sampled(*alone, options["active_heads"])
                for one, of_all in zip(again, routed):
                    assert torch.equal(one.float(), of_all[t : t + 1].float())


@pytest.mark.parametrize("power", [-20, -1, 3, 20])
def test_scales_by_a_power_of_two_change_nothing(power):
    inputs = make_inputs("random", rows=5, heads=8, tokens=500)
    scaled = inputs._replace(k_scale=inputs.k_scale * 2.0**power)
    assert torch.equal(
        reference.misa_shared(*inputs, topk=100, active_heads=3),
        reference.misa_shared(*scaled, topk=100, active_heads=3),
    )
    slopes, estimates = reference.slopes_and_estimates(*inputs)
    same, larger = reference.slopes_and_estimates(*scaled)
    assert torch.equal(slopes, same) and torch.equal(estimates * 2.0**power, larger)
    for one, other in zip(route(inputs, 3), route(scaled, 3)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
@pytest.mark.parametrize("where", ["weights", "k_scale", "q"])
@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_no_number_leads_to_a_position_that_is_none(bad, where, options):
    inputs = make_inputs("random", rows=4, heads=6, tokens=300)
    spoilt = getattr(inputs, where).float()
    spoilt.view(-1)[:: 7 if where == "k_scale" else 5] = bad
    if where == "q":
        spoilt = spoilt.nan_to_num(posinf=float("nan"), neginf=float("nan"))
    inputs = inputs._replace(**{where: spoilt.to(getattr(inputs, where).dtype)})
    options = {"active_heads": 3, **options}
    heads, *_ = reference.route_sampled(*inputs, options["active_heads"])
    for row in heads.tolist():
        assert len(set(row)) == options["active_heads"] - 1 and set(row) <= {*range(6)}
    selected = reference.misa_shared(*inputs, topk=80, **options)
    for row, length in zip(selected.tolist(), inputs.lengths.tolist()):
        assert len(set(row)) == 80 and min(row) >= 0 and max(row) < length


def naive_band(inputs, t, topk, taken, candidates, forced, routed_scores):
    """T, and the best of ranks taken + 1 .. candidates."""
    length = int(inputs.lengths[t])
    by_all = reference.token_scores(*(x[t : t + 1] for x in inputs[:2]), *inputs[2:4])
    routed, by_all = routed_scores[t].tolist(), by_all[0].tolist()
    for s in forced(length):
        routed[s] = by_all[s] = INF
    order = sorted(range(length), key=lambda s: (-routed[s], s))
    band = sorted(order[taken:candidates], key=lambda s: (-by_all[s], s))
    chosen = sorted(order[:taken] + band[: topk - min(taken, length)])
    return chosen + [-1] * (topk - len(chosen))


@pytest.mark.parametrize("kind", ["random", "equal", "zeros", "twins"])
@pytest.mark.parametrize("taken", [0, 1, 30, 99, 100])
@pytest.mark.parametrize("forced", [{}, {"init_tokens": 3, "local_tokens": 4}])
@pytest.mark.parametrize("router", ["sampled", "pooled"])
def test_re_ranking_a_band(kind, taken, forced, router):
    inputs = at_lengths(make_inputs(kind, 4, heads=8, tokens=400), [50, 120, 180, 400])
    if router == "sampled":
        heads, *shared = reference.route_sampled(*inputs, 3)
        select, more = reference.misa_shared, {}
    else:
        means = reference.page_means(inputs.k, inputs.k_scale)
        rows = inputs.q, inputs.weights, means, inputs.lengths
        heads, shared = reference.route(*rows, 3, 64), []
        select, more = reference.misa, {"block_size": 64}
    scored = reference.of_heads(inputs.q, inputs.weights, heads)
    routed = reference.token_scores(*scored, inputs.k, inputs.k_scale, *shared)
    numbers = dict(active_heads=3, rerank_candidates=160, taken=taken)
    selected = select(*inputs, topk=100, **numbers, **more, **forced)

    def always(length):
        first = range(min(length, forced.get("init_tokens", 0)))
        return [*first, *range(length - forced.get("local_tokens", 0), length)]

    for t in range(4):
        expected = naive_band(inputs, t, 100, taken, 160, always, routed)
        assert selected[t].tolist() == expected


def test_the_ends_of_the_band():
    inputs = make_inputs("random", rows=5, heads=8, tokens=500)

    def select(**options):
        return reference.misa_shared(*inputs, topk=100, active_heads=3, **options)

    single = select()
    assert torch.equal(select(rerank_candidates=200, taken=100), single)
    assert torch.equal(select(rerank_candidates=100), single)
    assert torch.equal(select(rerank_candidates=500), reference.dsa(*inputs, topk=100))
    assert not torch.equal(select(rerank_candidates=200, taken=50), single)


@pytest.mark.parametrize("taken", [0, 2, 30])
def test_forced_tokens_are_always_selected(taken):
    """Those whose scores are the lowest, and more of them than are taken."""
    inputs = make_inputs("random", rows=5, heads=4, tokens=400)
    worst = dict(init_tokens=3, local_tokens=4)
    for options in ({}, {"rerank_candidates": 120, "taken": taken}):
        options = {"active_heads": 2, **options}
        selected = reference.misa_shared(*inputs, topk=60, **options, **worst)
        free = reference.misa_shared(*inputs, topk=60, **options)
        for row, other, length in zip(
            selected.tolist(), free.tolist(), inputs.lengths.tolist()
        ):
            forced = {0, 1, 2, *range(length - 4, length)}
            assert forced <= set(row) and len(set(row)) == 60
            assert not forced <= set(other)
