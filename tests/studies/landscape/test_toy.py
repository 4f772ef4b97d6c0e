"""One function in several scalings: what rescaling does to functions, and to directions."""

import pytest
import torch
from strategies import seeded

from meanfield import landscape
from meanfield.finite import cnn
from meanfield.studies.landscape.toy import rescaled, writings

IMAGES = torch.rand(20, 1, 8, 8, generator=seeded(1), dtype=torch.float64)


def network(activation="relu"):
    return cnn((1, 8, 8), 3, width=3, activation=activation, generator=seeded(), dtype=torch.float64).eval()


def biased(found):
    with torch.no_grad():
        for index, (name, parameter) in enumerate(found.named_parameters()):
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=seeded(index), dtype=torch.float64))
    return found


@torch.no_grad()
def test_writings_are_one_function_with_relu_and_others_with_tanh():
    for activation, same in (("relu", True), ("tanh", False)):
        first, *others = writings(biased(network(activation)), 10.0, 0).values()
        for other in others:
            assert torch.allclose(first(IMAGES), other(IMAGES), rtol=1e-10, atol=1e-12) == same
            assert not torch.allclose(first.conv1.weight, other.conv1.weight)


def test_factors_are_within_the_spread_and_of_both_sides_of_one():
    first, _, other = writings(cnn((1, 8, 8), 3, width=40, generator=seeded(), dtype=torch.float64), 10.0, 0).values()
    factors = (other.conv1.weight / first.conv1.weight).detach().flatten(1)
    assert float((factors.amax(1) - factors.amin(1)).abs().max()) < 1e-12  # one for every channel
    assert 0.1 <= float(factors.min()) < 0.3 < 3 < float(factors.max()) <= 10


@torch.no_grad()
def test_filter_normalised_points_are_one_function_per_layer_and_not_per_channel():
    own = biased(network())
    factors = {"layer": torch.full((3,), 7.0), "channel": torch.tensor([0.2, 1.0, 5.0])}
    at = lambda each: torch.func.functional_call(each, landscape.plane(each, 3).at(0.6, -0.4), (IMAGES,))  # noqa: E731
    assert torch.allclose(at(own), at(rescaled(own, factors["layer"])), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(at(own), at(rescaled(own, factors["channel"])), rtol=0.05)


def test_the_network_is_left_as_it_was():
    own = network()
    before = [each.clone() for each in own.parameters()]
    rescaled(own, torch.tensor([2.0, 3.0, 4.0]))
    assert all(map(torch.equal, own.parameters(), before))
    with pytest.raises(AttributeError):
        rescaled(torch.nn.Linear(2, 2), torch.ones(2))
