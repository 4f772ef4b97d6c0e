"""The description of channels, and what it refuses."""

import pytest
import torch
from strategies import random_network
from torch import nn
from torch_networks import KINDS, SMALL, blocks, drawn, normed, shuffled

import meanfield as mf
from meanfield.fusion import fuse
from meanfield.fusion.channels import Channels, Layer, copied
from meanfield.validation import Misuse


def test_a_chain_names_layers_spaces_and_norms():
    found = Channels.of(normed(4, 0))
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
    torch.testing.assert_close(found(SMALL), network(SMALL), rtol=0, atol=1e-13)
    assert any(not torch.equal(here, there) for here, there in zip(network.parameters(), found.parameters()))


def test_a_layer_that_is_moved_with_the_wrong_space_is_another_function():
    """The control: one tensor left where it was."""
    network = normed(4, 1)
    found = shuffled(network, 2)
    found[1].running_mean.copy_(network[1].running_mean)  # pyright: ignore
    assert float((found(SMALL) - network(SMALL)).abs().max()) > 1e-3


class Own(nn.Sequential):
    """Of the user, with nothing of its own but the name."""


def sloped(width: int, seed: int, slope: int = 1) -> nn.Module:
    """Nested, one activation in two places, slopes of channels and of positions, unknown modules at both ends."""
    shared = nn.Tanh()
    body = Own(nn.Conv2d(2, width, 3), nn.PReLU(width), nn.MaxPool2d(2), shared, nn.Conv2d(width, 4, 2), shared)
    head = nn.Sequential(nn.Flatten(), nn.PReLU(16), nn.Linear(16, 7), nn.PReLU(slope), nn.Linear(7, 3))
    return drawn(nn.Sequential(nn.ZeroPad2d(1), body, head, nn.LogSoftmax(1)), seed)


@pytest.mark.parametrize("slope", [1, 7])
def test_slopes_go_with_their_channels(slope):
    a, b, images = sloped(5, 0, slope), sloped(5, 1, slope), SMALL[:, :, :6, :6].expand(-1, 2, -1, -1)
    found = shuffled(b, 2)
    torch.testing.assert_close(found(images), b(images), rtol=0, atol=1e-13)
    slopes = "1.1.weight"
    assert not torch.equal(found.state_dict()[slopes], b.state_dict()[slopes])
    average = fuse(a, b, images, "average").state_dict()
    for name in (slopes, "2.3.weight"):
        torch.testing.assert_close(average[name], (a.state_dict()[name] + b.state_dict()[name]) / 2)
    with pytest.raises(Misuse, match="choose 'ensemble'"):
        fuse(a, b, images)
    ends = [each[:3] for each in (a, sloped(6, 1, slope))]  # pyright: ignore
    mean = sum(each(images) for each in ends) / 2
    torch.testing.assert_close(fuse(*ends, images)(images), mean, rtol=0, atol=1e-12)


def test_unknown_modules_at_the_ends_must_be_the_same():
    ends = [nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)) for _ in range(2)]
    first = Channels.of(ends[0])
    first.require_alike(Channels.of(ends[1]), "b")
    ends[1][1].bias.data += 1
    with pytest.raises(Misuse, match=r"b='LayerNorm.* of tensors .*' is where the first network has LayerNorm"):
        first.require_alike(Channels.of(ends[1]), "b")


@pytest.mark.parametrize("readout", ["average", "flatten"])
def test_particles_and_finite_networks_come_as_chains(readout):
    layer = mf.Conv(3, activation="tanh", bias=True)
    network = random_network(mf.Architecture((1, 8, 8), (layer, mf.Conv(2)), readout, 3), (4, 3), 0)
    for each in (network, mf.finite.sample(network, (5, 6), torch.Generator().manual_seed(0))):
        found = copied(each, "a")
        assert Channels.of(found).hidden_widths == each.widths
        torch.testing.assert_close(found(SMALL), each(SMALL))


class Odd(nn.Module):
    def forward(self, x):
        return x.flip(1)


SHARED = nn.Linear(3, 3)
REFUSED = {
    "1 Odd": [nn.Linear(2, 3), Odd(), nn.Linear(3, 2)],
    "1 Softmax": [nn.Linear(2, 3), nn.Softmax(1), nn.Linear(3, 2)],
    "1 LayerNorm": [nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2)],
    "0 PReLU": [nn.PReLU(), nn.Linear(3, 2)],
    "0 Conv2d": [nn.Conv2d(2, 4, 3, groups=2)],
    "1 Linear": [nn.Conv2d(2, 4, 3), nn.Linear(4, 2)],
    "1 Conv2d": [nn.Flatten(), nn.Conv2d(2, 4, 3)],
    "0 BatchNorm1d": [nn.BatchNorm1d(2), nn.Linear(2, 3)],
    "1 BatchNorm1d": [nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)],
    "1": [nn.Linear(2, 3), nn.BatchNorm1d(3)],
    "2 Linear": [SHARED, nn.ReLU(), SHARED],
    "1 Flatten": [nn.Conv2d(2, 3, 3), nn.Flatten(2), nn.Linear(4, 2)],
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
    first, wide = Channels.of(normed(4, 0)), Channels.of(normed(6, 0))
    first.require_alike(wide, "b")
    relu = nn.Sequential(*[nn.ReLU() if isinstance(each, nn.Tanh) else each for each in normed(4, 0)])  # pyright: ignore
    with pytest.raises(Misuse, match=r"b='ReLU\(\)' is where the first network has Tanh\(\)"):
        first.require_alike(Channels.of(relu), "b")
    short, more = (Channels.of(drawn(nn.Sequential(nn.Linear(2, size)), 0)) for size in (3, 4))
    with pytest.raises(Misuse, match="b=4 is its number of outputs, not 3"):
        short.require_alike(more, "b")


def test_shapes_of_modules_follow_their_tensors():
    found = fuse(normed(4, 0), normed(4, 1), SMALL, "union")
    assert [found[0].out_channels, found[1].num_features, found[4].in_channels] == [8, 8, 8]  # pyright: ignore
    assert (found[8].in_features, found[8].out_features) == (64, 10)  # pyright: ignore
