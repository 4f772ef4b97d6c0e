"""The Fisher information: closed forms of linear models, a slow twin, and nothing moved."""

import copy

import pytest
import torch
from strategies import normal, seeded
from torch import nn

from meanfield.finite import residual
from meanfield.forgetting import fisher
from meanfield.validation import Misuse


def linear(inputs, outputs, seed=0):
    network = nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs, dtype=torch.float64))
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.copy_(normal(parameter.shape, seed + index))
    return network


def slow(network, images, classes):
    """Image by image, class by class: p times the square of the gradient of log p."""
    network = copy.deepcopy(network).eval().requires_grad_(True)
    total = {name: torch.zeros_like(each) for name, each in network.named_parameters()}
    for image in images:
        for label in range(len(classes)):
            network.zero_grad()
            log_p = network(image[None])[0, list(classes)].log_softmax(0)[label]
            log_p.backward()
            for name, each in network.named_parameters():
                total[name] += log_p.detach().exp() * each.grad.square() / len(images)
    return total


def test_a_softmax_of_a_linear_model_has_the_variance_of_a_class_times_squared_inputs():
    """log p_c has the gradient (delta_ck - p_k) x in row k, whose mean square over c ~ p is p_k (1 - p_k) x^2."""
    network, images = linear(5, 3), normal((7, 1, 1, 5), 9)
    shares = network(images).softmax(1).detach()
    variance = shares * (1 - shares)
    found = fisher(network, images)
    torch.testing.assert_close(found["1.weight"], variance.T @ images.flatten(1).square() / 7)
    torch.testing.assert_close(found["1.bias"], variance.mean(0))


def test_a_linear_model_with_squared_loss_has_the_squared_inputs():
    network, images = linear(5, 3), normal((7, 1, 1, 5), 9)
    found = fisher(network, images, loss="squared")
    torch.testing.assert_close(found["1.weight"], images.flatten(1).square().mean(0).expand(3, 5))
    torch.testing.assert_close(found["1.bias"], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("batch_norm", [True, False])
def test_it_is_that_of_the_slow_twin_and_moves_nothing(batch_norm, monkeypatch):
    monkeypatch.setattr("meanfield.forgetting.information.ENTRIES", 5000)  # several images at a time, and a rest
    network = residual((1, 4, 4), 5, width=2, batch_norm=batch_norm, generator=seeded(), dtype=torch.float64)
    network.train()(normal((9, 1, 4, 4), 3))  # statistics of its own
    network.get_submodule("stage1").eval()
    network.linear1.bias.requires_grad_(False)
    before, modes = copy.deepcopy(network.state_dict()), [module.training for module in network.modules()]
    images, classes = normal((5, 1, 4, 4), 4), (3, 0, 4)
    found, expected = fisher(network, images, classes), slow(network, images, classes)
    del expected["linear1.bias"]
    assert found.keys() == expected.keys()
    for name, each in found.items():
        torch.testing.assert_close(each, expected[name], rtol=1e-9, atol=1e-14)
    rows = found["linear1.weight"].any(1)
    assert rows.tolist() == [True, False, False, True, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network.linear1.bias.requires_grad
    assert network.conv1.weight.requires_grad


def test_a_network_without_information_is_refused():
    network = linear(5, 3)
    with torch.no_grad():
        network[1].bias.copy_(torch.tensor([1e6, 0.0, 0.0]))
    with pytest.raises(Misuse, match="has no Fisher information: its outputs are certain, to rounding"):
        fisher(network, normal((7, 1, 1, 5), 9))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fisher(linear(5, 3), normal((0, 1, 1, 5), 9)), "images=.* must be at least one image"),
        (lambda: fisher(linear(5, 3), normal((7, 1, 1, 4), 9)), r"images=\(7, 1, 1, 4\) is a shape"),
        (lambda: fisher(linear(5, 3), normal((7, 1, 1, 5), 9), [1, 3]), r"classes=\[1, 3\] .* which are 0\.\.2"),
        (lambda: fisher(linear(5, 3), normal((7, 1, 1, 5), 9), [-1]), "classes=-1 must be an integer of at least 0"),
        (lambda: fisher(linear(5, 3), normal((7, 1, 1, 5), 9), []), "classes=.* must be a group of classes"),
        (lambda: fisher(linear(5, 3), normal((7, 1, 1, 5), 9), [1]), "or as one class competes alone"),
        (lambda: fisher(linear(5, 3).requires_grad_(False), normal((7, 1, 1, 5), 9)), "no parameter that needs a grad"),
    ],
)
def test_misuse(call, message):
    with pytest.raises(Misuse, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
