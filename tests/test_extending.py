"""A new activation and a new loss, each entered in its one registry, go the whole way: nothing else is touched."""

import json

import cvxpy as cp
import numpy as np
import pytest
import reference as slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize
from strategies import normal, random_inputs, seeds
from torch import nn

import meanfield as mf
from meanfield import certificates, cli, finite, losses, starts
from meanfield.activations import ACTIVATIONS, Activation
from meanfield.bench.task import Task
from meanfield.solvers import arrangements, flow, splitting

DELTA = 0.5


def scaled_tanh(g):
    return 1.7159 * torch.tanh(2 / 3 * g)


class ScaledTanh(nn.Module):
    def forward(self, g):
        return scaled_tanh(g)


class HuberLoss(losses.Loss):
    """sum_k h(F_k - y_k), h(t) = t^2 / 2 for |t| <= DELTA, DELTA |t| - DELTA^2 / 2 beyond.

    h'(t) = clip(t), to [-DELTA, DELTA].  h is the infimal convolution of t^2 / 2 and DELTA |t|, so that h* is the sum
    of their conjugates: s^2 / 2 where |s| <= DELTA, else +inf; the shift by y adds s y.  The prox solves
    s + weight (F - center) = 0 with s = clip(F - y): s = clip(weight (center - y) / (1 + weight)).
    """

    name = "own_huber"

    def value(self, outputs, targets):
        return nn.functional.huber_loss(outputs, targets, reduction="none", delta=DELTA).sum(1)

    def gradient(self, outputs, targets):
        return (outputs - targets).clamp(-DELTA, DELTA)

    def conjugate(self, dual, targets):
        return torch.where(dual.abs() <= DELTA, 0.5 * dual.square() + dual * targets, torch.inf).sum(1)

    def feasible(self, dual, targets):
        return dual.clamp(-DELTA, DELTA)

    def prox(self, center, targets, weight):
        return center - (weight * (center - targets) / (1 + weight)).clamp(-DELTA, DELTA) / weight

    def cvxpy_sum(self, cp, outputs, targets):
        return 0.5 * cp.sum(cp.huber(outputs - targets, DELTA))


@pytest.fixture(autouse=True, scope="module")
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ACTIVATIONS, "scaled_tanh", Activation(scaled_tanh, ScaledTanh, bounded=True))
        patch.setitem(losses.LOSSES, HuberLoss.name, HuberLoss)
        yield


def task(classes=(0, 4, 7), **options):
    """Penalties strong enough to leave residuals on both sides of DELTA."""
    strengths = {"source_penalty": 3e-3, "readout_penalty": 2e-2, "input_penalty": 3e-3}
    return Task(classes=classes, samples=12, activation="scaled_tanh", loss="own_huber", **strengths, **options)


@pytest.fixture(scope="module", params=[(3, 5), (0, 4, 7)], ids=["one output", "three outputs"])
def flowed(request, registered):
    problem = task(request.param).problem()
    start = starts.draw(problem, (6, 4), torch.Generator().manual_seed(0), "low_rank")
    return problem, start, flow.solve(problem, start, steps=60)


def numerical_huber(t):
    """min_v v^2 / 2 + DELTA |t - v|."""
    moved = optimize.minimize_scalar(
        lambda v: 0.5 * v * v + DELTA * abs(t - v), bounds=(-20, 20), method="bounded", options={"xatol": 1e-9}
    )
    return moved.fun


def sample(seed):
    return HuberLoss(), 2 * normal((4, 3), seed), normal((4, 3), seed + 1)


@given(seeds)
def test_the_loss_and_its_gradient(seed):
    loss, F, y = sample(seed)
    expected = [sum(map(numerical_huber, row)) for row in (F - y).numpy()]
    np.testing.assert_allclose(loss.value(F, y), expected, atol=1e-6)
    for k in range(3):
        move = 1e-6 * torch.eye(3, dtype=F.dtype)[k]
        slope = (loss.value(F + move, y) - loss.value(F - move, y)) / 2e-6
        torch.testing.assert_close(loss.gradient(F, y)[:, k], slope, rtol=0, atol=1e-6)


@given(seeds)
def test_fenchel_young(seed):
    loss, F, y = sample(seed)
    s = loss.gradient(F, y)
    torch.testing.assert_close(loss.value(F, y) + loss.conjugate(s, y), (s * F).sum(1), rtol=1e-12, atol=1e-12)
    other = loss.feasible(normal(F.shape, seed + 2), y)
    assert bool((loss.value(F, y) + loss.conjugate(other, y) >= (other * F).sum(1) - 1e-12).all())
    assert bool((loss.conjugate(other * (1.001 * DELTA / other.abs()), y) == torch.inf).all())


