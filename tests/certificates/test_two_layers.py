"""The proven bound for two saturating layers: lines, adjoints, a kernel's gain, closed forms, features that exist."""

import math
import time
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from strategies import normal

import meanfield as mf
from meanfield.certificates import gain, two_layers
from meanfield.certificates.compositions import Compositions
from meanfield.certificates.saturating import SATURATING

H = list(SATURATING)
PENALTY = mf.Penalty(source=1e-2, readout=2e-2, input=5e-3)
PRICED = mf.Penalty(source=0.01, input=0.02)
ROUGH = (  # everything that moves an index
    mf.Conv((2, 1), padding=(1, 0), stride=(1, 2), activation="tanh", bias=True, pooling="average", pool_size=(2, 1)),
    mf.Conv((1, 2), padding=1, activation="erf", pooling="average"),
)
PLAIN = (mf.Conv(2, activation="erf"), mf.Conv((1, 2), activation="hardtanh"))


def problem_of(layers, outputs=1, count=3, seed=0, penalty=PENALTY, channels=1):
    arch = mf.Architecture((channels, 4, 4), layers, outputs=outputs)
    targets = torch.sign(normal((count, outputs), seed + 1))
    return mf.Problem(arch, normal((count, channels, 4, 4), seed), targets, "squared", penalty)


def features_of(problem, output):
    features = two_layers.Features.of(problem)
    return features, features.response(output, 0.02)


@pytest.mark.parametrize("name", H)
def test_how_far_from_a_line(name):
    h = SATURATING[name]
    x = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    for theta in (1e-3, 0.3, 0.9, 1.0):
        for reach in (0.0, 0.2, 1.0, 1.7, 6.0):
            theta_, reach_ = torch.tensor(theta * h.slope).double(), torch.tensor(reach).double()
            inside = reach * x
            worst = (h.function(inside) - theta_ * inside).abs().max()
            assert float(h.apart(theta_, reach_)) == pytest.approx(float(worst), abs=1e-4 * reach)
            assert h.apart(theta_, reach_) >= worst - 1e-12


