import itertools

import pytest
import torch
from strategies import normal, random_network, seeded
from torch import nn
from torch_networks import IMAGES, chain, filled, plain

import meanfield as mf
from meanfield import measures
from meanfield.finite import vgg
from meanfield.landscape.channels import select
from meanfield.landscape.matching import coupled, matched
from meanfield.network import ParticleNetwork
from meanfield.validation import Misuse

pytestmark = pytest.mark.filterwarnings("ignore:Using padding")

ARCHITECTURE = mf.Architecture(
    (2, 6, 6),
    (mf.Conv(3, activation="tanh", bias=True, pooling="average"), mf.Conv(2, activation="gelu", bias=True)),
    "flatten",
    outputs=3,
)
SMALL = normal((40, 2, 6, 6), 5)


def particles(seed, widths=(5, 4)):
    return random_network(ARCHITECTURE, widths, seed)


def normed(seed):
    layers = [nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 6), nn.Tanh()]
    network = filled(nn.Sequential(*layers, nn.Linear(6, 3)), seed)
    network(SMALL)
    return network.eval()


PAIRS = [
    (particles(0), particles(1), SMALL),
    (chain(0), chain(1), SMALL),
    (normed(0), normed(1), SMALL),
    (plain(6, 0).eval(), plain(6, 1).eval(), IMAGES[:40]),
]


@pytest.mark.parametrize(("first", "second", "images"), PAIRS)
def test_a_matching_keeps_the_function(first, second, images):
    found = matched(first, second, images.split(25))
    outputs = second(images).detach()
    assert float((found(images) - outputs).abs().max()) < 1e-10 * float(outputs.abs().max())
    assert not all(torch.equal(a, b) for a, b in zip(parameters(found), parameters(second)))


def test_a_matching_keeps_a_vgg():
    networks = [vgg(11, (1, 8, 8), 10, width=4, generator=seeded(seed), dtype=torch.float64) for seed in (0, 1)]
    images = normal((30, 1, 8, 8), 0)
    found = matched(networks[0], networks[1], [images])
    assert float((found(images) - networks[1].eval()(images).detach()).abs().max()) < 1e-10


@pytest.mark.parametrize("network", [particles(0), chain(0), normed(0)])
def test_a_copy_in_another_order_comes_back(network):
    orders = [torch.randperm(5, generator=seeded(3)), torch.randperm(4, generator=seeded(4))]
    if isinstance(network, ParticleNetwork):
        back = matched(network, measures.permute(network, orders), [SMALL])
        assert all(torch.equal(a, b) for a, b in zip(back.tensors(), network.tensors()))
        return
    widths = [5, 4, 6] if isinstance(network[1], nn.ReLU) else [5, 6]
    orders = [torch.randperm(width, generator=seeded(width)) for width in widths]
    back = matched(network, select(network, orders), [SMALL])
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), network.state_dict().values()))


def test_the_order_is_that_of_least_distance():
    """Against all orders of four features, whose distances are added up one by one."""
    first, second = (filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), seed) for seed in (0, 1))
    images = normal((20, 3), 2)
    a, b, c = (network[:2](images).detach() for network in (first, second, matched(first, second, images.split(7))))
    distances = {order: float((a - b[:, list(order)]).square().sum()) for order in itertools.permutations(range(4))}
    assert float((a - c).square().sum()) == pytest.approx(min(distances.values()), rel=1e-12)
    assert len({round(value, 9) for value in distances.values()}) == 24


@pytest.mark.parametrize(
    ("first", "second", "images"),
    [
        (particles(0), particles(1, (3, 6)), SMALL),
        (plain(6, 0).eval(), plain(4, 1).eval(), IMAGES[:40]),
    ],
)
def test_coupled_networks_are_themselves_pair_by_pair(first, second, images):
    found = coupled(first, second, [images])
    for end, network in ((found.first, first), (found.second, second)):
        torch.testing.assert_close(end(images), network(images).detach(), rtol=1e-10, atol=1e-12)
    shapes = [[tensor.shape for tensor in parameters(end)] for end in (found.first, found.second)]
    assert shapes[0] == shapes[1]
    assert all(float(masses.sum()) == pytest.approx(1) and bool((masses > 0).all()) for masses in found.masses)


def parameters(network):
    return network.tensors() if isinstance(network, ParticleNetwork) else list(network.parameters())


def test_between_equal_masses_the_first_network_stays():
    first, second = chain(0), chain(1)
    found, best = coupled(first, second, [SMALL]), matched(first, second, [SMALL])
    assert all(torch.equal(a, b) for a, b in zip(found.first.parameters(), first.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found.second.parameters(), best.parameters()))


def test_what_cannot_be_matched_is_refused():
    with pytest.raises(Misuse, match=r"b=\(3, 6\) are its widths, and \(5, 4\) those of a"):
        matched(particles(0), particles(1, (3, 6)), [SMALL])
    with pytest.raises(Misuse, match="b=2 layers and a has 4"):
        matched(chain(0), filled(nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(80, 3)), 0), [SMALL])
    sequences = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with pytest.raises(Misuse, match="a='0' is a Linear on tensors"):
        matched(sequences, sequences, [SMALL])


def test_the_networks_stay_as_they_were():
    network = normed(0).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    matched(network, normed(1), [SMALL])
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
