import pytest
import torch
from strategies import normal, random_network
from torch_networks import IMAGES, KINDS, SMALL, chain, plain

import meanfield as mf
from meanfield.fusion import matched
from meanfield.landscape.coupling import coupled
from meanfield.network import ParticleNetwork

pytestmark = pytest.mark.filterwarnings("ignore:Using padding")

LAYERS = (mf.Conv(3, activation="tanh", bias=True, pooling="average"), mf.Conv(2, activation="gelu", bias=True))
ARCHITECTURE = mf.Architecture((2, 6, 6), LAYERS, "flatten", outputs=3)
MAPS = normal((40, 2, 6, 6), 5)

PAIRS = {
    "particles": (random_network(ARCHITECTURE, (5, 4), 0), random_network(ARCHITECTURE, (3, 6), 1), MAPS),
    "chain": (plain(6, 0).eval(), plain(4, 1).eval(), IMAGES[:40]),
    **{kind: (make(4, 0), make(3, 1), SMALL) for kind, make in KINDS.items()},
}


def parameters(network):
    return network.tensors() if isinstance(network, ParticleNetwork) else list(network.parameters())


@pytest.mark.parametrize("kind", PAIRS)
def test_coupled_networks_are_themselves_pair_by_pair(kind):
    first, second, images = PAIRS[kind]
    found = coupled(first, second, images)
    for end, network in ((found.first, first), (found.second, second)):
        torch.testing.assert_close(end(images), network(images), rtol=1e-10, atol=1e-12)
    shapes = [[tensor.shape for tensor in parameters(end)] for end in (found.first, found.second)]
    assert shapes[0] == shapes[1]
    assert all(float(masses.sum()) == pytest.approx(1) and bool((masses > 0).all()) for masses in found.masses)


def test_between_equal_masses_the_first_network_stays():
    first, second = chain(0), chain(1)
    found, best = coupled(first, second, MAPS), matched(first, second, MAPS, "transport")
    assert all(torch.equal(a, b) for a, b in zip(found.first.parameters(), first.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found.second.parameters(), best.parameters()))
