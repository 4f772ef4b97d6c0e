"""Matchings keep functions, and find what was shuffled."""

import itertools

import pytest
import torch
from strategies import normal, random_network
from torch import nn
from torch_networks import KINDS, SMALL, blocks, drawn, normed, shuffled, tensors

import meanfield as mf
from meanfield.fusion import matched
from meanfield.fusion.channels import Channels, chosen, moved
from meanfield.fusion.matching import MATCHINGS, by_weights, correlations, distances
from meanfield.fusion.signals import by_channel, signals
from meanfield.validation import Misuse

methods = pytest.mark.parametrize("method", MATCHINGS)


@methods
@pytest.mark.parametrize("kind", KINDS)
def test_a_matching_keeps_the_function(kind, method):
    a, b = KINDS[kind](4, 0), KINDS[kind](4, 1)
    found = matched(a, b, SMALL, method)
    assert float((found(SMALL) - b(SMALL)).abs().max()) < 1e-10
    assert not all(torch.equal(here, there) for here, there in zip(tensors(found), tensors(b)))


@methods
def test_a_shuffled_network_is_put_back(method):
    layers = [
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.Tanh(),
    ]
    network = drawn(
        nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)), 0
    )
    other = shuffled(network, 1)
    assert not torch.equal(tensors(other)[0], tensors(network)[0])
    assert all(
        torch.equal(here, there)
        for here, there in zip(tensors(network), tensors(matched(network, other, SMALL, method)))
    )


def test_the_assignment_of_weights_is_the_best_of_one_space():
    """All permutations of one hidden layer, one after the other."""
    a, b = (drawn(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), seed) for seed in (0, 1))
    channels = Channels.of(a)

    def apart(order: torch.Tensor) -> float:
        found = moved(b, channels, {1: chosen(order, 5)})
        return sum(float((here - there).square().sum()) for here, there in zip(tensors(a), tensors(found)))

    least = min(apart(torch.tensor(order)) for order in itertools.permutations(range(5)))
    assert apart(by_weights(a, b, channels)[1]) == pytest.approx(least, rel=1e-12)
    assert apart(torch.arange(5)) > 1.05 * least


def test_no_swap_in_a_residual_stream_brings_weights_closer():
    a, b = (KINDS["residual with batch norm"](3, seed) for seed in (0, 1))
    channels = Channels.of(a)
    orders = by_weights(a, b, channels)
    names = [name for name, _ in channels.axes() if name in a.state_dict() and "running" not in name]

    def apart(orders: dict[int, torch.Tensor]) -> float:
        found = moved(b, channels, {space: chosen(each, len(each)) for space, each in orders.items()}).state_dict()
        return sum(float((a.state_dict()[name] - found[name]).square().sum()) for name in names)

    least = apart(orders)
    assert least < apart({space: torch.arange(len(each)) for space, each in orders.items()})
    for space, order in orders.items():
        for i, j in itertools.combinations(range(len(order)), 2):
            swapped = order.clone()
            swapped[[i, j]] = order[[j, i]]
            assert apart(orders | {space: swapped}) >= least - 1e-12


def test_transport_between_equal_widths_is_the_order_of_least_distance():
    """Against all orders of four features, whose distances are added up one by one."""
    a, b = (drawn(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), seed) for seed in (0, 1))
    images = normal((20, 3), 2)
    here, there, put = (each[:2](images) for each in (a, b, matched(a, b, images, "transport")))  # pyright: ignore
    apart = [float((here - there[:, list(order)]).square().sum()) for order in itertools.permutations(range(4))]
    assert float((here - put).square().sum()) == pytest.approx(min(apart), rel=1e-12)
    assert len({round(value, 9) for value in apart}) == 24


@methods
def test_particles_come_back_as_particles_in_the_order_of_the_others(method):
    layers = (mf.Conv(3, activation="tanh", bias=True, pooling="average"), mf.Conv(2, activation="gelu", bias=True))
    network = random_network(mf.Architecture((1, 8, 8), layers, "flatten", outputs=3), (5, 4), 0)
    other = mf.measures.permute(network, [torch.tensor([2, 0, 1, 4, 3]), torch.tensor([1, 0, 3, 2])])
    back = matched(network, other, SMALL, method)
    assert isinstance(back, mf.ParticleNetwork)
    assert all(torch.equal(here, there) for here, there in zip(back.tensors(), network.tensors()))


def test_a_linear_layer_on_sequences_is_refused_where_features_are_compared():
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with pytest.raises(Misuse, match=r"images=\(40, 7, 6\) is the shape in which they come to the Linear 0"):
        matched(network, network, normal((40, 7, 6), 0))


def test_features_are_compared_as_layers_read_them():
    a, b = normed(4, 0), normed(6, 1)
    channels, other = Channels.of(a), Channels.of(b)
    here, there = (network[:8](SMALL).reshape(40, -1, 4).transpose(0, 1).flatten(1) for network in (a, b))  # pyright: ignore
    apart = (here[:, None] - there).square().mean(2)
    torch.testing.assert_close(distances(a, channels, b, other, SMALL)[2], apart, rtol=1e-9, atol=1e-12)
    whole = torch.corrcoef(torch.cat([here, there]))[:8, 8:]
    torch.testing.assert_close(correlations(a, channels, b, other, SMALL)[2], whole, rtol=1e-9, atol=1e-12)


def test_features_of_a_stream_are_compared_at_every_layer_that_reads_it():
    a, b = blocks(4, 0), blocks(4, 1)
    channels = Channels.of(a)
    names = [layer.name for layer in channels.readers(1)]
    (here,), (there,) = (list(signals(each, names, SMALL)) for each in (a, b))
    clouds = [[by_channel(heard[name].entering, 4) for heard in (here, there)] for name in names]
    apart = sum((first[:, None] - second).square().mean(2) for first, second in clouds)
    torch.testing.assert_close(distances(a, channels, b, channels, SMALL)[1], apart, rtol=1e-9, atol=1e-12)
    assert len(names) == 4


def test_a_channel_that_was_split_is_transported_back():
    """b has every channel of a twice, each read with half the weight: at a's width it is a again."""
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3, bias=False), nn.Tanh()]
    a = drawn(nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 3)), 0)
    channels = Channels.of(a)
    twice = {space: torch.arange(channels.widths[space]).repeat(2) for space in channels.hidden}
    rows = {space: chosen(each, channels.widths[space]) for space, each in twice.items()}
    b = moved(a, channels, rows, {space: each / 2 for space, each in rows.items()})
    torch.testing.assert_close(b(SMALL), a(SMALL), rtol=0, atol=1e-12)
    found = matched(a, b, SMALL, "transport")
    for here, there in zip(tensors(a), tensors(found)):
        torch.testing.assert_close(there, here, rtol=0, atol=1e-12)
