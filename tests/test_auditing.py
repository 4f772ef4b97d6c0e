"""How far a trained network is from what its own features allow: figures that others confirm."""

import math
import time

import pytest
import torch
from torch import nn
from torch.nn import functional

import meanfield as mf
from meanfield import auditing, certificates
from meanfield.measures import with_tensors
from meanfield.problem import prices


def trained(images, targets, *modules, epochs, rate=1e-2, batch=100):
    """By a plain loop, as anybody would."""
    torch.manual_seed(0)
    module = nn.Sequential(*modules)
    for each in module:
        if hasattr(each, "reset_parameters"):
            each.reset_parameters()
    module = module.to(images.dtype)
    optimiser = torch.optim.Adam(module.parameters(), rate)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch):
            optimiser.zero_grad()
            functional.cross_entropy(module(images[chosen]), targets[chosen]).backward()
            optimiser.step()
    return module.eval()


@pytest.fixture(scope="module")
def small():
    digits = mf.data.load("digits", classes=(3, 5, 8), samples=12, pool=2)
    images, targets = digits.inputs, digits.targets("softmax")
    layers = nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 2, stride=2), nn.Tanh(), nn.Flatten()
    module = trained(images, targets, *layers, nn.Linear(16, 3), epochs=60, rate=3e-2)
    return module, images, targets


def problem_of(small, penalty=None):
    module, images, targets = small
    network = mf.ParticleNetwork.from_module(module, images)
    return network, mf.Problem(network.architecture, images, targets, "softmax", penalty)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["source", "readout", "input"])
def test_implied_strengths_make_the_scale_of_every_part_stationary(small, part):
    network, problem = problem_of(small, mf.Penalty(kernel_norm="l1"))
    penalty = auditing.implied_penalty(problem, network)
    assert penalty.kernel_norm == "l1"
    problem = mf.Problem(problem.architecture, problem.inputs, problem.targets, "softmax", penalty)

    def scaled(t):
        tensors = [each.clone() for each in network.tensors()]
        for index in {"input": [2, 5], "source": [3], "readout": [4]}[part]:  # masses, kernels, readout, biases
            tensors[index] *= 1 + t
        return float(problem.value(with_tensors(network, tensors)))

    slope = (scaled(1e-4) - scaled(-1e-4)) / 2e-4
    price = float(dict(zip(("source", "readout", "input"), prices(network, penalty)))[part])
    assert price > 1e-3 * float(problem.terms(network).loss)  # not the least
    assert abs(slope) < 1e-6 * price


@pytest.mark.slow
def test_implied_strengths_are_positive_where_the_loss_rises_with_the_scale(small):
    network, problem = problem_of(small)
    wrong = with_tensors(network, [-t if i == 4 else t for i, t in enumerate(network.tensors())])
    penalty = auditing.implied_penalty(problem, wrong)
    share = float(prices(wrong, penalty)[1]) / float(problem.terms(wrong).loss)
    assert share == pytest.approx(auditing.LEAST_SHARE)


def test_float32_masses_become_a_measure_in_float64():
    layers = (mf.Conv(3, activation="tanh"), mf.Conv(1, activation="tanh", bias=True))
    images = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    start = mf.starts.start(mf.Architecture((1, 5, 5), layers), (7, 25), images, torch.Generator().manual_seed(0))
    wide = auditing.in_float64(start)
    assert all(abs(float(masses.sum()) - 1) < 1e-15 for masses in wide.masses)
    plain = start.to(dtype=torch.float64)
    torch.testing.assert_close(wide(images.double()), plain(images.double()), rtol=1e-14, atol=1e-16)


def one_layer(activation="relu"):
    """Four features of one pixel of unequal masses, images of which all but the first are black."""
    kernels = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64).reshape(4, 1, 1, 1)
    masses = torch.tensor([0.125, 0.25, 0.5, 0.125], dtype=torch.float64)
    architecture = mf.Architecture((1, 2, 2), (mf.Conv(1, activation=activation),))
    network = mf.ParticleNetwork(architecture, [masses], [kernels], torch.ones(1, 4).double())
    images = torch.zeros(3, 1, 2, 2, dtype=torch.float64)
    images[0] = torch.rand(1, 2, 2, generator=torch.Generator().manual_seed(0))
    return network, mf.Problem(architecture, images, torch.ones(3))


