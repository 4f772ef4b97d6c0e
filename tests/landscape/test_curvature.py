import math

import numpy as np
import pytest
import torch
from scipy import stats
from strategies import seeded

from meanfield.landscape import curvature
from meanfield.validation import Misuse


class Matrix:
    """An operator that counts."""

    def __init__(self, entries, dtype=torch.float64):
        self.entries, self.like, self.size, self.count = entries.to(dtype), torch.empty(0, dtype=dtype), len(entries), 0

    def __call__(self, vector):
        self.count += 1
        return self.entries @ vector.to(self.like.dtype)


def symmetric(values, seed=0):
    turned = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=seeded(seed))).Q
    return turned @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ turned.T


SPECTRUM = np.concatenate([np.linspace(-0.5, 0.3, 95), [2.0, 3.0, 5.0, 9.0, 20.0]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_eigenvalues_are_those_of_a_known_spectrum(dtype):
    operator = Matrix(symmetric(SPECTRUM), dtype)
    found = curvature.extremes(operator, seeded(1), 2, 2)
    assert (found.status, found.products) == ("converged", operator.count)
    assert found.products < 60  # not the whole space
    for pairs, wanted in ((found.largest, [20.0, 9.0]), (found.smallest, sorted(SPECTRUM)[:2])):
        for pair, value in zip(pairs, wanted):
            assert pair.value.low - 1e-6 <= value <= pair.value.high + 1e-6
            image = operator.entries.double() @ pair.vector
            residual = float((image - pair.value.value * pair.vector).norm())
            assert pair.residual == pytest.approx(residual, abs=20 * 20 * torch.finfo(dtype).eps)
            assert float(pair.vector.norm()) == pytest.approx(1)
    assert found.largest[0].residual <= 1e-4 * 20
    assert found.largest[1].residual <= 1e-4 * 9
    assert all(pair.residual <= 1e-4 * 20 for pair in found.smallest)


def test_lanczos_that_stops_early_says_so_and_its_interval_holds_an_eigenvalue():
    for seed in range(20):
        found = curvature.extremes(Matrix(symmetric(SPECTRUM)), seeded(seed), products=5)
        assert found.status == "max_products"
        for pair in (*found.largest, *found.smallest):
            nearest = np.abs(SPECTRUM - pair.value.value).min()
            assert nearest <= pair.residual * (1 + 1e-9)
    assert abs(found.smallest[0].value.value + 0.5) > 1e-3  # which the estimate alone does not tell


def test_a_space_that_is_exhausted_ends_the_search():
    for entries, top, least in (
        (torch.zeros(5, 5), 0, 0),
        (3 * torch.eye(7), 3, 3),
        (torch.diag(torch.tensor([1.0, 1.0, 2.0, -3.0])), 2, -3),
        (torch.tensor([[4.0]]), 4, None),
    ):
        found = curvature.extremes(Matrix(entries.double()), seeded(0), 1, int(least is not None))
        assert found.status == "converged"
        assert found.largest[0].value.value == pytest.approx(top, abs=1e-12)
        assert least is None or found.smallest[0].value.value == pytest.approx(least, abs=1e-12)


def traces(products, seeds):
    entries = symmetric(SPECTRUM)
    return [curvature.trace(Matrix(entries), seeded(seed), products=products) for seed in range(seeds)]


@pytest.mark.parametrize("products", [pytest.param(30, marks=pytest.mark.slow), 8])
def test_errors_of_the_trace_cover_as_students_law_says(products):
    """Also of one that stops early: it is often far off, and says so.  Bounds: 1e-4 tails of the binomial law."""
    found, truth, freedom = traces(products, 200), SPECTRUM.sum(), products - products // 2 - 1
    beyond = sum(abs(each.value - truth) > 3 * each.error for each in found)
    assert beyond <= stats.binom.ppf(1 - 1e-4, 200, 2 * stats.t.sf(3, freedom))
    outside = sum(not each.low <= truth <= each.high for each in found)
    assert stats.binom.ppf(1e-4, 200, 0.05) <= outside <= stats.binom.ppf(1 - 1e-4, 200, 0.05)
    mean = sum(each.value for each in found) / 200
    assert abs(mean - truth) <= 4 * math.sqrt(sum(each.error**2 for each in found)) / 200
    if products == 8:
        assert sum(abs(each.value / truth - 1) > 0.05 for each in found) > 50


def test_the_trace_uses_the_products_it_is_given_and_is_exact_where_they_are_enough():
    operator = Matrix(symmetric(SPECTRUM))
    curvature.trace(operator, seeded(0), products=17)
    assert operator.count == 17
    few = curvature.trace(Matrix(symmetric([1.0, -2.0, 5.0])), seeded(0), products=4)
    assert (few.value, few.low, few.error) == pytest.approx((4, 4, 0))
    low_rank = curvature.trace(Matrix(symmetric([7.0, -2.0] + 50 * [0.0])), seeded(0), products=10)
    assert low_rank.value == pytest.approx(5, rel=1e-12)
    assert low_rank.error < 1e-12


def test_a_subspace_finds_what_signs_alone_would_scatter():
    """Hutchinson's standard error with 30 signs is sqrt(2 / 30) of the norm off the diagonal."""
    entries = symmetric(SPECTRUM)
    plain = math.sqrt(2 / 30) * float((entries - torch.diag(entries.diagonal())).norm())
    assert np.median([each.error for each in traces(30, 20)]) < plain / 5


def test_what_cannot_be_is_refused():
    operator = Matrix(symmetric(SPECTRUM))
    with pytest.raises(Misuse, match="products=3 leaves no two draws"):
        curvature.trace(operator, seeded(0), products=3)
    with pytest.raises(Misuse, match="largest=60 and smallest=60 must be 1 to 100"):
        curvature.extremes(operator, seeded(0), 60, 60)
