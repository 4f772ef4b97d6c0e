"""Matchings keep functions, and find what was shuffled."""

import itertools

import pytest
import torch
from fusion_networks import IMAGES, KINDS, drawn, plain, shuffled, tensors
from torch import nn

from meanfield.fusion import matched
from meanfield.fusion.channels import Channels, chosen, moved
from meanfield.fusion.matching import MATCHINGS, by_weights, correlations, distances

methods = pytest.mark.parametrize("method", MATCHINGS)


@methods
@pytest.mark.parametrize("kind", KINDS)
def test_a_matching_keeps_the_function(kind, method):
    a, b = KINDS[kind](4, 0), KINDS[kind](4, 1)
    found = matched(a, b, IMAGES, method)
    assert float((found(IMAGES) - b(IMAGES)).abs().max()) < 1e-10
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
        for here, there in zip(tensors(network), tensors(matched(network, other, IMAGES, method)))
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


def test_features_are_compared_as_layers_read_them():
    a, b = plain(4, 0), plain(6, 1)
    channels, other = Channels.of(a), Channels.of(b)
    here, there = (network[:8](IMAGES).reshape(40, -1, 4).transpose(0, 1).flatten(1) for network in (a, b))  # pyright: ignore
    apart = (here[:, None] - there).square().mean(2)
    torch.testing.assert_close(distances(a, channels, b, other, IMAGES)[2], apart, rtol=1e-9, atol=1e-12)
    whole = torch.corrcoef(torch.cat([here, there]))[:8, 8:]
    torch.testing.assert_close(correlations(a, channels, b, other, IMAGES)[2], whole, rtol=1e-9, atol=1e-12)


def test_a_channel_that_was_split_is_transported_back():
    """b has every channel of a twice, each read with half the weight: at a's width it is a again."""
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 3, 3, bias=False), nn.Tanh()]
    a = drawn(nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 3)), 0)
    channels = Channels.of(a)
    twice = {space: torch.arange(channels.widths[space]).repeat(2) for space in channels.hidden}
    rows = {space: chosen(each, channels.widths[space]) for space, each in twice.items()}
    b = moved(a, channels, rows, {space: each / 2 for space, each in rows.items()})
    torch.testing.assert_close(b(IMAGES), a(IMAGES), rtol=0, atol=1e-12)
    found = matched(a, b, IMAGES, "transport")
    for here, there in zip(tensors(a), tensors(found)):
        torch.testing.assert_close(there, here, rtol=0, atol=1e-12)