@pytest.mark.parametrize("name", H)
def test_chords_hold_h_and_no_line_of_their_slope_is_nearer(name):
    h, x, reach = SATURATING[name], 2 * normal((60, 1), 1), 2 * normal((60, 1), 2).abs()
    values, slopes, apart = h.chords(x, reach)
    d = reach * torch.linspace(-1, 1, 4001, dtype=torch.float64)
    ends = h.function(torch.cat([x - reach, x + reach], 1))
    torch.testing.assert_close(slopes, ends.diff(dim=1) / (2 * reach))
    away = h.function(x + d) - values - slopes * d
    assert bool((away.abs() <= apart + 1e-14).all())
    for nearest in (away.amax(1), -away.amin(1)):  # at both sides: a smaller distance or another value would not do
        torch.testing.assert_close(nearest, apart[:, 0], atol=1e-3, rtol=1e-2)
    far = torch.tensor([1e15, 1e16, 1e17, 1e200], dtype=torch.float64)  # the slope is below the rounding of 1
    assert h.chords(0 * far, far)[2].tolist() == pytest.approx([1.0] * 4, rel=1e-12)
    touched = torch.tensor([0.1, 0.5, 0.99], dtype=torch.float64) * h.slope
    if name != "hardtanh":
        at = h.touch(touched)
        torch.testing.assert_close((h.function(at + 1e-5) - h.function(at - 1e-5)) / 2e-5, touched, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layers", [ROUGH, PLAIN])
def test_the_response_of_a_kernel_is_what_a_linear_second_layer_reads(layers):
    problem = problem_of(layers, outputs=2, channels=2)
    output, kernel = normal((3, 2), 3), normal((1, 2, *layers[0].kernel), 4)
    bias = normal((1,), 5) if layers[0].bias else None
    linear = replace(layers[1], activation="identity")
    arch = replace(problem.architecture, layers=(layers[0], linear))
    sought = []
    for offset in range(linear.offsets):
        second = torch.zeros(1, 1, *linear.kernel, dtype=torch.float64)
        second.view(-1)[offset] = 1.0
        one = torch.ones(1, dtype=torch.float64)
        network = mf.ParticleNetwork(arch, [one, one], [kernel, second], torch.zeros(2, 1).double(), [bias, None])
        read = arch.readout_features(network.features(problem.inputs)[-1])
        sought.append(output.T @ read[:, 0])
    features, response = features_of(problem, output)
    flat = kernel.flatten() if bias is None else torch.cat([kernel.flatten(), bias])
    torch.testing.assert_close(response(flat[None])[0], torch.stack(sought).norm())
    values = arch.layers[0].h.function(response.patches @ flat)
    torch.testing.assert_close((values @ response.weights).view(2, -1), torch.stack(sought, 1))
    each = features.read_of(flat[None], 0.02)[0] * response.price(flat.norm())
    torch.testing.assert_close(output.T @ each, torch.stack(sought, 1))


@pytest.mark.parametrize("name", H)
@pytest.mark.parametrize("dimension", [1, 2])
def test_gain_holds_the_maximum(name, dimension):
    patches, weights = normal((12, dimension), 1), normal((12, 3), 2)
    response = gain.Response(SATURATING[name], patches, weights, PRICED, 0.03)
    found = gain.largest(response, torch.zeros(1, dimension).double(), math.inf, 1e-3)
    line = torch.linspace(-40, 40, 4001 if dimension == 1 else 801, dtype=torch.float64)
    kernels = torch.cartesian_prod(*[line] * dimension).view(-1, dimension)
    best = float(response.ratios(kernels).max())
    assert best <= found.upper
    assert found.upper <= (1 + 1e-3) * found.lower * (1 + 1e-12)
    assert found.lower == pytest.approx(float(response.ratios(found.argmax[None])), rel=1e-12)
    assert found.lower >= best * (1 - 1e-3)


@pytest.mark.parametrize("name", H)
def test_boxes_bound_the_kernels_inside(name):
    response = gain.Response(
        SATURATING[name], normal((9, 3), 1), normal((9, 2), 2), mf.Penalty(source=0.01, input=0.02), 0.03
    )
    for size in (0.01, 0.1, 1.0, 5.0):
        middles, halves = 3 * normal((200, 3), 3), size * normal((200, 3), 4).abs()
        inside = middles + halves * (
            2 * torch.rand(64, 200, 3, generator=torch.Generator().manual_seed(0)).double() - 1
        )
        corners = middles + halves * normal((64, 200, 3), 5).sign()
        most = response.ratios(torch.cat([inside, corners]).flatten(0, 1)).view(128, 200).amax(0)
        assert bool((most <= gain._bounds(response, middles, halves)[0]).all())


def test_where_the_part_along_is_least_the_part_across_counts_most():
    """(z_1, 100 z_2) for |z|: along (1, 0) at the middle, and largest for its price where z_1 is least and z_2 not."""
    weights = torch.tensor([[1.0, 0.0], [0.0, 100.0]], dtype=torch.float64)
    response = gain.Response(SATURATING["hardtanh"], torch.eye(2).double(), weights, PRICED, 1e-9)
    middle, half = torch.tensor([[[0.5, 0.0]], [[0.4, 0.01]]], dtype=torch.float64)
    corner = float(response.ratios(middle + half * torch.tensor([-1.0, 1.0])))
    assert corner <= float(gain._bounds(response, middle, half)[0]) <= 1.02 * corner


def test_it_is_what_is_proven_of_the_gain_that_counts(monkeypatch):
    """Not what was met: an upper bound that is far from it makes the bound worse, a lower one changes nothing."""
    monkeypatch.setattr(two_layers, "ASCENT_STEPS", 1)
    problem, bounds = problem_of((mf.Conv((1, 2), activation="tanh"),) * 2, count=1), []
    for lower, upper in ((1.0, 1.0), (0.1, 1.0), (0.1, 0.1)):
        found = gain.Gain(lower, upper, torch.zeros(2), 1)
        monkeypatch.setattr(gain, "largest", lambda *_, found=found: found)
        bounds.append(two_layers.prove(problem, -problem.targets / 2, steps=0, mu=1e-3).bound)
    assert bounds[0] == bounds[1] < bounds[2]


def test_what_squares_hide_is_not_lost():
    """A row nearly along u, whose part across is less than the root of the rounding of its size."""
    weights = torch.tensor([[1.0, 1e-9]], dtype=torch.float64)
    response = gain.Response(SATURATING["tanh"], normal((1, 2), 1), weights, PRICED, 0.03)
    across = response.across((torch.eye(2).double() @ weights.T).abs())
    assert bool((across[:, 0] >= torch.tensor([1e-9, 1.0])).all())
    assert float(across.max()) < 1 + 1e-12


def test_what_long_kernels_cancel_is_rounded():
    """At a point, against the exact product of its kernel and the patch."""
    patch, weight = normal((1, 3), 1), torch.ones(1, 1, dtype=torch.float64)
    response = gain.Response(SATURATING["tanh"], patch, weight, PRICED, 0.03)
    drawn = normal((100, 3), 2)
    kernels = 1e13 * (drawn - (drawn @ patch.T) / patch.square().sum() * patch)
    exact = [float(sum(Fraction(a) * Fraction(b) for a, b in zip(z, patch[0].tolist()))) for z in kernels.tolist()]
    ratios = torch.tensor(exact, dtype=torch.float64).tanh().abs() / response.price(kernels.norm(dim=1))
    assert bool((gain._bounds(response, kernels, 0 * kernels)[0] >= ratios).all())


def test_an_interrupted_gain_holds(monkeypatch):
    """Stopped after every batch: no kernel of a search has more than what was proven then."""
    response = gain.Response(
        SATURATING["tanh"], normal((30, 4), 1), normal((30, 1), 2), mf.Penalty(source=0.01, input=0.02), 0.03
    )
    tried = normal((500, 4), 3)
    most = max(float(response.ratios(size * tried).max()) for size in (1, 3, 10))
    monkeypatch.setattr(gain, "BATCH", 64)
    for stop in range(1, 12):
        clock = iter([0.0] * (stop - 1) + [1.0])
        monkeypatch.setattr(gain, "time", SimpleNamespace(perf_counter=clock.__next__))
        found = gain.largest(response, tried[:1] * 0, 1.0, 1e-3)
        assert most <= found.upper < math.inf


def test_no_kernel_is_out_of_sight():
    """Beyond the radius |Xi| <= sum |weights_i| is what the price times the level is; the box holds a half of it."""
    response = gain.Response(
        SATURATING["erf"], normal((9, 3), 1), normal((9, 2), 2), mf.Penalty(source=0.01, input=0.02), 0.03
    )
    radius = response.radius(0.5)
    assert 0.5 * float(response.price(torch.tensor(radius).double())) == pytest.approx(float(response.sizes.sum()))
    middles, halves = gain._whole(response, 0.5)
    torch.testing.assert_close(middles + halves, torch.full((1, 3), radius).double())
    torch.testing.assert_close(middles - halves, torch.tensor([[0.0, -radius, -radius]]).double())


@pytest.mark.parametrize("name", H)
def test_one_pixel_in_closed_form(name):
    """One image of one pixel: g = a h(z x) with |a| c(z) <= t reaches |g| = t B, and |q| is |r| h(t B) at most."""
    arch = mf.Architecture((1, 1, 1), (mf.Conv(1, activation=name), mf.Conv(1, activation=name)))
    problem = mf.Problem(arch, torch.full((1, 1, 1, 1), 0.7).double(), torch.ones(1, 1).double(), "squared", PENALTY)
    output = torch.tensor([[-0.4]]).double()
    features, response = features_of(problem, output)
    h, lines = SATURATING[name], torch.linspace(0, 40, 400_001, dtype=torch.float64) / 0.7  # a kink at 1 / 0.7
    most = float((h.function(0.7 * lines) / response.price(lines)).max())
    found = gain.largest(response, lines[:1, None], math.inf, 1e-6)
    assert found.upper == pytest.approx(0.4 * most, rel=2e-6)
    dual = features.dual(0.02, output)
    flows, largest = dual.flows, dual.largest_q(output, found.upper)
    exact = 0.4 * h.function(flows * most)
    assert bool((largest >= exact * (1 - 1e-12)).all())
    # B_i comes in steps of RADIUS_STEP, h' in steps of 1/SLOPES: each moves h by less than that share of its size
    share = two_layers.RADIUS_STEP - 1 + 1 / two_layers.SLOPES
    assert bool((largest <= exact * (1 + share) + 1e-12).all())
    for scale in (0.3, 1.0, 2.0):
        exact_sup = float(((scale * exact) ** 2 / (4 * PENALTY.readout) - flows).max())
        supremum = float(dual.supremum(scale * largest, scale * 0.4))
        assert exact_sup <= supremum
        end = (scale * 0.4) ** 2 / (4 * PENALTY.readout)
        assert supremum <= exact_sup + 3 * share * end


@pytest.mark.parametrize("layers", [ROUGH, PLAIN])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_no_feature_scores_more(layers, norm):
    problem = problem_of(layers, outputs=2, channels=2, penalty=replace(PENALTY, kernel_norm=norm))
    output, mu = 0.3 * normal((3, 2), 3), 0.02
    features, response = features_of(problem, output)
    found = gain.largest(response, normal((50, response.patches.shape[1]), 6), time.perf_counter() + 1, 1e-2)
    dual = features.dual(mu, output)
    largest = dual.largest_q(output, found.upper)
    shapes = problem.architecture.kernel_shapes([4, 1])
    for size in (0.1, 1.0, 10.0):
        kernels = tuple(normal((500, *shape), seed) * size for seed, shape in enumerate(shapes))
        bias = normal((500, 4), 8) * size if layers[0].bias else None
        some = Compositions(problem.architecture, kernels, (bias, None))
        flow, gains = some.costs(problem, [mu]), some.responses(problem, output)
        score = gains / (4 * PENALTY.readout) - flow
        assert float(score.max()) <= float(dual.supremum(largest, largest[-1]))
        assert largest[-1] == pytest.approx(float(dual.spread.sum(0) @ output.norm(dim=1)))  # all rows saturate there
        at = torch.searchsorted(dual.flows, flow)
        known = flow <= dual.flows[-1]
        assert bool((gains.sqrt()[known] <= largest[at[known]] * (1 + 1e-12)).all())


def test_the_bound_is_below_every_network_and_above_what_boundedness_alone_gives():
    problem = problem_of(
        (mf.Conv((1, 2), activation="tanh"),) * 2, penalty=mf.Penalty(source=0.01, readout=0.1, input=0.01)
    )
    solved = mf.solve(problem, (8, 4), rounds=1, flow_steps=100)
    output = solved.multipliers.output
    given = two_layers.prove(problem, output, solved.network, seconds=0.5, steps=0)
    assert two_layers.prove(problem, given.output, seconds=0.5, steps=0, mu=given.mu).mu == given.mu
    chosen = two_layers.prove(problem, output, solved.network, seconds=0.5, steps=60)
    assert problem.penalty.readout / (1 + 2 * problem.penalty.readout) < given.bound  # section 5, |f| <= 1
    assert given.bound < chosen.bound < solved.value
    again = features_of(problem, chosen.output)[0].dual(chosen.mu, chosen.output)
    ratios = again.features.response(chosen.output, chosen.mu).ratios(chosen.gain.argmax[None])
    assert float(again.value(chosen.output, float(ratios) * 1.02)) == pytest.approx(chosen.bound, rel=0.02)


def test_s_is_no_less_than_its_sums_row_by_row():
    given = problem_of(ROUGH, outputs=2, channels=2)
    inputs = given.inputs * torch.tensor([0.02, 1.0, 9.0]).view(3, 1, 1, 1)
    problem = mf.Problem(given.architecture, inputs, given.targets, "squared", PENALTY)
    output = normal((3, 2), 3)
    features = two_layers.Features.of(problem)
    for sizes in ((20, 5, 7), (20, 5, 1000)):
        dual = features.dual(0.02, output, sizes)
        reaches, lines = features.reaches(0.02), []
        for theta in dual.slopes:
            rows = sum(
                SATURATING["erf"].apart(theta, dual.flows * reaches[n, i]) * output[n].norm() * features.read[i]
                for n in range(3)
                for i in range(len(features.read))
            )
            lines.append(rows + theta * dual.flows * 0.3)
        exact = torch.minimum(torch.stack(lines).amin(0), output.norm(dim=1).sum())
        largest = dual.largest_q(output, 0.3)
        assert bool((largest >= exact * (1 - 1e-12)).all())
    torch.testing.assert_close(largest, exact)  # a group for every row
    gains = (largest / (4 * problem.penalty.readout) * largest).tolist()
    expected = max(gain - flow for gain, flow in zip(gains[1:], dual.flows.tolist()))
    assert float(dual.supremum(largest, 0.0)) == pytest.approx(expected)


def test_beyond_its_last_flow_a_feature_gains_what_all_rows_give():
    problem = problem_of(PLAIN)
    dual = features_of(problem, normal((3, 1), 3))[0].dual(0.02, 1e-3 * normal((3, 1), 3))
    most = torch.tensor(5.0).double()
    assert float(dual.supremum(0 * dual.flows, most)) == pytest.approx(
        25 / (4 * PENALTY.readout) - float(dual.flows[-1])
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": (mf.Conv(2, activation="tanh"),)}, "two layers, and there are 1"),
        ({"layers": (mf.Conv(2, activation="tanh"), mf.Conv(2))}, "tanh, erf, hardtanh only"),
        ({"layers": (mf.Conv(1, activation="tanh", pooling="max"), PLAIN[1])}, "maximum pooling"),
        ({"layers": (PLAIN[0], mf.Conv(2, activation="tanh", bias=True))}, "biases of later layers cost nothing"),
        ({"penalty": replace(PENALTY, power=3.0)}, "power 2"),
        ({"penalty": replace(PENALTY, source=0.0)}, "without penalties on source, readout and input"),
    ],
)
def test_where_there_is_no_bound(change, words):
    problem = problem_of(**{"layers": PLAIN, **change})
    with pytest.raises(ValueError, match=words):
        two_layers.prove(problem, normal((3, 1), 1))
