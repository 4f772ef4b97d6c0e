"""Errors through other weights, against steps written down; trainings that follow another one."""

import copy

import pytest
import torch
from strategies import normal, seeded
from torch import nn
from torch.nn import functional

from meanfield.finite import Recipe, fed_back, feedback_aligned, fit, replay, residual
from meanfield.validation import Misuse

IMAGES, LABELS = torch.rand(30, 1, 4, 4, generator=seeded(3), dtype=torch.float64), torch.arange(30) % 3


def small(seed, dropout=0.0):
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(64, 3)]
    network = nn.Sequential(*layers).double()
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=seeded(seed), dtype=torch.float64)
    return network


def recipe(**settings):
    return Recipe(**{"epochs": 2, "batch_size": 8, "learning_rate": 0.05, "milestones": (), **settings})


def gradients(network):
    network.zero_grad()
    functional.cross_entropy(network(IMAGES), LABELS).backward()
    return {name: each.grad.clone() for name, each in network.named_parameters()}


def test_errors_go_through_the_feedback_and_nothing_else_changes():
    network = small(0)
    other = {"0": normal((4, 1, 3, 3), 7), "4": normal((3, 64), 8)}
    fed = fed_back(network, other)
    assert torch.equal(fed(IMAGES), network(IMAGES))
    found, own = gradients(fed), gradients(network)
    torch.testing.assert_close(found["4.weight"], own["4.weight"], rtol=1e-12, atol=1e-15)
    # by hand: error of the logits, down through the feedback, times the slope of tanh, on the images' patches
    error = (torch.softmax(network(IMAGES), 1) - functional.one_hot(LABELS, 3)) / len(IMAGES)
    signal = network[:2](IMAGES)
    below = (error @ other["4"]).reshape(signal.shape) * (1 - signal.square())
    patches = functional.unfold(IMAGES, 3, padding=1)
    wanted = torch.einsum("ntp,nsp->ts", below.flatten(2), patches).reshape(4, 1, 3, 3)
    torch.testing.assert_close(found["0.weight"], wanted, rtol=1e-10, atol=1e-14)
    assert not torch.allclose(found["0.weight"], own["0.weight"], rtol=1e-2)


def test_through_a_convolution_errors_go_by_its_transpose():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = network.double()
    weights = {name: network[int(name)].weight for name in ("0", "2")}
    own = gradients(network)
    for name, found in gradients(fed_back(network, weights)).items():  # the own weights: backpropagation
        torch.testing.assert_close(found, own[name], rtol=1e-11, atol=1e-15)


def test_fixed_random_feedback_is_drawn_once_of_the_size_of_the_weights():
    network = small(0)
    aligned = feedback_aligned(network, seeded(5))
    assert torch.equal(aligned[4].feedback, feedback_aligned(network, seeded(5))[4].feedback)
    size = network[4].weight.detach().square().mean().sqrt()
    assert abs(float(aligned[4].feedback.square().mean().sqrt() / size) - 1) < 5 / (2 * 192) ** 0.5
    before = aligned[4].feedback.clone()
    trained = fit(aligned, IMAGES, LABELS, recipe()).network
    assert torch.equal(trained[4].feedback, before)
    assert not torch.equal(trained[0].weight, network[0].weight)
    plain = small(1)
    plain.load_state_dict({name: each for name, each in trained.state_dict().items() if "feedback" not in name})
    assert torch.equal(plain(IMAGES), trained(IMAGES))
    with pytest.raises(Misuse, match=r"network='Sequential' has no nn\.Linear or nn\.Conv2d"):
        feedback_aligned(nn.Sequential(nn.Flatten()), seeded())
    with pytest.raises(Misuse, match="has no weights for the layer 4"):
        fed_back(network, {"0": network[0].weight})
    with pytest.raises(Misuse, match=r"feedback='1' is no nn\.Linear and no nn\.Conv2d of the network, which are 0, 4"):
        fed_back(network, {name: network[int(name)].weight for name in ("0", "4")} | {"1": IMAGES})


