import math

import numpy as np
import pytest
from scipy import stats

from meanfield import rates
from meanfield.rates import Slope, slope


def test_an_exact_power_is_found_with_an_interval_of_no_width():
    x = [8, 16, 64]
    found = slope(x, [[3 * m**-1.5] * 4 for m in x])
    np.testing.assert_allclose([found.value, found.low, found.high], -1.5, atol=1e-12)


def test_the_slope_is_that_of_least_squares_on_log_means():
    x, samples = [1, 10, 100], [[1.0, 3.0], [5.0], [2.0, 2.0, 11.0]]
    for statistic, centre in (("mean", np.mean), ("median", np.median)):
        expected = np.polyfit(np.log(x), np.log([centre(each) for each in samples]), 1)[0]
        assert slope(x, samples, statistic=statistic).value == pytest.approx(expected)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """True slope -1, log-normal noise: 300 intervals, share of misses within 4.5 standard errors of what few samples
    allow.
    """
    x, rng = np.array([16, 64, 256]), np.random.default_rng(0)
    misses = 0
    for trial in range(300):
        found = slope(x, [rng.lognormal(0.0, 0.3, 60) / m for m in x], seed=trial, draws=400)
        misses += not found.low <= -1 <= found.high
    assert misses / 300 <= 0.05 + 4.5 * np.sqrt(0.05 * 0.95 / 300)
    assert misses > 0


def test_an_interval_lies_inside_another():
    assert Slope(-1, -1.1, -0.9).inside(-1.15, -0.85)
    assert not Slope(-1, -1.2, -0.9).inside(-1.15, -0.85)


@pytest.mark.parametrize(
    ("x", "samples"),
    [
        ([1], [[1.0]]),
        ([1, 1], [[1.0], [1.0]]),
        ([1, 2], [[1.0], []]),
        ([1, 2], [[1.0], [0.0]]),
        ([0, 2], [[1.0], [1.0]]),
    ],
)
def test_what_has_no_slope_is_refused(x, samples):
    with pytest.raises(ValueError, match=r"slope|positive"):
        slope(x, samples)


def test_a_mean_has_students_interval():
    values = [1.0, 2.0, 4.0, 7.0]
    found = rates.mean(values)
    low, high = stats.t.interval(0.95, 3, loc=3.5, scale=stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx((3.5, low, high))
    logs = rates.mean([math.log(value) for value in values])
    geometric = rates.mean(values, geometric=True)
    assert (geometric.value, geometric.low) == pytest.approx((math.exp(logs.value), math.exp(logs.low)))
    assert not found.above(rates.mean([0.0, 1.0]))
    assert rates.mean([10.0, 10.1, 10.2]).above(found)
    assert rates.mean([3.0]).low == -math.inf
    with pytest.raises(ValueError, match="positive"):
        rates.mean([1.0, 0.0], geometric=True)


class TestRankCorrelation:
    def test_it_is_spearman_s_with_ties(self):
        x, y = [1, 2, 2, 4, 5, 9], [2, 1, 3, 3, 8, 7]
        assert rates.rank_correlation(x, y).value == pytest.approx(stats.spearmanr(x, y).statistic)

    def test_few_groups_and_constants_have_no_interval(self):
        found = rates.rank_correlation([1, 2, 3, 4], [2, 4, 6, 8])
        assert (found.value, found.bounded) == (pytest.approx(1.0), False)
        assert not rates.rank_correlation(range(8), range(8), [0, 0, 1, 1, 2, 2, 3, 3]).bounded
        assert math.isnan(rates.rank_correlation([1] * 8, range(8)).value)
        assert math.isnan(rates.rank_correlation([], []).value)

    def test_intervals_miss_independent_samples_about_as_often_as_they_say(self):
        """Of 200 at 5%: at most 4.5 standard errors above, and some."""
        rng, misses = np.random.default_rng(0), 0
        for trial in range(200):
            x, y = rng.normal(size=(2, 30))
            found = rates.rank_correlation(x, y, seed=trial, draws=200)
            misses += not found.low <= 0 <= found.high
        assert 0 < misses / 200 <= 0.05 + 4.5 * np.sqrt(0.05 * 0.95 / 200)

    def test_groups_that_are_alike_widen_the_interval(self):
        """Every sample ten times says no more than once, which an interval over single ones does not know."""
        rng = np.random.default_rng(1)
        x = rng.normal(size=12)
        y = x + rng.normal(size=12)
        names = [number for number in range(12) for _ in range(10)]
        spread = lambda found: found.high - found.low  # noqa: E731
        once = rates.rank_correlation(x, y)
        whole, single = (rates.rank_correlation(np.repeat(x, 10), np.repeat(y, 10), each) for each in (names, None))
        assert spread(whole) == pytest.approx(spread(once), rel=0.1)
        assert spread(single) < spread(once) / 2

    def test_errors(self):
        with pytest.raises(ValueError, match="as many x as y"):
            rates.rank_correlation([1, 2], [1])
