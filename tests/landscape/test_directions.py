"""Directions: their lengths, what moves, what a plane says of itself; invariance under rescaling."""

import math

import pytest
import torch
from strategies import normal, random_network
from torch import nn
from torch.nn import functional
from torch_networks import chain, filled

from meanfield import Architecture, Conv, finite, landscape, measures
from meanfield.landscape.balance import balanced
from meanfield.landscape.directions import Plane, gaussian, inner
from meanfield.subject import Subject
from meanfield.validation import Misuse

IMAGES = torch.randn(30, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
HIDDEN = ((0, 3), (3, 6), (6, 8))  # a layer and its reader in `chain`


def rescaled(network: nn.Module, spread: float, *, channels: bool, seed: int = 1) -> nn.Module:
    """The same function of a ReLU network: what comes into a layer (or a channel) times c, what goes out over c."""
    generator, found = torch.Generator().manual_seed(seed), chain()
    found.load_state_dict(network.state_dict())
    with torch.no_grad():
        for layer, reader in ((0, 3), (3, 6), (6, 8)):
            count = len(found[layer].weight)
            logs = torch.randn(count if channels else 1, generator=generator, dtype=torch.float64) * spread
            factors = logs.exp().expand(count)
            found[layer].weight *= factors.reshape(-1, *[1] * (found[layer].weight.ndim - 1))
            found[layer].bias *= factors
            columns = found[reader].weight.view(len(found[reader].weight), count, -1)
            columns /= factors[:, None]
    return found


def test_filters_have_the_length_of_the_networks_own_and_biases_stay():
    network = chain()
    plane = landscape.plane(network, seed=3)
    for direction in (plane.first, plane.second):
        for name, weight in network.named_parameters():
            lengths = direction[name].flatten(1).norm(dim=1) if weight.ndim > 1 else direction[name].abs()
            wanted = weight.detach().flatten(1).norm(dim=1) if weight.ndim > 1 else torch.zeros(len(weight))
            torch.testing.assert_close(lengths, wanted.double(), rtol=1e-12, atol=0)
    assert float(inner(plane.first, plane.second)) != 0
    assert any("0.bias" in warning for warning in plane.warnings)


def test_layers_and_elements_are_not_filters():
    network = chain()
    layer = landscape.plane(network, normalise="layer").first["3.weight"]
    weight = network[3].weight.detach()
    assert float(layer.norm()) == pytest.approx(float(weight.norm()), rel=1e-12)
    assert not torch.allclose(layer.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1), rtol=1e-3)
    plain, element = (landscape.plane(network, normalise=name).first["3.weight"] for name in ("none", "element"))
    torch.testing.assert_close(element, plain * weight.abs(), rtol=1e-15, atol=0)


def test_directions_are_gaussian_not_uniform():
    subject = Subject(nn.Linear(100, 200))
    drawn = gaussian(subject, torch.Generator().manual_seed(0), "none")["weight"].flatten()
    # kurtosis of 20,000 normals: 3 with deviation sqrt(24 / 20,000) = 0.035; uniform ones have 1.8
    kurtosis = float(drawn.pow(4).mean() / drawn.square().mean() ** 2)
    assert abs(kurtosis - 3) < 5 * math.sqrt(24 / 20_000)
    assert abs(float(drawn.mean())) < 5 / math.sqrt(20_000)


def test_biases_and_scales_are_normalised_as_vectors_and_not_to_themselves():
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6))
    nn.init.normal_(network[1].weight)
    direction = landscape.plane(network, biases=True).first
    for name in ("0.bias", "1.weight"):
        own = network.get_parameter(name).detach()
        assert float(direction[name].norm()) == pytest.approx(float(own.norm()), rel=1e-6)
        assert not torch.allclose(direction[name].abs(), own.abs(), rtol=1e-2)
    assert "1.running_var" not in direction


