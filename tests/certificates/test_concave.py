import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from meanfield.certificates import concave

limits = st.floats(1e-6, 1e6)
shares = st.one_of(st.floats(0, 1), st.floats(0, 1e-6))
slopes = st.floats(1e-3, 1e3)


def walled(function, end):
    return lambda x: function(x) if x <= end else -math.inf


@given(limits, shares, slopes, slopes)
def test_a_kink_is_found(limit, share, rise, fall):
    top = share * limit
    function = lambda x: min(rise * (x - top), fall * (top - x)) / limit  # noqa: E731
    where, value = concave.maximum(function, limit)
    assert value == function(where)
    assert -1e-13 * max(rise, fall) <= value <= 0
    assert where == pytest.approx(top, abs=1e-12 * limit)


@given(limits, st.floats(-0.5, 1.5), slopes)
def test_a_parabola_is_found(limit, share, curvature):
    top, best = share * limit, min(max(share, 0.0), 1.0) * limit
    function = lambda x: -curvature * ((x - top) / limit) ** 2  # noqa: E731
    where, value = concave.maximum(function, limit)
    assert value == function(where)
    assert value >= function(best) - 1e-14 * curvature
    assert 0 <= where <= limit


@given(limits, st.floats(1e-3, 1), shares, slopes)
def test_minus_infinity_towards_the_right(limit, wall, share, slope):
    end, top = wall * limit, share * limit
    tried = []

    def function(x):
        tried.append(x)
        return walled(lambda x: -slope * abs(x - top) / limit, end)(x)

    where, value = concave.maximum(function, limit)
    assert where <= end
    assert value >= -slope * max(top - end, 0) / limit - 1e-12 * slope
    assert len(tried) < 130


@given(st.floats(0.5, 3), st.floats(0.01, 0.99))
def test_an_entropy_is_infinitely_steep_where_its_domain_ends(limit, share):
    """max of s log(share / (1 - share)) + entropy(s) is -log(1 - share), at s = share."""

    def function(s):
        return s * math.log(share / (1 - share)) - sum(p * math.log(p) for p in (s, 1 - s) if p > 0)

    where, value = concave.maximum(walled(function, 1.0), max(limit, share))
    assert value == pytest.approx(-math.log(1 - share), rel=1e-14)
    assert where == pytest.approx(share, abs=1e-6)


@given(seeds, st.integers(1, 8))
def test_the_least_of_several_lines(seed, count):
    """The maximum is at an end or where two lines cross."""
    random = np.random.default_rng(seed)
    slope, height = random.normal(size=count), random.normal(size=count)
    function = lambda x: float((height + slope * x).min())  # noqa: E731
    pairs = [(i, j) for i in range(count) for j in range(i)]
    crossings = [(height[i] - height[j]) / (slope[j] - slope[i]) for i, j in pairs]
    best = max(function(x) for x in [0.0, 2.0, *(x for x in crossings if 0 < x < 2)])
    assert concave.maximum(function, 2.0)[1] == pytest.approx(best, abs=1e-12)


def test_ends_are_seen():
    assert concave.maximum(lambda x: 3 * x, 0.7) == (0.7, 3 * 0.7)
    assert concave.maximum(lambda x: 1 - x, 0.7) == (0.0, 1.0)
    assert concave.maximum(lambda x: 5.0, 0.0) == (0.0, 5.0)


def test_a_domain_of_one_point_and_of_none():
    assert concave.maximum(lambda x: 0.25 if x == 0 else -math.inf, 2.0) == (0.0, 0.25)
    assert concave.maximum(lambda x: -math.inf, 2.0) == (0.0, -math.inf)
