import math

import pytest
import torch
from strategies import normal, seeded

from meanfield.landscape import nested
from meanfield.landscape.nested import FACTOR, Nested

DRAWS = 20
AXIS = torch.linspace(-1, 1, 51, dtype=torch.float64)


def peaked(seed):
    """A bump near a corner, where losses are steepest: almost all of the error is there."""
    place, width = 1 - 0.2 * torch.rand(2, generator=seeded(seed), dtype=torch.float64), 20 + seed / 5

    def at(points):
        return (-width * (points - place).square().sum(1, keepdim=True)).exp()

    return at


def hinged(seed):
    """A mean of 40 hinges in random directions: errors are everywhere, and of all sizes."""
    weights, shifts = normal((2, 40), seed), normal((40,), seed + 1)

    def at(points):
        return (points @ weights - shifts).clamp_min(0).square().mean(1, keepdim=True)

    return at


def covered(family, estimate):
    """The share of draws, of ten functions, in which the estimate is at least the largest error."""
    met = []
    for function in (family(10 * seed) for seed in range(10)):
        exact = function(torch.cartesian_prod(AXIS, AXIS)).unflatten(0, (51, 51))
        missed = (Nested(function, (8, 8), [0], seeded()).grid(AXIS, AXIS) - exact).abs().max()
        polynomials = (Nested(function, (8, 8), [0], seeded(draw)) for draw in range(DRAWS))
        met += [bool(estimate(each, function) >= missed) for each in polynomials]
    return sum(met) / len(met)


def by_uniform_checks(polynomial, function):
    """The same number of checks, drawn uniformly over the square."""
    points = 2 * torch.rand(len(polynomial.checks.points), 2, generator=polynomial.generator, dtype=torch.float64) - 1
    return FACTOR * (polynomial.at(points) - function(points)).abs().amax(0)[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", [peaked, hinged])
def test_the_estimate_covers(family):
    assert covered(family, lambda polynomial, _: polynomial.errors[0]) >= 0.9


@pytest.mark.slow
def test_uniform_checks_do_not():
    """The control: what lies in a corner escapes them."""
    assert covered(peaked, by_uniform_checks) < 0.6


@pytest.mark.parametrize(("degree", "checks"), [(4, 17), (8, 26), (16, 41), (32, 65)])
def test_so_many_checks_make_the_factor(degree, checks):
    candidates = (2 * degree + 1) ** 2 - (degree + 1) ** 2
    assert nested.checks_of((degree, degree)) == checks
    largest = math.log(candidates / math.log(2))  # the median of the largest of all, in units of the mean
    drawn = math.log(checks / math.log(1 / nested.MISSED))  # what the largest of the drawn exceeds but in 2%
    assert largest / drawn == pytest.approx(FACTOR, rel=0.02)


def test_exponential_errors_are_covered_as_derived():
    errors = -torch.rand(2000, 208, generator=seeded(0), dtype=torch.float64).log()
    median = errors.amax(1).median()
    assert float((FACTOR * errors[:, :26].amax(1) < median).double().mean()) == pytest.approx(nested.MISSED, abs=0.01)


def test_a_polynomial_of_the_degree_is_met_and_one_beyond_it_is_not():
    def power(exponent):
        return lambda points: (points[:, 0] ** exponent * points[:, 1])[:, None]

    assert Nested(power(8), (8, 8), [0], seeded()).errors[0] < 1e-14
    # x^9 - p(x) is 2^-8 times the monic polynomial with zeros at the nodes: largest error just below 2 * 2^-8
    assert 2**-9 < Nested(power(9), (8, 8), [0], seeded()).errors[0] <= FACTOR * 2**-7


def test_checks_lie_at_the_nodes_of_the_next_polynomial_and_are_asked_once():
    seen = []

    def noted(points):
        seen.append(points)
        return points.square().sum(1, keepdim=True).exp()

    polynomial = Nested(noted, (8, 8), [0], seeded())
    polynomial.climb((16, 16))
    first, checks, second, _ = ({tuple(point) for point in points.tolist()} for points in seen)
    assert first < second
    assert checks < second - first
    assert len(checks) == 26


def test_the_coordinate_that_needs_it_grows():
    def steep(axis):
        return lambda points: (6 * points[:, axis]).sin()[:, None]

    goal = torch.tensor([1e-3], dtype=torch.float64)
    for axis, expected in ((0, (16, 8)), (1, (8, 16))):
        polynomial = Nested(steep(axis), (8, 8), [0], seeded())
        assert polynomial.ahead(goal) == expected
        polynomial.climb(expected)
        assert polynomial.errors[0] < goal
    polynomial = Nested(lambda points: (6 * points).sin().sum(1, keepdim=True), (8, 8), [0], seeded())
    assert polynomial.ahead(goal) == (16, 16)
    assert polynomial.cost((16, 16)) == 289 + 41 - 81 - 26
    polynomial.climb((32, 32))
    assert polynomial.ahead(torch.zeros(1, dtype=torch.float64)) is None


def test_where_the_last_polynomial_erred_checks_are_drawn_more_often(monkeypatch):
    def bump(points):
        return (-20 * (points - 1).square().sum(1, keepdim=True)).exp()

    def near():
        drawn = (Nested(bump, (16, 16), [0], seeded(draw)).checks.points for draw in range(20))
        return float(torch.cat([(points > 0.3).all(1) for points in drawn]).double().mean())

    led = near()
    monkeypatch.setattr(nested, "BLIND", 1.0)
    # alike, (arccos(0.3) / pi)^2 of the candidates lie there
    assert near() == pytest.approx(0.16, abs=0.04)
    assert led > 1.5 * near()