def test_a_network_drawn_from_the_same_seed_is_not_its_own_direction():
    generator = torch.Generator().manual_seed(0)
    start = finite.vgg(8, (1, 8, 8), 3, width=4, generator=generator, dtype=torch.float64)
    direction = landscape.plane(start, seed=0, normalise="none").first["conv1.weight"]
    weight = start.get_parameter("conv1.weight").detach()
    cosine = float((direction * weight).sum() / (direction.norm() * weight.norm()))
    assert abs(cosine) < 5 / math.sqrt(weight.numel())  # five standard deviations of independent ones


def test_filters_of_transposed_convolutions_are_counted_along_their_outputs():
    layer = nn.ConvTranspose2d(3, 5, 2)
    direction = landscape.plane(nn.Sequential(layer)).first["0.weight"]
    lengths = [each.detach().movedim(1, 0).flatten(1).norm(dim=1) for each in (direction, layer.weight)]
    torch.testing.assert_close(*lengths)


def test_filters_of_particles_are_their_kernels():
    network = random_network(Architecture((1, 5, 5), (Conv(3), Conv(2, bias=True)), outputs=2), (4, 3), seed=1)
    plane = landscape.plane(network)
    for name, own in (("kernels.1", network.kernels[1]), ("readout", network.readout)):
        torch.testing.assert_close(plane.first[name].flatten(1).norm(dim=1), own.flatten(1).norm(dim=1))
    assert not plane.first["biases.1"].any()
    assert set(plane.first) == {"kernels.0", "kernels.1", "readout", "biases.1"}


def test_a_plane_names_what_misleads():
    network = chain(activation=nn.GELU)
    with torch.no_grad():
        network[0].weight[1] = 0
        network[0].weight[3] = 0
    (curved, dead, still) = landscape.plane(network).warnings
    assert "1 (GELU), 4 (GELU), 7 (GELU)" in curved
    assert "0.weight, 2 of 5 (1, 3)" in dead
    assert "0.bias, 3.bias, 6.bias, 8.bias" in still
    generator = torch.Generator().manual_seed(0)
    norm = landscape.plane(finite.residual((1, 8, 8), 3, width=2, generator=generator)).warnings
    assert "norm1, stage1.0.norm1" in norm[0]
    assert len(norm) == 2  # batch norm, and its scales and shifts that stay
    tanh = random_network(Architecture((1, 4, 4), (Conv(2, activation="tanh"), Conv(2))), (3, 2), seed=0)
    assert "tanh in layers.0" in landscape.plane(tanh).warnings[0]
    assert landscape.plane(tanh, normalise="none").warnings == ()
    assert landscape.plane(chain(), biases=True).warnings == ()


class Called(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return functional.softplus(torch.relu(self.layer(inputs)))


class Gated(Called):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs) * inputs[:, :2].relu()


class Branching(Called):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs if inputs.sum() > 0 else self.layer(inputs)


def test_functions_in_a_forward_pass_are_named_and_a_graph_that_cannot_be_read_is_said():
    assert "softplus in 0." in landscape.plane(nn.Sequential(Called())).warnings[0]
    assert "mul in the forward pass" in landscape.plane(Gated()).warnings[0]
    assert "could not be read" in landscape.plane(Branching()).warnings[0]


def losses(network: nn.Module, plane: Plane) -> torch.Tensor:
    subject = Subject(network)
    points = [(0.0, 0.0), (1.0, 0.0), (-0.5, 0.7), (0.3, -1.0)]
    return torch.stack([subject(plane.at(a, b), IMAGES) for a, b in points])


@pytest.mark.parametrize(
    ("channels", "balance", "same"), [(False, False, True), (True, False, False), (True, True, True)]
)
def test_filter_normalisation_is_invariant_per_layer_and_per_channel_only_when_balanced(channels, balance, same):
    network = chain()
    other = rescaled(network, 1.0, channels=channels)
    torch.testing.assert_close(network(IMAGES), other(IMAGES), rtol=1e-10, atol=1e-12)
    surfaces = [losses(each, landscape.plane(each, seed=5, biases=True, balance=balance)) for each in (network, other)]
    assert torch.allclose(*surfaces, rtol=1e-9, atol=1e-10) == same


def test_directions_without_normalisation_are_not_invariant_per_layer():
    network = chain()
    other = rescaled(network, 1.0, channels=False)
    surfaces = [losses(each, landscape.plane(each, seed=5, normalise="none")) for each in (network, other)]
    assert not torch.allclose(*surfaces, rtol=1e-2)


