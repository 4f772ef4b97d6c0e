import numpy as np
import pytest
import torch
from strategies import normal, random_network
from torch import nn
from torch_networks import chain, filled

import meanfield as mf
from meanfield import landscape
from meanfield.landscape.directions import Plane
from meanfield.landscape.trajectory import walks
from meanfield.subject import Subject
from meanfield.validation import Misuse

IMAGES, LABELS = normal((30, 2, 6, 6), 5), torch.arange(30) % 3
SPOTS = [(1.0, 2.0), (0.5, -1.0), (0.25, 0.5), (0.0, 0.0)]


def oblique(network):
    """Directions that are neither orthogonal nor of unit length."""
    origin = Subject(network).parameters
    first = {name: 3 * normal(tensor.shape, index) for index, (name, tensor) in enumerate(origin.items())}
    second = {
        name: 0.1 * normal(tensor.shape, 50 + index) + first[name]
        for index, (name, tensor) in enumerate(origin.items())
    }
    return Plane(origin, first, second, "triangle")


def states(plane, across=None):
    found = [plane.at(*spot) for spot in SPOTS]
    if across is not None:
        found[1] = {name: tensor + across[name] for name, tensor in found[1].items()}
    return found


def test_a_path_in_a_plane_gets_its_coordinates_back():
    network = chain(0)
    plane = oblique(network)
    found = landscape.trajectory(states(plane), IMAGES, LABELS, network=network, plane=plane, held_out=(IMAGES, LABELS))
    torch.testing.assert_close(found.coordinates, torch.tensor(SPOTS, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert float(found.residuals.max()) < 1e-10
    assert found.explained == pytest.approx(1, rel=1e-12)
    assert found.null is None
    for name, values in found.figures.items():
        torch.testing.assert_close(values, found.plane_figures[name], rtol=1e-9, atol=1e-12)
    for spot, loss in zip(SPOTS, found.figures["train loss"]):
        there = Subject(network).at(plane.at(*spot))
        assert float(loss) == pytest.approx(
            float(nn.functional.cross_entropy(there(IMAGES), LABELS).detach()), rel=1e-10
        )


def test_what_lies_off_the_plane_is_its_residual_and_changes_the_loss():
    network = chain(0)
    plane = oblique(network)
    across = landscape.plane(network, seed=9, normalise="none", biases=True).first
    shares = {name: tensor.clone() for name, tensor in across.items()}
    spot, distance = plane.coordinates({name: plane.origin[name] + shares[name] for name in shares})
    shares = {name: shares[name] - spot[0] * plane.first[name] - spot[1] * plane.second[name] for name in shares}
    found = landscape.trajectory(states(plane, shares), IMAGES, LABELS, network=network, plane=plane)
    torch.testing.assert_close(found.coordinates, torch.tensor(SPOTS, dtype=torch.float64), rtol=1e-8, atol=1e-8)
    assert found.residuals.tolist() == pytest.approx([0, distance, 0, 0], abs=1e-8)
    whole = float(found.distances.square().sum())
    assert found.explained == pytest.approx(1 - distance**2 / whole, rel=1e-10)
    gap = (found.figures["train loss"] - found.plane_figures["train loss"]).abs()
    assert float(gap[1]) > 1e-3 > float(gap[[0, 2, 3]].max())


def test_principal_components_explain_what_the_singular_values_say():
    """The last checkpoint is the origin: no mean is taken off."""
    networks = [chain(seed) for seed in range(6)]
    found = landscape.trajectory(networks, draws=20)
    rows = torch.stack([nn.utils.parameters_to_vector(network.parameters()) for network in networks]).detach()
    values = torch.linalg.svdvals(rows[:-1] - rows[-1]).square()
    assert found.explained == pytest.approx(float(values[:2].sum() / values.sum()), rel=1e-10)
    assert found.coordinates[-1].tolist() == pytest.approx([0, 0], abs=1e-12)
    torch.testing.assert_close(found.distances, (rows - rows[-1]).norm(dim=1))
    inside = found.distances.square() - found.residuals.square()
    assert float(inside.sum() / found.distances.square().sum()) == pytest.approx(found.explained, rel=1e-10)
    assert not found.figures
    assert found.null is not None
    assert found.null.low <= found.null.value <= found.null.high


def brute(lengths, dimension, draws, seed):
    """Walks drawn step by step in all dimensions."""
    generator, shares = np.random.default_rng(seed), []
    for _ in range(draws):
        steps = generator.standard_normal((len(lengths), dimension))
        steps *= (lengths / np.linalg.norm(steps, axis=1))[:, None]
        places = np.vstack([np.zeros(dimension), steps.cumsum(0)])
        values = np.square(np.linalg.svd(places[:-1] - places[-1], compute_uv=False))
        shares.append(values[:2].sum() / values.sum())
    return np.array(shares)


@pytest.mark.parametrize(("count", "dimension"), [(6, 4), (3, 3), (6, 40)])
def test_walks_by_their_gram_matrix_are_those_drawn_in_full(count, dimension):
    lengths = torch.linspace(2, 0.5, count, dtype=torch.float64)
    ours, theirs = walks(lengths, dimension, 4000, seed=1).numpy(), brute(lengths.numpy(), dimension, 4000, seed=2)
    for moment in (1, 2):
        a, b = (np.power(each, moment) for each in (ours, theirs))
        assert abs(a.mean() - b.mean()) < 5 * np.sqrt((a.var() + b.var()) / 4000)


@pytest.mark.parametrize("count", [40, 250])
def test_walks_in_many_dimensions_are_the_closed_form(count):
    """Below and above the size from which two singular values are found and not all."""
    places = np.arange(1, count + 1)
    values = 1 / np.sin((2 * places - 1) * np.pi / (4 * count + 2)) ** 2
    shares = walks(torch.ones(count, dtype=torch.float64), 10**12, 2)
    assert shares.tolist() == pytest.approx([values[:2].sum() / values.sum()] * 2, rel=1e-5)
    assert values[:2].sum() / values.sum() == pytest.approx(8 / np.pi**2 * (1 + 1 / 9), abs=0.001)


def test_what_the_plane_does_not_see_is_named():
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    network = filled(nn.Sequential(*layers), 0)
    kept = []
    for seed in range(4):
        network(normal((20, 2, 6, 6), seed))
        kept.append({name: tensor + 0.1 * seed for name, tensor in network.state_dict().items()})
        kept[-1]["4.weight"] = normal((3, 64), seed)
    found = landscape.trajectory(kept, IMAGES, LABELS, network=network, draws=2)
    assert "not seen by the plane, and held at one value: 1.running_mean, 1.running_var" in found.warnings
    architecture = mf.Architecture((2, 6, 6), (mf.Conv(3, activation="tanh"),), outputs=3)
    particles = [random_network(architecture, (3,), seed) for seed in range(4)]
    assert any("masses.0" in warning for warning in landscape.trajectory(particles, draws=2).warnings)
    assert network.training


def test_checkpoints_that_span_no_plane_are_refused():
    with pytest.raises(Misuse, match="checkpoints=2"):
        landscape.trajectory([chain(0), chain(1)])
    with pytest.raises(Misuse, match="draws=0"):
        landscape.trajectory([chain(0), chain(1), chain(2)], draws=0)
