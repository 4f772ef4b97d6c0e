"""The plainest classifiers: layers, sizes, the start, the random numbers that they leave alone."""

import pytest
import torch
from strategies import seeded
from torch import nn

from meanfield.finite import cnn, mlp

SHAPE = (1, 8, 8)


def test_layers_and_sizes():
    network = cnn(SHAPE, 10, width=16, generator=seeded())
    assert sum(each.numel() for each in network.parameters()) == 9930
    assert [type(each) for each in network] == [
        nn.Conv2d,
        nn.ReLU,
        nn.MaxPool2d,
        nn.Conv2d,
        nn.ReLU,
        nn.Flatten,
        nn.Linear,
    ]
    assert "pool1" not in dict(cnn((1, 1, 8), 2, width=1, generator=seeded()).named_children())
    assert [
        (each.in_features, each.out_features) for each in mlp(SHAPE, 3, hidden=(5, 4), generator=seeded())[1::2]
    ] == [
        (64, 5),
        (5, 4),
        (4, 3),
    ]


@pytest.mark.parametrize(("activation", "gain"), [("relu", 2.0), ("tanh", 1.0)])
def test_the_start_has_the_variance_of_the_activation(activation, gain):
    before = torch.get_rng_state()
    wide = mlp(SHAPE, 10, hidden=(300, 300), activation=activation, generator=seeded(), dtype=torch.float64)
    convolved = cnn(SHAPE, 10, width=64, activation=activation, generator=seeded(), dtype=torch.float64)
    assert torch.equal(before, torch.get_rng_state())
    for layer, wanted in ((wide.linear1, gain), (wide.linear2, gain), (convolved.conv2, gain), (wide.linear3, 1.0)):
        fan_in = layer.weight[0].numel()
        spread = 4 * (2 / layer.weight.numel()) ** 0.5  # of a chi-square, four deviations
        assert float(layer.weight.detach().square().mean()) * fan_in == pytest.approx(wanted, rel=spread)
        assert not layer.bias.any()
    again = cnn(SHAPE, 10, width=64, activation=activation, generator=seeded(), dtype=torch.float64)
    assert all(map(torch.equal, convolved.parameters(), again.parameters()))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"input_shape=\(8, 8\) must be three integers"):
        cnn((8, 8), 10, generator=seeded())
    with pytest.raises(ValueError, match=r"activation='rel' is unknown"):
        mlp(SHAPE, 10, activation="rel", generator=seeded())
    with pytest.raises(ValueError, match=r"hidden=0 must be an integer of at least 1"):
        mlp(SHAPE, 10, hidden=(3, 0), generator=seeded())
