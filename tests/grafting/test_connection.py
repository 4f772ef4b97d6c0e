"""Connecting layers: the design that least squares sees is what the layer multiplies, entry by entry."""

from __future__ import annotations

import copy

import pytest
import torch
from strategies import normal
from torch import Tensor, nn
from torch_networks import IMAGES, filled, plain

from meanfield.grafting import graft
from meanfield.grafting.connection import Connection, is_linear, own, widened

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2)},
    {"kernel_size": (3, 2), "dilation": (1, 2), "padding": "same"},
    {"kernel_size": 2, "padding": "valid", "dilation": 2, "stride": 3},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": (3, 2), "padding": (1, 0), "padding_mode": "reflect"},
    {"kernel_size": (4, 3), "padding": "same", "padding_mode": "replicate"},
]


def conv(channels: int = 2, outputs: int = 3, **geometry) -> nn.Conv2d:
    return filled(nn.Conv2d(channels, outputs, **{"kernel_size": 2, **geometry}), 1).requires_grad_(False)


def linear(inputs: int, outputs: int = 3) -> nn.Linear:
    return filled(nn.Linear(inputs, outputs), 1).requires_grad_(False)


def check_design(connection: Connection, signal: Tensor) -> None:
    """weights' design + bias = the layer's output, column by column."""
    design, columns = connection.design(signal), connection.columns(connection(signal))
    assert columns.shape[1:] == design.shape[design.ndim - columns.ndim + 1 :]
    rows = connection.weights.T @ design.reshape(len(connection.weights), -1)
    torch.testing.assert_close(rows + connection.layer.bias[:, None], columns.flatten(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("size", [None, (3, 9)])
def test_the_design_of_a_convolution_times_its_weights_is_its_output(geometry, size):
    check_design(Connection(conv(**geometry), size), normal((4, 2, 6, 7), 0))


@pytest.mark.parametrize(
    ("shape", "units", "flat"), [((5, 4), 4, False), ((5, 6, 4), 4, False), ((5, 2, 3, 4), 24, True)]
)
def test_the_design_of_a_matrix_times_its_weights_is_its_output(shape, units, flat):
    check_design(Connection(linear(units), flat=flat), normal(shape, 0))


def test_features_are_clouds_over_images_and_positions():
    maps, vectors, words = normal((4, 2, 3, 5), 0), normal((4, 6), 1), normal((4, 3, 6), 2)
    assert torch.equal(Connection(conv()).cloud(maps)[1], maps[:, 1].flatten())
    assert torch.equal(Connection(linear(6)).cloud(vectors)[5], vectors[:, 5])
    assert torch.equal(Connection(linear(6)).cloud(words)[5], words[..., 5].flatten())
    assert torch.equal(Connection(linear(30), flat=True).cloud(maps)[16], maps[:, 1, 0, 1])
    assert (Connection(conv()).features, Connection(linear(6)).features) == (2, 6)


def test_maps_are_averaged_over_the_pixels_that_an_output_pixel_overlaps():
    rows = torch.tensor([[[[1.0, 2.0, 4.0]]]])
    resampled = lambda size: Connection(conv(), size).resampled(rows)[0, 0].tolist()  # noqa: E731
    assert resampled(None) == [[1, 2, 4]]
    assert resampled((1, 2)) == [[1.5, 3]]
    assert resampled((2, 6)) == [[1, 1, 2, 2, 4, 4]] * 2


def test_weights_are_put_into_a_copy():
    connection = Connection(conv(), (4, 4))
    before, weights, signal = copy.deepcopy(connection.layer.state_dict()), normal((8, 3), 2), normal((2, 2, 5, 5), 3)
    moved = connection.with_weights(weights, torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(moved.weights, weights)
    assert moved.layer.bias.tolist() == [1, 2, 3]
    assert torch.equal(connection.with_weights(weights, None).layer.bias, connection.layer.bias)
    assert all(torch.equal(before[name], tensor) for name, tensor in connection.layer.state_dict().items())
    same = connection.with_weights(connection.weights, connection.layer.bias)
    assert torch.equal(same(signal), connection(signal))
    single = copy.deepcopy(connection).float().with_weights(weights, None)
    assert torch.equal(single.weights, weights.float())
    bare = Connection(filled(nn.Conv2d(2, 3, 2, bias=False), 1).requires_grad_(False))
    assert bare.with_weights(weights, torch.ones(3)).layer.bias is None


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 4), (3, 5, 4)])
def test_what_is_no_linear_layer_gets_the_identity_in_front(shape):
    signal = normal(shape, 0)
    found = own(nn.ReLU(), signal)
    assert isinstance(found, nn.Conv2d if len(shape) == 4 else nn.Linear)
    assert torch.equal(found(signal), signal)
    assert found.weight.shape[:2] == (4, 4)


def test_linear_layers_are_their_own():
    for layer, signal in ((conv(), IMAGES), (linear(4), normal((3, 4), 0))):
        found = own(layer, signal)
        assert found is not layer
        assert torch.equal(found(signal), layer(signal))
    grouped = filled(nn.Conv2d(4, 4, 3, groups=2), 0)
    assert not is_linear(grouped)
    assert own(grouped, normal((2, 4, 5, 5), 0)).kernel_size == (1, 1)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_widened_convolution_keeps_its_geometry(geometry):
    """It is that of the layer: with the same kernels on one channel, the same output."""
    layer = conv(1, **geometry)
    found = widened(layer, 5)
    assert not found.weight.any()
    assert not found.bias.any()
    signal = normal((2, 5, 8, 9), 0)
    with torch.no_grad():
        found.weight[:, 3:4] = layer.weight
    torch.testing.assert_close(found(signal) + layer.bias[:, None, None], layer(signal[:, 3:4]), rtol=0, atol=1e-12)
    assert widened(filled(nn.Conv2d(2, 3, 2, bias=False), 0), 5).bias is None


def test_a_widened_matrix_is_a_matrix():
    found = widened(linear(4), 7)
    assert found.weight.shape == (3, 7)
    assert not any(parameter.any() for parameter in found.parameters())
    assert found.weight.dtype == torch.float64


def test_grouped_convolutions_get_a_layer_in_front():
    def make(seed: int) -> nn.Sequential:
        return filled(nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.ReLU()), seed)  # type: ignore[return-value]

    found = graft(make(0), make(1), "2", IMAGES)
    assert found.network.connection.layer.kernel_size == (1, 1)
    assert graft(make(0), make(0), "2", IMAGES).error < 1e-24


def test_layers_that_do_more_than_a_convolution_are_left_alone():
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    upper = filled(
        nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), Standardised(5, 4, 3), nn.Flatten(), nn.Linear(256, 3)), 0
    )
    assert graft(upper, upper, "2", IMAGES, "match").error < 1e-24
    hooked = plain(5, 0)
    hooked[3].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert graft(hooked, hooked, "3", IMAGES, "match").error < 1e-24
    with pytest.raises(ValueError, match=r"layer is a Conv1d on \(9, 3, 9\): only maps"):
        graft(*[filled(nn.Sequential(nn.Conv1d(2, 3, 2), nn.Conv1d(3, 2, 2)), 0)] * 2, "1", normal((9, 2, 10), 0))
