import copy
import math
import random

import numpy as np
import pytest
import torch
from scipy import optimize
from strategies import normal, random_network, seeded
from torch import nn
from torch.nn import functional
from torch_networks import filled

from meanfield import Architecture, Conv, landscape
from meanfield.landscape import hessian
from meanfield.landscape.objective import Objective
from meanfield.subject import Subject
from meanfield.validation import Misuse

IMAGES, LABELS = normal((20, 1, 6, 6), 3), torch.arange(20) % 3
CURVATURES = torch.cat(
    [torch.tensor([-0.25]), torch.linspace(0, 0.1, 35), torch.tensor([0.75, 1.5, 2.0, 4.0])]
).double()


def small(activation=nn.Tanh):
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), activation(), nn.Dropout(), nn.MaxPool2d(2), nn.Flatten()]
    return filled(nn.Sequential(*layers, nn.Linear(8, 3)), 0).train()


def bowl():
    """A linear network w with the mean loss 1/2 w^T H w + g^T w, and H, g, w: images are eigenvectors of H."""
    turned = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=seeded(0))).Q
    images = math.sqrt(40) * turned.T
    pull = normal((40,), 1)

    def loss(outputs, targets):
        return 0.5 * CURVATURES[targets] * outputs[:, 0].square() + pull[targets] * outputs[:, 0]

    bend, slope = turned @ torch.diag(CURVATURES) @ turned.T, images.T @ pull / 40
    network = filled(nn.Linear(40, 1, bias=False), 5)
    return network, images, torch.arange(40), loss, bend, slope, network.weight.detach()[0]


def test_a_quadratic_loss_shows_its_known_spectrum():
    network, images, targets, loss, bend, _, weight = bowl()
    found = landscape.sharpness(network, images, targets, loss=loss, measures=("top", "smallest"), tolerance=1e-9)
    for each, value in ((found.top, 4.0), (found.smallest, -0.25)):
        assert each.value == pytest.approx(value, abs=1e-8)
        assert each.high - each.low < 1e-7
    traces = ("trace", "gauss_newton", "element_trace")
    found = landscape.sharpness(network, images, targets, loss=loss, measures=traces)
    wanted = float(CURVATURES.sum())
    elements = float(weight.square() @ bend.diagonal())
    for each, value in ((found.trace, wanted), (found.gauss_newton, wanted), (found.element_trace, elements)):
        assert 0 < abs(each.value - value) < 4 * each.error < 0.2 * abs(value)
    assert found.mean_curvature.value == found.trace.value / 40
    assert (found.size, found.products) == (40, dict.fromkeys(traces, 30))
    exact = landscape.sharpness(network, images, targets, loss=loss, measures=traces, products=40)
    values = [exact.trace.value, exact.gauss_newton.value, exact.element_trace.value]
    assert values == pytest.approx([wanted, wanted, elements], rel=1e-10)


def test_rises_of_a_quadratic_loss_have_their_mean_in_the_interval():
    """One row: d is uniform on the sphere of |w|, so that the mean is (epsilon |w|)^2 / 2 times the mean curvature."""
    network, images, targets, loss, bend, slope, weight = bowl()
    found = landscape.sharpness(
        network, images, targets, loss=loss, measures="rise", directions=400, epsilon=0.5, seed=2
    )
    length = 0.5 * float(weight.norm())
    mean = length**2 / 2 * float(CURVATURES.sum()) / 40
    assert found.rise.low <= mean <= found.rise.high
    assert found.rise.high - found.rise.low < mean * 2
    most = length * float((slope + bend @ weight).norm()) + length**2 / 2 * 4
    assert found.rise.high < found.largest_rise.value < most
    assert found.largest_rise.high == math.inf


def highest(bend, slope, radius):
    """The largest 1/2 t^T A t + b^T t on |t| = radius, by the secular equation |(m - A)^{-1} b| = radius."""
    values, vectors = np.linalg.eigh(bend)
    along = vectors.T @ slope
    start, end = values[-1] + 1e-12, values[-1] + np.linalg.norm(slope) / radius + 1
    shift = optimize.brentq(lambda m: np.linalg.norm(along / (m - values)) - radius, start, end)
    best = along / (shift - values)
    return 0.5 * values @ best**2 + along @ best