@pytest.mark.parametrize(
    ("activation", "dead"), [("relu", [False, True, False, True]), ("tanh", [False, False, False, True])]
)
def test_dead_features_are_those_that_are_zero_everywhere(monkeypatch, activation, dead):
    monkeypatch.setattr("meanfield.limits.BLOCK_BYTES", 1)  # an image in each block
    network, problem = one_layer(activation)
    assert auditing.dead_features(problem, network)[0].tolist() == dead


def test_the_table_says_what_the_networks_are():
    """After one iteration, which leaves the program a gap that the dual value is short by."""
    network, problem = one_layer()
    penalty = mf.Penalty(source=1e-3, readout=2e-3, input=3e-3)
    options = {"loss": "squared", "penalty": penalty, "max_iterations": 1}
    found = mf.audit(
        network, problem.inputs, 0.1 * torch.randn(3, generator=torch.Generator().manual_seed(1)), **options
    )
    assert found.repopulated.gap > 1e-6
    assert found.dual_value == pytest.approx(found.repopulated.value - found.repopulated.gap, rel=1e-12)
    table = {row.pop("quantity"): row for row in found.table}
    own = {name: row["network"] for name, row in table.items()}
    terms = found.problem.terms(network)
    expected = [terms.loss, terms.source, terms.readout, terms.input]
    assert [own[name] for name in auditing.TERMS.values()] == pytest.approx([float(each) for each in expected])
    assert (own["mean loss"], own["readout penalty"], own["input penalty"]) == pytest.approx(
        (float(terms.loss), 2e-3, 3e-3 * (0.125 + 0.25 + 0.5 * 0.25))
    )
    assert (own["dual value"], own["gap"]) == (found.dual_value, found.value - found.dual_value)
    said = [own[f"layer 1: {name}"] for name in ("features with mass", "features they are worth", "largest mass")]
    assert said == [4, pytest.approx(1 / (2 * 0.125**2 + 0.25**2 + 0.5**2)), 0.5]
    assert (own["layer 1: dead features"], own["layer 1: mass on dead features"]) == (2, 0.375)
    masses = found.repopulated.network.masses[0]
    assert table["layer 1: largest mass"]["repopulated"] == float(masses.max()) != 0.5


def test_a_search_gets_its_numbers_and_the_bounds_that_the_networks_reach(monkeypatch):
    seen = []
    nothing = certificates.UnseenFeatures(-math.inf, 0, "not tried")
    spy = lambda problem, output, network, **options: seen.append((problem.penalty, network, options)) or nothing  # noqa: E731
    monkeypatch.setattr(certificates, "search_features", spy)
    layers = (mf.Conv(2, bias=True), mf.Conv(1, bias=True))
    images = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = mf.starts.start(mf.Architecture((1, 4, 4), layers), (3, 2), images, torch.Generator().manual_seed(0))
    tensors = start.tensors()
    tensors[6] = tensors[6] - 9.0  # biases of the second layer
    network = with_tensors(start, tensors)
    mf.audit(network, images, torch.ones(5), loss="squared", search=True, starts=3, count=2, seed=7, tolerance=0.1)
    ((penalty, solved, options),) = seen
    assert options == {"starts": 3, "count": 2, "seed": 7}
    first = torch.cat([network.kernels[0].flatten(1), network.biases[0][:, None]], 1)
    assert penalty.input_bound == pytest.approx(float(first.norm(dim=1).max()))
    assert penalty.amplitude_bound == pytest.approx(float(network.biases[1].abs().max()))
    assert solved is not network


def test_what_does_not_fit_memory_is_said_of_the_module(monkeypatch):
    def refuse(problem, widths, **_):
        raise mf.validation.Misuse("widths", widths, "need too much")

    monkeypatch.setattr("meanfield.solvers.memory.require", refuse)
    network, problem = one_layer()
    with pytest.raises(mf.validation.Misuse, match=r"module=\(4,\) as widths need too much"):
        mf.audit(network, problem.inputs, problem.targets, loss="squared")