def test_balanced_is_the_same_function_with_the_least_weights_whatever_it_was_before():
    network = chain()
    found, other = balanced(network), balanced(rescaled(network, 2.0, channels=True))
    torch.testing.assert_close(found(IMAGES), network(IMAGES), rtol=1e-10, atol=1e-12)
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=1e-9, atol=1e-11)
    for layer, reader in HIDDEN:
        below, above = found[layer], found[reader]
        incoming = below.weight.flatten(1).square().sum(1) + below.bias.square()
        outgoing = above.weight.view(len(above.weight), len(incoming), -1).square().sum((0, 2))
        torch.testing.assert_close(incoming, outgoing, rtol=1e-10, atol=0)


def test_particles_are_balanced_with_their_masses():
    architecture = Architecture((1, 5, 5), (Conv(3, bias=True), Conv(2)), outputs=2)
    network = random_network(architecture, (4, 3), seed=2)
    inputs = torch.randn(4, 1, 5, 5, dtype=torch.float64)
    found = balanced(network)
    torch.testing.assert_close(found(inputs), network(inputs), rtol=1e-10, atol=1e-12)
    assert all(map(torch.equal, found.masses, network.masses))
    again = balanced(measures.with_tensors(found, [2 * t if i == 2 else t for i, t in enumerate(found.tensors())]))
    incoming, outgoing = again.kernels[1].square().sum((1, 2, 3)), again.readout.square().sum(0)
    torch.testing.assert_close(incoming, outgoing, rtol=1e-10, atol=0)


class Flipped(nn.Module):
    """Homogeneous, and no channel by itself."""

    def forward(self, signal):
        return signal.flip(1)


class Sized(nn.Module):
    """Not homogeneous, and of images of one size alone."""

    def forward(self, signal):
        return signal * torch.sigmoid(signal.view(-1, 5, 5, 5))


@pytest.mark.parametrize(
    "above",
    [
        (nn.ReLU(), Flipped(), nn.Flatten(), nn.Linear(125, 3)),
        (Sized(), nn.Flatten(), nn.Linear(125, 3)),
        (nn.Flatten(2), nn.Linear(25, 3)),
    ],
)
def test_what_mixes_channels_or_is_not_known_cannot_be_balanced(above):
    """Each of these used to come back as another function."""
    with pytest.raises(Misuse, match="cannot be balanced"):
        balanced(nn.Sequential(nn.Conv2d(1, 5, 2), *above))


def test_an_activation_of_the_callers_and_one_that_stands_twice_are_balanced():
    absolute = type("Absolute", (nn.Module,), {"forward": lambda self, signal: signal.abs()})()
    layers = nn.Conv2d(1, 4, 3), absolute, nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), absolute, nn.Flatten(), nn.Linear(16, 3)
    network, images = filled(nn.Sequential(*layers), 3), normal((5, 1, 6, 6), 4)
    torch.testing.assert_close(balanced(network)(images), network(images), rtol=1e-10, atol=1e-12)


def test_what_cannot_be_balanced_is_named():
    with pytest.raises(Misuse, match=r"network='1 \(Tanh\)' cannot be balanced"):
        balanced(chain(activation=nn.Tanh))
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(Misuse, match="norm1"):
        landscape.plane(finite.residual((1, 8, 8), 3, width=2, generator=generator), balance=True)
    with pytest.raises(Misuse, match="layers"):
        balanced(random_network(Architecture((1, 4, 4), (Conv(2, activation="tanh"),)), (3,), seed=0))


def test_the_callers_network_and_random_numbers_stay():
    network = chain().train()
    network[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    landscape.plane(network, biases=True, balance=True)
    assert network.training
    assert network[3].weight.requires_grad
    assert not network[0].weight.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(
        landscape.plane(network, seed=1).first["0.weight"], landscape.plane(network, seed=1).first["0.weight"]
    )
    assert not torch.equal(
        landscape.plane(network, seed=1).first["0.weight"], landscape.plane(network, seed=2).first["0.weight"]
    )