@pytest.mark.parametrize("rho", [0.1, 3.0])
def test_adaptive_sharpness_reaches_the_maximum_of_a_quadratic_loss(rho):
    network, images, targets, loss, bend, slope, weight = bowl()
    found = landscape.sharpness(network, images, targets, loss=loss, measures="adaptive", rho=rho).adaptive
    stretch = torch.diag(weight.abs())
    true = highest((stretch @ bend @ stretch).numpy(), (stretch @ (slope + bend @ weight)).numpy(), rho)
    assert 0.99 * true < found.value <= true * (1 + 1e-12)
    assert (found.low, found.high) == (found.value, math.inf)
    assert highest(bend.numpy(), (slope + bend @ weight).numpy(), rho) > 1.5 * true  # another norm is another figure


class TestTheFisherRaoNorm:
    def test_it_is_the_mean_of_squares_of_each_images_gradient_along_the_weights(self):
        network = small()
        found = landscape.sharpness(network, IMAGES, LABELS, measures="fisher_rao").fisher_rao
        network.eval()
        squares = []
        for image, label in zip(IMAGES, LABELS):
            loss = functional.cross_entropy(network(image[None]), label[None])
            slopes = torch.autograd.grad(loss, list(network.parameters()))
            along = sum((slope * weight).sum() for slope, weight in zip(slopes, network.parameters()))
            squares.append(float(along.detach()) ** 2)
        assert found.value == pytest.approx(np.mean(squares), rel=1e-10)
        assert found.low < found.value < found.high

    def test_of_a_homogeneous_network_it_is_liangs_closed_form(self):
        """(L + 1)^2 mean <dloss/dF, F>^2, L + 1 = 3 layers without biases."""
        layers = [nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(), nn.Conv2d(3, 3, 3, bias=False), nn.ReLU(), nn.Flatten()]
        network = filled(nn.Sequential(*layers, nn.Linear(12, 3, bias=False)), 1)
        outputs = network(IMAGES).detach()
        slope = outputs.softmax(1) - functional.one_hot(LABELS, 3)
        found = landscape.sharpness(network, IMAGES, LABELS, measures="fisher_rao").fisher_rao
        assert found.value == pytest.approx(9 * float((slope * outputs).sum(1).square().mean()), rel=1e-10)


def state(network):
    flags = [(parameter.requires_grad, parameter.grad) for parameter in network.parameters()]
    return copy.deepcopy(network.state_dict()), [each.training for each in network.modules()], flags


def same(first, second):
    return all(torch.equal(value, second[0][name]) for name, value in first[0].items()) and first[1:] == second[1:]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_callers_is_touched(fails):
    network = small(nn.ReLU)
    network[0].weight.requires_grad_(False)
    before, chance = state(network), (torch.get_rng_state(), random.getstate())
    calls = []

    def loss(outputs, targets):
        calls.append(1)
        if fails and len(calls) > 40:
            raise ZeroDivisionError
        return functional.cross_entropy(outputs, targets)

    if fails:
        with pytest.raises(ZeroDivisionError):
            landscape.sharpness(network, IMAGES, LABELS, loss=loss)
    else:
        landscape.sharpness(network, IMAGES, LABELS, loss=loss)
    assert len(calls) > 40
    assert same(state(network), before)
    assert torch.equal(torch.get_rng_state(), chance[0])
    assert random.getstate() == chance[1]


@pytest.mark.slow
def test_figures_follow_from_the_seed_and_not_from_what_else_is_measured():
    whole = landscape.sharpness(small(), IMAGES, LABELS, seed=4)
    assert [warning.split(":")[0] for warning in whole.warnings] == ["not positively homogeneous", "batch norm"]
    for measure in ("trace", "rise", "adaptive", "fisher_rao"):
        alone = landscape.sharpness(small(), IMAGES, LABELS, seed=4, measures=[measure])
        assert getattr(alone, measure) == getattr(whole, measure)
        assert alone.top is None
    other = landscape.sharpness(small(), IMAGES, LABELS, seed=5)
    assert other.trace.value != whole.trace.value
    assert other.top.value == pytest.approx(whole.top.value, rel=1e-4)
    assert other.fisher_rao == whole.fisher_rao


