"""The description of channels, and what it refuses."""

import pytest
import torch
from fusion_networks import IMAGES, KINDS, blocks, drawn, plain, shuffled
from strategies import random_network
from torch import nn

import meanfield as mf
from meanfield.fusion import fuse
from meanfield.fusion.channels import Channels, Layer, copied
from meanfield.validation import Misuse


def test_a_chain_names_layers_spaces_and_norms():
    found = Channels.of(plain(4, 0))
    assert found.widths == (1, 4, 8, 5, 3)
    assert found.layers == (Layer("0", 0, 1, "1"), Layer("4", 1, 2), Layer("8", 2, 3, "9"), Layer("11", 3, 4))
    assert found.norms == {"1": 1, "9": 3}
    assert found.is_chain


def test_blocks_that_add_to_a_stream_share_its_channels():
    found = Channels.of(blocks(4, 0))
    assert found.hidden_widths == (4, 4, 4, 8, 8)
    stream = [layer.name for layer in found.layers if layer.target == 1]
    assert stream == ["conv1", "stage1.0.conv2", "stage1.1.conv2"]
    assert [layer.name for layer in found.readers(1)] == [
        *("stage1.0.conv1", "stage1.1.conv1", "stage2.0.conv1", "stage2.0.shortcut"),
    ]
    assert not found.is_chain


@pytest.mark.parametrize("kind", KINDS)
def test_another_order_of_channels_is_the_same_function(kind):
    network = KINDS[kind](4, 1)
    found = shuffled(network, 2)
    torch.testing.assert_close(found(IMAGES), network(IMAGES), rtol=0, atol=1e-13)
    assert any(not torch.equal(here, there) for here, there in zip(network.parameters(), found.parameters()))


def test_a_layer_that_is_moved_with_the_wrong_space_is_another_function():
    """The control: one tensor left where it was."""
    network = plain(4, 1)
    found = shuffled(network, 2)
    found[1].running_mean.copy_(network[1].running_mean)  # pyright: ignore
    assert float((found(IMAGES) - network(IMAGES)).abs().max()) > 1e-3


@pytest.mark.parametrize("readout", ["average", "flatten"])
def test_particles_and_finite_networks_come_as_chains(readout):
    layer = mf.Conv(3, activation="tanh", bias=True)
    network = random_network(mf.Architecture((1, 8, 8), (layer, mf.Conv(2)), readout, 3), (4, 3), 0)
    for each in (network, mf.finite.sample(network, (5, 6), torch.Generator().manual_seed(0))):
        found = copied(each, "a")
        assert Channels.of(found).hidden_widths == each.widths
        torch.testing.assert_close(found(IMAGES), each(IMAGES))


class Odd(nn.Module):
    def forward(self, x):
        return x.flip(1)


SHARED = nn.Linear(3, 3)
REFUSED = {
    "1 Odd": [nn.Linear(2, 3), Odd(), nn.Linear(3, 2)],
    "1 Softmax": [nn.Linear(2, 3), nn.Softmax(1), nn.Linear(3, 2)],
    "1 PReLU": [nn.Linear(2, 3), nn.PReLU(3), nn.Linear(3, 2)],
    "0 Conv2d": [nn.Conv2d(2, 4, 3, groups=2)],
    "1 Linear": [nn.Conv2d(2, 4, 3), nn.Linear(4, 2)],
    "0 BatchNorm1d": [nn.BatchNorm1d(2), nn.Linear(2, 3)],
    "1 BatchNorm1d": [nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)],
    "1": [nn.Linear(2, 3), nn.BatchNorm1d(3)],
    "2 Linear": [SHARED, nn.ReLU(), SHARED],
    "1 Flatten": [nn.Conv2d(2, 3, 3), nn.Flatten(2)],
    "Sequential": [nn.ReLU()],
    "0 ParametrizedLinear": [nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))],
}


@pytest.mark.parametrize("place", REFUSED)
def test_what_cannot_be_described_is_refused_by_the_name_of_the_layer(place):
    with pytest.raises(Misuse) as caught:
        Channels.of(nn.Sequential(*REFUSED[place]), "a")
    assert (caught.value.argument, caught.value.value) == ("a", place)


def test_a_block_at_an_end_and_a_hook_are_refused():
    inner = blocks(4, 0)
    with pytest.raises(Misuse, match="ends in a residual block"):
        Channels.of(nn.Sequential(*list(inner)[:3]))  # pyright: ignore
    with pytest.raises(Misuse, match="adds to the images"):
        Channels.of(nn.Sequential(inner.stage1, nn.Flatten(), nn.Linear(256, 2)))  # pyright: ignore
    inner.relu1.register_forward_hook(lambda *_: None)  # pyright: ignore
    with pytest.raises(Misuse, match="relu1 ReLU' has hooks"):
        Channels.of(inner)
    with pytest.raises(TypeError, match="a must be a torch"):
        copied(3, "a")  # pyright: ignore


def test_networks_of_another_form_are_refused_and_other_widths_are_not():
    first, wide = Channels.of(plain(4, 0)), Channels.of(plain(6, 0))
    first.require_alike(wide, "b")
    relu = nn.Sequential(*[nn.ReLU() if isinstance(each, nn.Tanh) else each for each in plain(4, 0)])  # pyright: ignore
    with pytest.raises(Misuse, match=r"b='ReLU\(\)' is where the first network has Tanh\(\)"):
        first.require_alike(Channels.of(relu), "b")
    short, more = (Channels.of(drawn(nn.Sequential(nn.Linear(2, size)), 0)) for size in (3, 4))
    with pytest.raises(Misuse, match="b=4 is its number of outputs, not 3"):
        short.require_alike(more, "b")


def test_shapes_of_modules_follow_their_tensors():
    found = fuse(plain(4, 0), plain(4, 1), IMAGES, "union")
    assert [found[0].out_channels, found[1].num_features, found[4].in_channels] == [8, 8, 8]  # pyright: ignore
    assert (found[8].in_features, found[8].out_features) == (64, 10)  # pyright: ignore