@pytest.mark.parametrize("loop", ["open", "closed"])
def test_the_source_is_trained_as_alone_and_nobody_is_changed(loop):
    source, other = small(0, dropout=0.5), small(1, dropout=0.5)
    before = copy.deepcopy([source.state_dict(), other.state_dict()])
    numbers = torch.get_rng_state()
    found = replay(source, other, IMAGES, LABELS, recipe(augment=True), seed=3, loop=loop)
    alone = fit(source, IMAGES, LABELS, recipe(augment=True), seed=3)
    for name, tensor in alone.network.state_dict().items():
        assert torch.equal(found.source.network.state_dict()[name], tensor)
    for network, kept in zip((source, other), before):
        assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in kept.items())
    assert torch.equal(torch.get_rng_state(), numbers)


def test_an_open_loop_ends_at_the_start_plus_the_displacement():
    source, other = small(0), small(1)
    found = replay(source, other, IMAGES, LABELS, recipe(), seed=3)
    for name, tensor in found.network.state_dict().items():
        wanted = other.state_dict()[name] + (found.source.network.state_dict()[name] - source.state_dict()[name])
        # a rounding of each of the 8 steps: sums of numbers below 2
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=8 * 4 * torch.finfo(torch.float64).eps)
    assert not torch.allclose(found.network[0].weight, source[0].weight, atol=1e-3)


@pytest.mark.parametrize(
    ("loop", "settings"),
    [("open", {}), ("closed", {}), ("closed", {"loss": "squared"}), ("closed", {"penalty": "l2", "strength": 0.1})],
)
def test_who_follows_from_the_same_start_is_the_source(loop, settings):
    """Then the source's weights are the own ones, and every step is one down the own gradient.

    Of a pixel that is zero in every image no weight moves, and none agrees or does not.
    """
    images = IMAGES * (torch.arange(4) > 0)
    flat = [nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double() for _ in range(2)]
    flat[1].load_state_dict(flat[0].state_dict())
    assert set(replay(*flat, images, LABELS, recipe(momentum=0.0), loop=loop).agreement.values()) == {1.0}
    found = replay(small(0), small(0), IMAGES, LABELS, recipe(momentum=0.0, **settings), seed=3, loop=loop)
    for name, tensor in found.source.network.state_dict().items():
        torch.testing.assert_close(found.network.state_dict()[name], tensor, rtol=1e-10, atol=1e-12)
    assert set(found.agreement.values()) == {1.0}


def test_a_closed_loop_takes_the_errors_of_its_own_through_the_weights_of_the_source():
    source, other = small(0), small(1)
    found = replay(
        source, other, IMAGES, LABELS, recipe(epochs=1, batch_size=30, warm_up=0, momentum=0.0), loop="closed"
    )
    fed = fed_back(other, {name: source[int(name)].weight for name in ("0", "4")})
    expected = gradients(fed)
    for name, tensor in found.network.named_parameters():
        wanted = other.state_dict()[name] - 0.05 * expected[name]
        torch.testing.assert_close(tensor.detach(), wanted, rtol=1e-12, atol=1e-14)
    own = gradients(other)["0.weight"]
    assert found.agreement["0.weight"] == pytest.approx(
        float((own.sign() == expected["0.weight"].sign()).double().mean())
    )
    assert found.agreement["4.weight"] == 1.0  # the errors of the last layer are its own


def test_batch_norm_follows_by_its_own_statistics_and_other_layers_are_refused():
    first, second = (residual((1, 4, 4), 3, width=2, blocks=(1,), generator=seeded(seed)) for seed in (0, 1))
    found = replay(first, second, IMAGES.float(), LABELS, recipe(epochs=1), loop="closed")
    assert not torch.equal(found.network.norm1.running_mean, found.source.network.norm1.running_mean)
    with pytest.raises(Misuse, match=r"other='conv1\.weight' is missing there and \(2, 1, 3, 3\) in source"):
        replay(first, small(0), IMAGES, LABELS, recipe())
    with pytest.raises(Misuse, match=r"other='0\.weight' is \(2, 1, 3, 3\) there and \(4, 1, 3, 3\) in source"):
        replay(small(0), nn.Sequential(nn.Conv2d(1, 2, 3)), IMAGES, LABELS, recipe())
    with pytest.raises(Misuse, match="loop='half'"):
        replay(first, second, IMAGES.float(), LABELS, recipe(), loop="half")
