"""How far a trained network is from what its own features allow: figures that others confirm."""

import time

import pytest
import torch
from torch import nn
from torch.nn import functional

import meanfield as mf
from meanfield import auditing
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


def test_dead_features_are_those_that_are_zero_everywhere():
    kernels = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64).reshape(4, 1, 1, 1)
    architecture = mf.Architecture((1, 2, 2), (mf.Conv(1),))
    network = mf.ParticleNetwork(architecture, [torch.full((4,), 0.25).double()], [kernels], torch.ones(1, 4).double())
    problem = mf.Problem(architecture, torch.rand(3, 1, 2, 2).double(), torch.ones(3))
    assert auditing.dead_features(problem, network)[0].tolist() == [False, True, False, True]


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
