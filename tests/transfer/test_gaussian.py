"""Moments of functions of Gaussian vectors against quadrature in two dimensions."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from meanfield.transfer.gaussian import Field, activated, maximum

MEAN = torch.tensor([0.4, -0.7], dtype=torch.float64)
NODES, WEIGHTS = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(200))


def field(rho, deviations=(0.9, 1.3)):
    scale = torch.tensor(deviations, dtype=torch.float64)
    correlation = torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)
    return Field(MEAN.reshape(1, 1, 2), (scale[:, None] * correlation * scale).reshape(1, 1, 2, 2))


def expected(given, function):
    """E function(X, Y) by a product rule on the Cholesky factor."""
    root = torch.linalg.cholesky(given.covariance[0, 0])
    first, second = torch.meshgrid(NODES, NODES, indexing="ij")
    x, y = (given.mean[0, 0, :, None, None] + torch.einsum("pq,qab->pab", root, torch.stack([first, second]))).unbind(0)
    return float((function(x, y) * WEIGHTS[:, None] * WEIGHTS).sum() / WEIGHTS.sum() ** 2)


@pytest.mark.parametrize("rho", [-0.5, 0.2, 0.6])
@pytest.mark.parametrize(
    ("function", "relu", "tolerance"),
    # the rule of 200 nodes knows a kink to 1e-3; six terms leave out less than rho^7 of the product of deviations
    [(torch.tanh, False, 3e-4), (functional.gelu, False, 1e-3), (torch.relu, True, 2e-3)],
)
def test_an_activation_of_two_entries(function, relu, tolerance, rho):
    given = field(rho)
    found = activated(given, function, relu=relu)
    means = [expected(given, lambda x, y: function(x)), expected(given, lambda x, y: function(y))]
    products = [[lambda x, y: x * x, lambda x, y: x * y], [lambda x, y: x * y, lambda x, y: y * y]]
    for p in range(2):
        assert float(found.mean[0, 0, p]) == pytest.approx(means[p], abs=1e-6 if not relu else 1e-3)
        for q in range(2):
            product = products[p][q]
            wanted = expected(given, lambda x, y: product(function(x), function(y))) - means[p] * means[q]  # noqa: B023
            assert float(found.covariance[0, 0, p, q]) == pytest.approx(wanted, abs=tolerance)


def test_what_the_expansion_of_relu_leaves_out():
    """Of two equal entries the covariance is the variance; without its diagonal it is that of the six terms."""
    mean = torch.linspace(-5, 5, 2001, dtype=torch.float64).reshape(-1, 1, 1).expand(-1, 1, 2)
    found = activated(Field(mean, torch.ones(2001, 1, 2, 2).double()), torch.relu, relu=True).covariance
    left = found[:, 0, 0, 0] - found[:, 0, 0, 1]
    assert float(left.min()) > -1e-12
    assert float(left.max()) < 0.0031


def test_relu_far_from_its_kink_and_without_randomness():
    mean = torch.tensor([[[50.0, -50.0, 0.3]]], dtype=torch.float64)
    random = Field(mean, torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)).reshape(1, 1, 3, 3))
    found = activated(random, torch.relu, relu=True)
    torch.testing.assert_close(found.mean, torch.tensor([[[50.0, 0.0, 0.3]]], dtype=torch.float64))
    torch.testing.assert_close(found.variance, torch.tensor([[[1.0, 0.0, 0.0]]], dtype=torch.float64))
    assert activated(Field(mean), torch.relu).covariance is None


def test_covariances_are_never_indefinite():
    root = torch.randn(30, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = torch.randn(30, 1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = activated(Field(mean, (root @ root.mT)[:, None]), torch.relu, relu=True)
    assert float(torch.linalg.eigvalsh(found.covariance).min()) > -1e-12


@pytest.mark.parametrize("rho", [-0.5, 0.6])
def test_the_larger_of_two(rho):
    given = field(rho)
    found = maximum(given, torch.tensor([[0, 1]]))
    mean = expected(given, torch.maximum)
    assert float(found.mean) == pytest.approx(mean, abs=2e-3)
    square = expected(given, lambda x, y: torch.maximum(x, y) ** 2)
    assert float(found.covariance) == pytest.approx(square - mean**2, abs=4e-3)


@pytest.mark.parametrize("apart", [-0.8, 0.0, 0.8])
def test_the_larger_of_two_that_differ_by_a_constant_is_one_of_them(apart):
    """Their difference has no deviation, and no share of it is a quotient."""
    mean, covariance = torch.tensor([0.3, 0.3 + apart], dtype=torch.float64), torch.full((1, 1, 2, 2), 0.5).double()
    found = maximum(Field(mean.reshape(1, 1, 2), covariance), torch.tensor([[0, 1]]))
    assert float(found.mean) == pytest.approx(0.3 + max(apart, 0.0), abs=1e-12)
    assert float(found.covariance) == pytest.approx(0.5, abs=1e-12)


def test_windows_of_three_against_draws():
    """A winner is taken as Gaussian in the second round: within a few hundredths of its deviation."""
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    covariance, mean = root @ root.T, torch.randn(6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    windows = torch.tensor([[0, 1, 2], [3, 4, 5]])
    found = maximum(Field(mean.reshape(1, 1, 6), covariance.reshape(1, 1, 6, 6)), windows)
    draws = mean + torch.randn(100_000, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64) @ root.T
    largest = draws[:, windows].amax(2)
    deviation = largest.std(0)
    assert bool(((found.mean[0, 0] - largest.mean(0)).abs() < 0.05 * deviation).all())
    assert bool(((found.variance[0, 0].sqrt() / deviation - 1).abs() < 0.05).all())
    correlation = torch.cov(largest.T)[0, 1] / deviation.prod()
    assert float(found.covariance[0, 0, 0, 1] / deviation.prod()) == pytest.approx(float(correlation), abs=0.1)