@pytest.mark.slow
def test_the_gap_is_clarabels_and_repopulation_gains_what_the_table_says(small):
    module, images, targets = small
    found = mf.audit(module, images, targets)
    reference = mf.solvers.reference.solve(found.program, "CLARABEL")
    assert reference.value == pytest.approx(found.repopulated.value, rel=1e-5)
    assert found.gap == pytest.approx(found.value - reference.value, rel=1e-4)
    assert found.relative_gap == pytest.approx(found.gap / found.value)
    assert found.gap > 0.01 * found.value  # there is something to find
    table = {row["quantity"]: row for row in found.table}
    fallen = float(found.problem.value(found.network)) - float(found.problem.value(found.repopulated.network))
    assert table["J falls by"]["repopulated"] == pytest.approx(fallen, rel=1e-9)
    assert fallen <= found.gap * (1 + 1e-9)
    parts = sum(table[name]["network"] for name in auditing.TERMS.values())
    assert parts == pytest.approx(found.value) == table["J"]["network"]
    assert table["layer 1: features with mass"]["network"] == 6
    assert "J falls by" in str(found)


@pytest.mark.slow
def test_features_that_the_network_lacks_lower_its_program_and_the_bound_is_below_all(small):
    _, images, targets = small
    layers = nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten()
    module = trained(images, targets, *layers, nn.Linear(32, 3), epochs=60, rate=3e-2)
    found = mf.audit(module, images, targets, search=True, starts=8, count=4)
    assert found.unseen is not None
    assert found.grown is not None
    assert found.grown.value < 0.99 * found.repopulated.value
    assert found.unseen.bound <= found.grown.value
    table = {row["quantity"]: row for row in found.table}
    assert table["J"]["grown"] == pytest.approx(found.grown.value, rel=1e-6)
    assert table["layer 1: features with mass"]["grown"] > 2
    assert mf.audit(module, images, targets).unseen is None


@pytest.mark.slow
def test_an_optimum_of_ours_has_no_gap_and_implies_its_own_readout_penalty(small):
    network, problem = problem_of(small, mf.Penalty())
    solved = mf.solvers.splitting.solve(mf.ConvexProgram.freeze(problem, network), 1e-8)
    found = mf.audit(solved.network, problem.inputs, problem.targets, penalty=mf.Penalty())
    assert abs(found.relative_gap) < 1e-6
    implied = auditing.implied_penalty(problem, solved.network)
    assert implied.readout == pytest.approx(mf.Penalty().readout, rel=1e-4)


@pytest.mark.slow
def test_without_any_penalty_the_program_is_a_regression_on_features(small):
    digits = mf.data.load("digits", classes=(3, 5, 8), samples=120, pool=2)
    targets = torch.randn(120, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    nothing = mf.Penalty(source=0.0, readout=0.0, input=0.0)
    found = mf.audit(small[0], digits.inputs, targets, loss="squared", penalty=nothing)
    features = found.program.readout_features.flatten(1)
    left = targets - features @ torch.linalg.lstsq(features, targets, driver="gelsd").solution
    least = 0.5 * float(left.square().sum(1).mean())
    assert found.dual_value == pytest.approx(least, rel=1e-6)
    assert found.repopulated.value == pytest.approx(least, rel=1e-6)
    assert found.value > 2 * least


@pytest.mark.slow
def test_digits_in_under_a_minute():
    digits = mf.data.load("digits", samples=400)
    images, targets = digits.inputs.float(), digits.targets("softmax")
    module = trained(
        images,
        targets,
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 10),
        epochs=20,
    )
    began = time.process_time()
    found = mf.audit(module, images, targets)
    assert time.process_time() - began < 60
    assert found.repopulated.relative_gap <= 1e-6
    assert found.gap > 0.05 * found.value
    double = images.double()
    with torch.no_grad():
        assert (found.network(double) - module(images)).abs().max() < 1e-5