def test_what_did_not_converge_is_said():
    found = landscape.sharpness(small(), IMAGES, LABELS, steps=3, measures=("top", "smallest"))
    assert "after 3 Lanczos steps residuals are" in found.warnings[0]
    assert found.top.high - found.top.value > 1e-4 * found.top.value


@pytest.mark.slow
def test_float32_and_a_loader_find_what_float64_and_tensors_do():
    measures = ("top", "smallest", "rise", "adaptive", "fisher_rao")
    wide = landscape.sharpness(small(), IMAGES, LABELS, measures=measures)
    data = [(IMAGES.float()[:13], LABELS[:13]), (IMAGES.float()[13:], LABELS[13:])]
    narrow = landscape.sharpness(small().float(), data, measures=measures)
    for measure in measures:
        value = getattr(wide, measure).value
        assert getattr(narrow, measure).value == pytest.approx(value, rel=2e-3), measure


def test_in_the_metric_of_the_flow_eigenvalues_are_those_of_the_scaled_hessian():
    layers = (Conv(2, activation="tanh", bias=True), Conv(2, activation="softplus"))
    particles = random_network(Architecture((1, 6, 6), layers, outputs=3), (3, 2), seed=2)
    objective = Objective(Subject(particles), IMAGES, LABELS)
    operator = hessian.Hessian(objective, objective.subject.parameters)
    dense = torch.stack([operator(row) for row in torch.eye(operator.size).double()])
    first, second = particles.masses
    pairs = (second[:, None] * first).repeat_interleave(4)
    masses = torch.cat([first.repeat_interleave(4), pairs, second.repeat(3), first])
    flow = torch.linalg.eigvalsh(dense / (masses[:, None] * masses).sqrt())
    asked = {"measures": ("top", "smallest", "trace", "element_trace"), "products": operator.size, "tolerance": 1e-8}
    found = landscape.sharpness(particles, IMAGES, LABELS, metric="flow", **asked)
    assert (found.top.value, found.smallest.value) == pytest.approx((float(flow[-1]), float(flow[0])), rel=1e-6)
    assert found.trace.value == pytest.approx(float(flow.sum()), rel=1e-9)
    plain = landscape.sharpness(particles, IMAGES, LABELS, **asked)
    assert plain.top.value < 0.7 * found.top.value
    assert plain.element_trace == found.element_trace
    assert plain.element_trace.value == pytest.approx(
        float(hessian.flat(objective.subject.parameters.values()).square() @ dense.diagonal()), rel=1e-9
    )


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(Misuse, match="measures='trase' is unknown: choose one of"):
        landscape.sharpness(small(), IMAGES, LABELS, measures=["trase"])
    with pytest.raises(Misuse, match="metric='flow' needs the masses of a ParticleNetwork, not a Sequential"):
        landscape.sharpness(small(), IMAGES, LABELS, metric="flow")
    with pytest.raises(Misuse, match="directions=1 must be an integer of at least 2"):
        landscape.sharpness(small(), IMAGES, LABELS, directions=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what it imports
def test_an_independent_library_finds_the_same():
    curvlinops = pytest.importorskip("curvlinops")
    network = small().eval()
    data, loss = [(IMAGES[:13], LABELS[:13]), (IMAGES[13:], LABELS[13:])], nn.CrossEntropyLoss()
    objective = Objective(Subject(network), data)
    vector = normal((51,), 0)
    for ours, theirs in (("Hessian", "HessianLinearOperator"), ("GaussNewton", "GGNLinearOperator")):
        peer = getattr(curvlinops, theirs)(network, loss, list(network.parameters()), data)
        found = getattr(hessian, ours)(objective, objective.subject.parameters)(vector)
        torch.testing.assert_close(found, (peer @ vector).detach())