@given(seeds, st.sampled_from([1e-2, 1.0, 30.0]))
def test_the_prox_is_where_its_gradient_vanishes(seed, weight):
    loss, center, y = sample(seed)
    F = loss.prox(center, y, weight)
    residual = loss.gradient(F, y) + weight * (F - center)
    assert bool((residual.abs() <= 1e-13 * (1 + weight * (center.abs() + F.abs()))).all())


@given(seeds)
def test_cvxpy_states_the_same_loss(seed):
    loss, F, y = sample(seed)
    stated = loss.cvxpy_sum(cp, cp.Constant(F.numpy()), y.numpy())
    assert float(stated.value) == pytest.approx(float(loss.value(F, y).sum()), rel=1e-12)


def test_the_flow_descends_and_its_gradient_is_that_of_finite_differences(flowed):
    problem, start, ended = flowed
    assert ended.value < float(problem.value(start))
    network = start.map(lambda tensor: tensor.detach().clone().requires_grad_())
    slopes = torch.autograd.grad(problem.terms(network).total(), network.kernels)
    for layer, slope in enumerate(slopes):
        step = torch.zeros_like(slope)
        step.flatten()[1] = 1e-6
        moved = [problem.terms(replaced(start, layer, start.kernels[layer] + sign * step)).total() for sign in (1, -1)]
        assert float(moved[0] - moved[1]) / 2e-6 == pytest.approx(float(slope.flatten()[1]), rel=1e-5, abs=1e-9)


def replaced(network, layer, kernels):
    every = [kernels if index == layer else each for index, each in enumerate(network.kernels)]
    return type(network)(network.architecture, network.masses, every, network.readout, network.biases)


def test_splitting_and_cvxpy_agree_and_are_certified(flowed):
    problem, _, ended = flowed
    program = mf.ConvexProgram.freeze(problem, ended.network)
    ours, theirs = splitting.solve(program, 1e-6), slow.solve(program)
    assert ours.status == "optimal"
    assert -1e-12 <= ours.gap <= 1e-6 * ours.value
    assert 0 <= theirs.gap + 1e-9 <= 1e-5 * theirs.value
    assert ours.value == pytest.approx(theirs.value, rel=1e-5)
    assert ours.value < ended.value
    residuals = (ours.network(problem.inputs) - problem.targets).abs()
    assert bool((residuals > DELTA).any())
    assert bool((residuals < DELTA).any())


def test_the_bound_over_all_measures_lies_below(flowed):
    problem, _, ended = flowed
    output = problem.loss.gradient(ended.network(problem.inputs), problem.targets) / len(problem.inputs)
    found = certificates.search_features(problem, output, ended.network, starts=8, steps=20)
    assert not problem.missing_bounds()
    assert 0 < found.bound < ended.value
    assert 0 < found.scale <= 1


def test_the_main_job_ends_certified():
    found = mf.solve(task().problem(), (6, 4), rounds=2, flow_steps=60)
    assert -1e-9 <= found.gap < 1e-3 * found.value


def test_finite_networks_train_and_become_modules(tmp_path):
    problem = task().problem()
    trained = finite.train(problem, (8, 6), steps=60)
    assert trained.status == "completed"
    assert trained.value < trained.history[0]["value"]
    module = finite.sequential(trained.network)
    assert isinstance(module.scaled_tanh2, ScaledTanh)
    torch.testing.assert_close(module(problem.inputs), trained.network(problem.inputs))
    mf.save_network(trained.network.particles(), tmp_path / "network.safetensors")
    kept = mf.load_network(tmp_path / "network.safetensors")
    assert torch.equal(kept(problem.inputs), trained.network.particles()(problem.inputs))


def test_one_relu_layer_has_its_exact_optimum():
    arch = mf.Architecture((1, 3, 3), (mf.Conv((1, 2)),))
    targets = normal((6,), 5)
    problem = mf.Problem(arch, random_inputs(arch, 6, 0), targets, "own_huber", mf.Penalty(input=2e-3, readout=5e-3))
    exact = arrangements.solve(problem)
    assert exact.status == "optimal"
    assert exact.value - exact.lower_bound <= 1e-6 * exact.value
    found = mf.solve(problem, (24,), rounds=3, flow_steps=300)
    assert exact.lower_bound <= found.value <= 1.05 * exact.value


def test_the_command_line_takes_them(capsys):
    words = "solve --activation scaled_tanh --loss own_huber --widths 4,3 --samples 8 --rounds 1 --json"
    cli.main(words.split())
    assert json.loads(capsys.readouterr().out)["solution"]["value"] > 0
