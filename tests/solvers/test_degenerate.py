"""Programs in the corners: each ends with a right answer or a clear status, and never with NaN."""

import math

import pytest
import torch
from strategies import normal, random_inputs, random_network, random_targets

import meanfield as mf
from meanfield.solvers import reference, splitting

ROUNDING = 1e-9
TWO_LAYERS = mf.Architecture((1, 3, 3), (mf.Conv(2, activation="tanh"), mf.Conv(2, activation="tanh")), outputs=2)
ONE_RELU = mf.Architecture((1, 3, 3), (mf.Conv(2),))


def make(widths=(4, 3), count=3, loss="squared", **strengths):
    inputs, targets = random_inputs(TWO_LAYERS, count, 0), random_targets(loss, 2, count, 0)
    penalty = mf.Penalty(**({"source": 0.02, "readout": 0.03, "input": 0.01} | strengths))
    return mf.Problem(TWO_LAYERS, inputs, targets, loss, penalty), random_network(TWO_LAYERS, widths, 0)


def with_first(network, kernels):
    return mf.ParticleNetwork(network.architecture, network.masses, [kernels, *network.kernels[1:]], network.readout)


def zero_feature(network):
    return with_first(network, network.kernels[0].index_fill(0, torch.tensor([0]), 0.0))


def all_features_zero(network):
    return with_first(network, torch.zeros_like(network.kernels[0]))


def equal_features(network):
    return with_first(network, network.kernels[0][:1].expand_as(network.kernels[0]).clone())


def same(network):
    return network


def certified(problem, network, tolerance=1e-6):
    """Solve, and check all that holds of any answer."""
    program = mf.ConvexProgram.freeze(problem, network)
    solution = splitting.solve(program, tolerance)
    start = program.value(program.point(network)).item()
    assert math.isfinite(solution.value)
    assert math.isfinite(solution.gap)
    assert -ROUNDING * (1 + abs(solution.value)) <= solution.gap
    assert solution.value <= start * (1 + 1e-12)
    assert solution.certificate.violation <= 1e-8
    assert all(bool(torch.isfinite(t).all()) for t in solution.network.tensors())
    assert problem.value(solution.network).item() == pytest.approx(solution.value, rel=1e-8)
    return program, solution


@pytest.mark.parametrize("spoil", [same, zero_feature, all_features_zero, equal_features])
@pytest.mark.parametrize("widths", [(4, 3), (1, 1), (1, 3), (4, 1)])
def test_poor_features_are_solved_like_any_other(spoil, widths):
    problem, network = make(widths)
    program, solution = certified(problem, spoil(network))
    assert solution.status == "optimal"
    theirs = reference.solve(program)
    assert abs(solution.value - theirs.value) <= solution.gap + theirs.gap + 1e-7


@pytest.mark.parametrize("copies", [1, 3])
def test_equal_images_leave_redundant_constraints(copies):
    problem, network = make(count=2)
    inputs, targets = problem.inputs[:1].repeat(copies, 1, 1, 1), problem.targets[:1].repeat(copies, 1)
    repeated = mf.Problem(TWO_LAYERS, inputs, targets, penalty=problem.penalty)
    program, solution = certified(repeated, network)
    assert solution.status == "optimal"
    assert program.spaces[0].rank <= 4  # positions of one image


def test_repeating_all_images_changes_nothing():
    problem, network = make()
    doubled = mf.Problem(
        TWO_LAYERS, problem.inputs.repeat(2, 1, 1, 1), problem.targets.repeat(2, 1), penalty=problem.penalty
    )
    one, two = (certified(each, network, 1e-8)[1] for each in (problem, doubled))
    assert one.value == pytest.approx(two.value, abs=one.gap + two.gap + ROUNDING)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        pytest.param(loss, name, marks=[pytest.mark.slow] if loss != "logistic" else [])
        for loss in ("squared", "softmax", "logistic")
        for name in ("source", "readout", "input")
    ],
)
def test_a_huge_penalty_removes_what_it_weighs(loss, name):
    problem, network = make(loss=loss, **{name: 1e6})
    _, solution = certified(problem, network)
    assert solution.status in ("optimal", "max_iterations")
    if name == "readout":
        assert solution.network.readout.abs().max().item() < 1e-4
    if solution.status == "max_iterations":
        assert "before the tolerance was met" in solution.message


@pytest.mark.parametrize("name", ["source", pytest.param("readout", marks=pytest.mark.slow), "input"])
def test_a_penalty_of_zero_ends_with_an_honest_gap(name):
    problem, network = make(**{name: 0.0})
    program, solution = certified(problem, network)
    assert solution.value - reference.solve(program).value <= solution.gap + 1e-7


def one_relu(readout, count=5):
    """Random kernels and the kernel zero, whose response is zero at no cost."""
    inputs, targets = random_inputs(ONE_RELU, count, 3), normal((count, 1), 5)
    network = zero_feature(random_network(ONE_RELU, (6,), 1))
    return mf.Problem(ONE_RELU, inputs, targets, penalty=mf.Penalty(input=0.05, readout=readout)), network


def critical_readout():
    """Above max_j |q_j|^2 / (4 lambda_1 |z_j|^2) at r = -y/N the zero network is optimal: then every mu_1 >= 0 is dual
    feasible.
    """
    problem, network = one_relu(1.0)
    response = network.features(problem.inputs)[0].mean((2, 3)).T @ (-problem.targets / len(problem.targets))
    return (
        (response.square().flatten()[1:] / (4 * 0.05 * network.kernels[0].flatten(1).square().sum(1)[1:])).max().item()
    )


def test_above_the_critical_penalty_the_zero_network_is_optimal():
    problem, network = one_relu(1.02 * critical_readout())
    _, solution = certified(problem, network)
    nothing = 0.5 * problem.targets.square().mean().item()
    assert solution.status == "optimal"
    assert solution.value == pytest.approx(nothing, rel=1e-5)
    assert solution.value >= nothing - ROUNDING  # the zero network, no less


def test_below_the_critical_penalty_it_is_not():
    problem, network = one_relu(0.9 * critical_readout())
    _, solution = certified(problem, network)
    assert solution.status == "optimal"
    assert solution.value < 0.5 * problem.targets.square().mean().item() - 2 * solution.gap - 1e-6
