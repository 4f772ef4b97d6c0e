"""Section 12 of the theory: clones leave the Hessian in the metric of the flow what it was, beside new directions."""

import pytest
import torch
from strategies import normal, random_network
from torch.nn import functional

from meanfield import Architecture, Conv, measures
from meanfield.landscape import hessian, metric
from meanfield.landscape.objective import Objective
from meanfield.subject import Subject
from meanfield.validation import Misuse

IMAGES, LABELS = normal((7, 1, 4, 4), 3), torch.arange(7) % 3
SHARES = torch.tensor([0.3, 0.7], dtype=torch.float64)
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def network(depth=2):
    layers = [Conv(2, activation="tanh", bias=True), Conv(2, activation="softplus")][:depth]
    return random_network(Architecture((1, 4, 4), layers, outputs=3), (2, 3)[:depth], seed=2)


def spectrum(particles, kind=hessian.Hessian, flow=True):
    objective = Objective(Subject(particles), IMAGES, LABELS)
    scale = metric.inverse_root(particles) if flow else None
    operator = kind(objective, objective.subject.parameters, scale)
    return torch.linalg.eigvalsh(torch.stack([operator(row) for row in torch.eye(operator.size).double()]))


def without(values, others):
    """What is left of values when each of the others has taken its nearest one, and how far that was at most."""
    left, farthest = values.tolist(), 0.0
    for other in others.tolist():
        nearest = min(left, key=lambda value: abs(value - other))
        farthest = max(farthest, abs(nearest - other))
        left.remove(nearest)
    return torch.tensor(left, dtype=torch.float64), farthest


@pytest.mark.parametrize("layer", [0, 1])
def test_clones_keep_every_eigenvalue_and_add_those_of_their_differences(layer):
    whole = network()
    before, size = spectrum(whole), float(spectrum(whole).abs().max())
    added, farthest = without(spectrum(measures.split(whole, layer, 1, SHARES)), before)
    assert farthest < 1e-12 * size
    assert added.abs().max() > 1e-3 * size  # curvature of features, which no clone shares with another
    other, farthest = without(spectrum(measures.split(whole, layer, 1, SHARES.flip(0) ** 2 / 0.58)), before)
    assert farthest < 1e-12 * size
    torch.testing.assert_close(other, added, **CLOSE)
    thrice, _ = without(
        spectrum(measures.split(whole, layer, 1, torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64))), before
    )
    torch.testing.assert_close(thrice, added.repeat_interleave(2).sort().values, **CLOSE)


def test_what_clones_of_one_layer_add_is_the_curvature_of_the_first_variation():
    """V(z, b, u) = (1/N) sum_n <dloss_n/dF, <u, h(z * x_n + b)>>, by itself, at the particle."""
    whole = network(depth=1)
    slope = torch.softmax(whole(IMAGES), 1) - functional.one_hot(LABELS, 3)

    def potential(vector):
        features = functional.conv2d(IMAGES, vector[:4].view(1, 1, 2, 2), vector[4:5]).tanh().mean((2, 3))
        return (slope * features * vector[5:]).sum(1).mean()

    here = torch.cat([whole.kernels[0][1].flatten(), whole.biases[0][1:2], whole.readout[:, 1]])
    wanted = torch.linalg.eigvalsh(torch.autograd.functional.hessian(potential, here))
    added, _ = without(spectrum(measures.split(whole, 0, 1, SHARES)), spectrum(whole))
    torch.testing.assert_close(added, wanted, **CLOSE)


@pytest.mark.parametrize("layer", [0, 1])
def test_clones_add_nothing_to_the_part_of_gauss_and_newton(layer):
    before = spectrum(network(), hessian.GaussNewton)
    added, farthest = without(spectrum(measures.split(network(), layer, 1, SHARES), hessian.GaussNewton), before)
    assert max(farthest, float(added.abs().max())) < 1e-12 * float(before.max())


def test_traces_of_cloned_networks_grow_in_a_line_and_plain_eigenvalues_fall():
    """All particles of one layer split in halves, and in thirds: the trace gains as much each time; Gauss and Newton's
    part keeps it.  Control: the plain Hessian's eigenvalues are divided by the number of clones, or nearly.
    """
    cloned = [network(1)]
    for count in (2, 3):
        particles = network(1)
        for particle in reversed(range(2)):
            particles = measures.split(particles, 0, particle, torch.full((count,), 1 / count, dtype=torch.float64))
        cloned.append(particles)
    flow, gauss, plain = (
        [spectrum(each, **how) for each in cloned] for how in ({}, {"kind": hessian.GaussNewton}, {"flow": False})
    )
    steps = torch.stack([each.sum() for each in flow]).diff()
    assert float(steps[0]) == pytest.approx(float(steps[1]), rel=1e-9)
    assert abs(float(steps[0])) > 1e-3
    for each in gauss[1:]:
        assert float(each.sum()) == pytest.approx(float(gauss[0].sum()), rel=1e-12)
    for each in flow[1:]:
        assert float(each.max()) == pytest.approx(float(flow[0].max()), rel=1e-12)
    for count, each in zip((2, 3), plain[1:]):
        assert float(each.max()) == pytest.approx(float(plain[0].max()) / count, rel=1e-9)


def test_masses_of_zero_are_no_metric():
    whole = network()
    whole.masses[1][:] = torch.tensor([0.0, 0.5, 0.5])
    with pytest.raises(Misuse, match="metric='flow' with masses of zero in layer 1"):
        metric.inverse_root(whole)
