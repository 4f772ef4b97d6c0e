import numpy as np
import pytest
import torch
from numpy.polynomial import chebyshev as twin
from strategies import normal

from meanfield.landscape import chebyshev


@pytest.mark.parametrize("degree", [4, 8, 16])
def test_nodes_are_extrema_nested_to_the_bit_and_symmetric_about_0(degree):
    nodes, finer = chebyshev.nodes(degree), chebyshev.nodes(2 * degree)
    np.testing.assert_allclose(nodes.numpy(), np.cos(np.pi * np.arange(degree + 1) / degree), atol=1e-15)
    assert torch.equal(nodes, finer[::2])
    assert torch.equal(nodes, -nodes.flip(0))
    assert nodes[degree // 2] == 0


def test_a_polynomial_of_the_degrees_comes_back_and_its_values_are_those_of_a_slow_twin():
    values = normal((9, 5, 2), seed=0)  # any values are those of one polynomial
    first, second = 2 * torch.rand(7, dtype=torch.float64) - 1, torch.tensor([-1.0, 0.3, 0.0, 1.0])
    found = chebyshev.on_grid(values, first, second)
    rows, columns = (np.linalg.inv(twin.chebvander(chebyshev.nodes(n).numpy(), n)) for n in (8, 4))
    coefficients = np.einsum("ki,lj,ijf->klf", rows, columns, values.numpy())
    expected = twin.chebgrid2d(first.double().numpy(), second.double().numpy(), coefficients)
    np.testing.assert_allclose(found.permute(2, 0, 1), expected, atol=1e-13)
    points = torch.cartesian_prod(first, second.double())
    np.testing.assert_allclose(chebyshev.at_points(values, points), found.flatten(0, 1), atol=1e-14)


def test_at_the_nodes_the_values_come_back_to_the_bit():
    values = normal((9, 17, 1), seed=1)
    assert torch.equal(chebyshev.on_grid(values, chebyshev.nodes(8), chebyshev.nodes(16)), values)


def test_a_hair_beside_a_node_the_value_is_that_of_the_node():
    values = normal((33, 33, 1), seed=2)
    beside = chebyshev.nodes(32) * (1 - 2**-52)
    np.testing.assert_allclose(chebyshev.on_grid(values, beside, beside), values, atol=1e-11)
