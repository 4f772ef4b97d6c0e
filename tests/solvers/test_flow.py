"""The particle flow: velocities, the metric, the dissipation identity, proximal map, bounds, and how a run ends."""

import math
import warnings
from dataclasses import replace
from itertools import pairwise

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given
from stops import interrupt_at
from strategies import (
    NORMS,
    SMOOTH,
    architectures,
    bounded,
    cases,
    costly,
    normal,
    random_inputs,
    random_masses,
    random_network,
    random_targets,
)

import meanfield as mf
from meanfield import limits
from meanfield.problem import GRAPH, project_bounds
from meanfield.solvers import alternating, descents, flow, reference, velocities

EPS = torch.finfo(torch.float64).eps
smooth_cases = cases(
    archs=architectures(activations=SMOOTH, poolings=("none", "average"), sides=(2, 4)), bounds=(None,), max_width=3
)
deep_cases = cases(archs=architectures(depths=(2, 3), sides=(2, 4)), bounds=(None,))


def make(
    depth=2, activation="tanh", norm="l2", bias=False, loss="squared", dtype=torch.float64, seed=0, count=4, **penalty
):
    """A problem on random images and a random network."""
    arch = mf.Architecture(
        (1, 4, 4), tuple(mf.Conv(2, activation=activation, bias=bias) for _ in range(depth)), outputs=2
    )
    strengths = {"source": 0.03, "readout": 0.05, "input": 0.02} | penalty
    inputs, targets = random_inputs(arch, count, seed, dtype), random_targets(loss, 2, count, seed)
    problem = mf.Problem(arch, inputs, targets, loss, mf.Penalty(kernel_norm=norm, **strengths))
    return problem, random_network(arch, (5, 4, 3)[:depth], seed, dtype)


def run(problem, network, **options):
    """flow.solve without the remark that the infimum may not be attained."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the infimum over all measures")
        return flow.solve(problem, network, **options)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))


def slopes(function, network, step=1e-5):
    """Central differences of function(network) in every entry of every tensor."""
    copy = network.map(torch.clone)
    found = []
    for tensor in copy.tensors():
        flat, slope = tensor.view(-1), torch.zeros_like(tensor)
        for index in range(len(flat)):
            middle = float(flat[index])
            ends = []
            for sign in (1, -1):
                flat[index] = middle + sign * step
                ends.append(float(function(copy)))
            flat[index] = middle
            slope.view(-1)[index] = (ends[0] - ends[1]) / (2 * step)
        found.append(slope)
    return found


@given(smooth_cases)
def test_velocity_is_minus_the_finite_difference_over_the_masses(case):
    problem, network = case.problem, case.network
    depth, p = problem.architecture.depth, network.masses
    terms, moving = velocities.velocity(problem, network)
    assert float(terms.total()) == float(problem.terms(network).total())
    whole = slopes(lambda net: problem.terms(net).total(), network)
    smooth = slopes(lambda net: problem.terms(net).total() - problem.terms(net).source, network)
    # rounding eps J / h and truncation h^2 J''' / 6 at h = 1e-5 are both below 1e-9 times the sizes here
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-8 * (1 + float(terms.total())), rtol=1e-7)  # noqa: E731
    for rate, slope, q in zip(moving.masses, whole, p):
        close(rate, q @ slope - slope)
        assert float((q * rate).sum()) == pytest.approx(0, abs=1e-12 * (1 + float(rate.abs().max())))
    for layer, (v, slope) in enumerate(zip(moving.kernels, smooth[depth : 2 * depth])):
        weight = p[layer][:, None] * (p[layer - 1][None] if layer else 1.0)
        close(v * weight[:, :, None, None], -slope)
    close(moving.readout * p[-1].reshape(1, -1, *[1] * (network.readout.ndim - 2)), -smooth[2 * depth])
    rest = smooth[2 * depth + 1 :]
    for v, q in zip(moving.biases, p):
        if v is not None:
            close(v * q, -rest.pop(0))
    assert not rest


def minimal_speed_squared(problem, network, moving):
    """Squared metric norm of v - source part, the shortest element of the subdifferential, kernel
    by kernel in loops.
    """
    penalty, p = problem.penalty, network.masses
    total = sum(float(q @ rate.square()) for q, rate in zip(p, moving.masses) if rate is not None)
    total += float(p[0] @ moving.kernels[0].flatten(1).square().sum(1))
    total += float(p[-1] @ moving.readout.movedim(1, 0).flatten(1).square().sum(1))
    total += sum(float(q @ v.square()) for q, v in zip(p, moving.biases) if v is not None)
    for layer in range(1, len(p)):
        w, v = network.kernels[layer], moving.kernels[layer]
        outflow = p[layer] @ penalty.norms(w)
        for j in range(w.shape[0]):
            for i in range(w.shape[1]):
                pieces = [(w[j, i].flatten(), v[j, i].flatten())]
                if penalty.kernel_norm == "l1":
                    pieces = [(a[None], b[None]) for a, b in zip(*pieces[0])]
                pull = 2 * penalty.source * float(outflow[i])
                for a, b in pieces:
                    speed = (b - pull * a / a.norm()).norm() if a.norm() > 0 else (b.norm() - pull).clamp_min(0)
                    total += float(p[layer][j] * p[layer - 1][i] * speed**2)
    return total


@given(deep_cases)
def test_metric_speed_is_that_of_the_shortest_subgradient_also_at_zero_kernels(case):
    problem, network = case.problem, case.network
    kernels = [
        network.kernels[0],
        *(w * (normal(w.shape, 5 + index) > 0) for index, w in enumerate(network.kernels[1:])),
    ]
    kernels[1][:, 0] = 0  # a whole row: the penalty has slope zero there
    network = replace_kernels(network, kernels)
    _, moving = velocities.velocity(problem, network)
    expected = minimal_speed_squared(problem, network, moving)
    # the probe's step is 1e-6 and its error of first order in it
    assert velocities.metric_speed(problem, network, moving) ** 2 == pytest.approx(expected, rel=1e-4)


def replace_kernels(network, kernels):
    return mf.ParticleNetwork(network.architecture, network.masses, kernels, network.readout, network.biases)


def test_a_kernel_held_at_zero_by_the_penalty_does_not_move():
    problem, network = make(source=50.0)
    kernels = [w.clone() for w in network.kernels]
    kernels[1][2, 1] = 0
    network = replace_kernels(network, kernels)
    answer = run(problem, network, descent="gradient", adaptive=False, step_size=1e-4, steps=3).network
    assert not answer.kernels[1][2, 1].any()
    assert answer.kernels[1][3, 2].all()


@given(cases(bounds=(None,), archs=architectures(sides=(2, 3))))
def test_squared_distance_against_loops(case):
    start = case.network
    end = random_network(case.problem.architecture, start.widths, case.seed + 1)
    p = [[float(m) for m in q] for q in start.masses]
    total = sum((float(b) - float(a)) ** 2 / float(a) for q, r in zip(start.masses, end.masses) for a, b in zip(q, r))
    for layer, (a, b) in enumerate(zip(start.kernels, end.kernels)):
        for j in range(a.shape[0]):
            for i in range(a.shape[1]):
                total += p[layer][j] * (p[layer - 1][i] if layer else 1.0) * float(((b - a)[j, i] ** 2).sum())
        if start.biases[layer] is not None:
            total += sum(m * float(d) ** 2 for m, d in zip(p[layer], end.biases[layer] - start.biases[layer]))
    total += sum(m * float(((end.readout - start.readout)[:, j] ** 2).sum()) for j, m in enumerate(p[-1]))
    assert float(velocities.squared_distance(start, end)) == pytest.approx(total, rel=1e-12)
    assert float(velocities.squared_distance(start, start)) == 0


EULER = [
    (depth, activation, norm, (depth + (norm == "l1")) % 2 == 0, (depth + (activation == "relu")) % 2 == 0)
    for depth in (1, 2, 3)
    for activation in ("tanh", "relu")
    for norm in NORMS
]


@pytest.mark.parametrize(("depth", "activation", "norm", "bias", "masses"), EULER)
def test_dissipation_identity_holds_to_first_order_in_the_step(depth, activation, norm, bias, masses):
    problem, network = make(depth, activation, norm, bias, seed=1)
    horizon, steps, errors = 0.005, (5, 10, 20), []
    signs = lambda net: torch.cat([g.flatten() > 0 for g in net.responses(problem.inputs).preactivations])  # noqa: E731
    for count in steps:
        solution = run(
            problem,
            network,
            descent="gradient",
            adaptive=False,
            step_size=horizon / count,
            steps=count,
            masses=masses,
            record_every=count,
        )
        history = solution.history
        assert history[-1]["time"] == pytest.approx(horizon)
        # a ReLU's kink slid along breaks the identity: this horizon ends before the first one
        assert activation != "relu" or torch.equal(signs(solution.network), signs(network))
        drop = history[0]["value"] - history[-1]["value"]
        assert drop > 0
        errors.append(abs(drop - history[-1]["dissipated"]))
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order == pytest.approx(1, abs=0.05)  # the next order adds less than horizon / 5


def on_the_bounds(depth, norm, bias, seed=2, dtype=torch.float64):
    """A problem with tight bounds and a network that has flowed until it presses against them."""
    free, network = make(depth, norm=norm, bias=bias, seed=seed, dtype=dtype, source=1e-3, readout=1e-3, input=1e-3)
    penalty = bounded(free.penalty, network, 0.4, 0.4)
    problem = mf.Problem(free.architecture, free.inputs, 4 * free.targets, free.loss.name, penalty)
    network = project_bounds(problem, network)
    for _ in range(40):
        network = velocities.euler(problem, network, velocities.velocity(problem, network)[1], 0.05)
    return problem, network


def layer_dissipation(problem, network, moving, layer):
    """Largest 2 (descent of J) - (metric length)^2 over directions of layer's kernels and its sources' masses that
    keep the amplitude bound: the squared length of the steepest one.  By cvxpy, the norms' one-sided slopes in full.
    """
    penalty, w, v = problem.penalty, network.kernels[layer].flatten(2), moving.kernels[layer].flatten(2)
    source, target, rate = network.masses[layer - 1], network.masses[layer], moving.masses[layer - 1]
    lengths = penalty.norms(network.kernels[layer])
    pull = 2 * penalty.source * (target @ lengths)
    active = lengths @ source >= penalty.amplitude_bound * (1 - 1e-12)
    change = cp.Variable(len(source))
    slope = 0.0 if rate is None else (source * rate).numpy() @ change
    cost = cp.sum_squares(cp.multiply(source.sqrt().numpy(), change)) / 2 - slope
    limits = [change == 0 if rate is None else source.numpy() @ change == 0]
    for j, share in enumerate(target.tolist()):
        rise = lengths[j].numpy() @ cp.multiply(source.numpy(), change)
        for i, own in enumerate(source.tolist()):
            step, here = cp.Variable(w.shape[2]), w[j, i].numpy()
            if penalty.kernel_norm == "l1":
                growth = np.sign(here) @ step + (here == 0).astype(float) @ cp.abs(step)
            else:
                growth = here / np.linalg.norm(here) @ step if here.any() else cp.norm(step)
            cost += share * own * (cp.sum_squares(step) / 2 - v[j, i].numpy() @ step + float(pull[i]) * growth)
            rise += own * growth
        limits += [rise <= 0] if active[j] else []
    return -2 * cp.Problem(cp.Minimize(cost), limits).solve(
        solver="CLARABEL", tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11
    )


def bounded_speed_squared(problem, network, moving):
    """Squared speed of the steepest direction within all bounds: cones of different layers are orthogonal."""
    penalty, p = problem.penalty, network.masses
    z, v = (input_vectors(n.kernels[0], n.biases[0]) for n in (network, moving))
    norms = z.norm(dim=1)
    outward = torch.where(norms >= penalty.input_bound * (1 - 1e-12), ((z * v).sum(1) / norms).clamp_min(0), 0.0)
    total = float(p[0] @ (v.square().sum(1) - outward.square()))
    total += float(p[-1] @ moving.readout.movedim(1, 0).flatten(1).square().sum(1))
    if moving.masses[-1] is not None:
        total += float(p[-1] @ moving.masses[-1].square())
    for layer in range(1, len(p)):
        bias, rate = network.biases[layer], moving.biases[layer]
        if bias is not None:
            held = (bias.abs() >= penalty.amplitude_bound * (1 - 1e-12)) & (bias * rate > 0)
            total += float(p[layer] @ torch.where(held, 0.0, rate).square())
        total += layer_dissipation(problem, network, moving, layer)
    return total


def input_vectors(kernels, bias):
    return kernels.flatten(1) if bias is None else torch.cat([kernels.flatten(1), bias[:, None]], 1)


ON_THE_BOUNDS = [
    (depth, norm, bias, masses)
    for depth in (2, 3)
    for norm in NORMS
    for bias in (False, True)
    for masses in (True, False)
]


@pytest.mark.parametrize(("depth", "norm", "bias", "masses"), ON_THE_BOUNDS)
@pytest.mark.parametrize("seed", [2, 3])
def test_metric_speed_is_that_of_the_projection_on_the_tangent_cone(depth, norm, bias, masses, seed):
    problem, network = on_the_bounds(depth, norm, bias, seed)
    _, moving = velocities.velocity(problem, network, masses)
    expected = bounded_speed_squared(problem, network, moving)
    # the bounds hold much back
    assert expected < 0.9 * minimal_speed_squared(problem, network, moving)
    # the probe's step is 1e-6 and its error of first order in it
    assert velocities.metric_speed(problem, network, moving) ** 2 == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("depth", "norm", "bias", "masses"), ON_THE_BOUNDS)
def test_dissipation_identity_with_active_bounds(depth, norm, bias, masses):
    problem, network = on_the_bounds(depth, norm, bias)
    before, moving = velocities.velocity(problem, network, masses)
    dissipation, ratios = bounded_speed_squared(problem, network, moving), []
    for step in (1e-3, 1e-4):
        moved = velocities.euler(problem, network, moving, step)
        assert problem.excess(moved) <= 1e-12
        assert all(float(p.sum()) == pytest.approx(1, abs=8 * EPS) for p in moved.masses)
        ratios.append(float(problem.terms(moved).total() - before.total()) / (-step * dissipation))
    # the ratio is a power series in the step: its linear term, once taken off, leaves 1 and the product of both steps
    linear = (ratios[0] - ratios[1]) / 9e-4
    assert ratios[1] - 1e-4 * linear == pytest.approx(1, abs=1e-7 * (1 + linear**2))


@pytest.mark.parametrize("descent", flow.DESCENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_active_bounds_hold_after_every_step_and_masses_stay_a_probability(descent, dtype):
    problem, network = on_the_bounds(3, "l1", True, dtype=dtype)
    method = (
        descents.GradientDescent(problem, 0.05, False)
        if descent == "gradient"
        else descents.PreconditionedDescent(problem, 0.1, 40)
    )
    eps = torch.finfo(dtype).eps
    for _ in range(40):
        network = method.propose(network, velocities.velocity(problem, network)[1])
        assert problem.excess(network) <= 64 * eps  # sums of at most 20 products
        assert max(reached / bound for _, reached, bound in problem.bounds(network)) >= 1 - 64 * eps
        for p in network.masses:
            assert bool((p > 0).all())
            assert float(p.sum()) == pytest.approx(1, abs=8 * eps)


def check_slope(problem, network, speed):
    """J(network) - J(best) <= speed D, with D the metric length of the program's straight line from network to best at
    its start: J is convex along that line and falls there by at most speed per length.
    """
    program = mf.ConvexProgram.freeze(problem, network)
    best, start = reference.solve(program), program.point(network)
    share = 1e-7  # of the line; the quotient's error is of first order in it
    near = start.map(torch.clone)
    for tensor, end in zip(near.tensors(), best.point.tensors()):
        tensor.lerp_(end, share)
    length = math.sqrt(float(velocities.squared_distance(network, program.network(near)))) / share
    excess = float(problem.terms(network).total()) - best.value
    # speed and length are quotients of small steps
    assert excess <= speed * length * (1 + 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "norm", "bias"), [(2, "l2", False), (2, "l1", True), (3, "l2", True)])
def test_speed_with_active_bounds_limits_the_distance_to_the_optimum(depth, norm, bias):
    problem, network = on_the_bounds(depth, norm, bias)
    for _ in range(3):
        check_slope(
            problem, network, velocities.metric_speed(problem, network, velocities.velocity(problem, network)[1])
        )
        network = run(problem, network, steps=150, step_size=0.03).network


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "bias"), [("l2", False), ("l2", True), ("l1", True)])
def test_the_preconditioned_descent_rests_where_the_flow_does_with_masses_kept(norm, bias):
    """Projected in another metric than its steps', it came to rest at 0.08 to 0.28 of the flow's first speed."""
    problem, network = on_the_bounds(2, norm, bias)
    first = velocities.metric_speed(problem, network, velocities.velocity(problem, network, False)[1])
    solution = run(problem, network, masses=False, steps=3000)
    assert max(reached / bound for _, reached, bound in problem.bounds(solution.network)) >= 1 - 1e-12
    assert solution.history[-1]["speed"] <= 1e-2 * first


@pytest.mark.slow
def test_rest_with_an_active_amplitude_bound_is_the_optimum_of_its_program():
    found = mf.data.load("digits", classes=(3, 5), samples=8, pool=2)
    conv = mf.Conv(3, padding=1, activation="tanh")
    penalty = mf.Penalty(amplitude_bound=1.0)
    problem = mf.Problem(
        mf.Architecture(found.input_shape, (conv, conv)), found.inputs, found.targets("squared"), penalty=penalty
    )
    start = mf.starts.draw(problem, (8, 4), torch.Generator().manual_seed(0))
    solution = run(problem, start, steps=3000)
    network = solution.network
    amplitudes = network.amplitudes(1, penalty.norms(network.kernels[1]))
    assert bool((amplitudes >= 1 - 1e-12).all())
    best = reference.solve(mf.ConvexProgram.freeze(problem, network))
    # with masses moved before the bound was projected on, 22% and 34% at rest: a hundredth of these
    assert solution.value - best.value <= 2.2e-3 * solution.value
    assert solution.certificate.relative_gap <= 3.4e-3


@pytest.mark.parametrize("masses", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_adaptive_gradient_descent_never_raises_the_value(depth, masses):
    problem, network = make(depth, "relu", "l1")
    history = run(problem, network, descent="gradient", steps=60, masses=masses, record_every=1).history
    values, noise = np.array([row["value"] for row in history]), 64 * EPS
    assert (np.diff(values) <= noise).all()
    assert values[-1] < 0.98 * values[0]
    # every accepted step is within twice the tolerance of the identity, or within what rounding resolves
    dissipated = history[-1]["dissipated"]
    assert abs(values[0] - values[-1] - dissipated) <= 2 * descents.DISSIPATION_ERROR * dissipated + 60 * noise
    assert all(a["time"] <= b["time"] for a, b in pairwise(history))


def test_history_rows_add_up():
    problem, network = make()
    solution = run(problem, network, descent="gradient", steps=20, record_every=5)
    assert [row["step"] for row in solution.history] == [0, 5, 10, 15, 20]
    for row in solution.history:
        assert row["value"] == pytest.approx(row["loss"] + row["source"] + row["readout"] + row["input"], rel=1e-14)
        assert row["speed"] > 0
        assert row["seconds"] >= 0
    assert solution.history[0]["value"] == problem.value(network).item()
    assert solution.value == pytest.approx(problem.value(solution.network).item(), rel=1e-12)
    assert solution.gap >= -1e-9
    assert solution.status == "max_iterations"
    assert "metric speed" in solution.message


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("varied", [False, True])
def test_source_prox_solves_its_problem(norm, varied):
    problem, _ = make(norm=norm, source=0.4)
    target, kernels = random_masses(3, 0), normal((3, 2, 1, 2), 1)
    steps = 0.2 + normal((3, 2), 2).abs() if varied else 0.7
    found = velocities._source_prox(problem, kernels, target, steps)
    inverse = (1 / steps if varied else torch.full((3, 2), 1 / 0.7)).numpy() * target.numpy()[:, None] / 2

    def cost(w, sum_squares, square, norms):
        fit = sum(inverse[j, i] * sum_squares(w[i][j] - kernels[j, i, 0].numpy()) for i in range(2) for j in range(3))
        return fit + 0.4 * sum(square(sum(float(target[j]) * norms(w[i][j]) for j in range(3))) for i in range(2))

    free = [[cp.Variable(2) for _ in range(3)] for _ in range(2)]
    order = 2 if norm == "l2" else 1
    model = cp.Problem(cp.Minimize(cost(free, cp.sum_squares, cp.square, lambda w: cp.norm(w, order))))
    model.solve(solver="CLARABEL", tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    ours = cost(
        [[found[j, i, 0].numpy() for j in range(3)] for i in range(2)],
        lambda x: x @ x,
        np.square,
        lambda w: np.linalg.norm(w, order),
    )
    assert ours <= model.value + 1e-9
    assert ours == pytest.approx(model.value, rel=1e-7)
    for i in range(2):
        for j in range(3):  # strongly convex with modulus above 0.1: distances are the root of a value error of 1e-9
            assert found[j, i, 0].numpy() == pytest.approx(free[i][j].value, abs=2e-4)
    assert (found == 0).any() == (norm == "l1")  # shrinks to exact zeros, entry by entry


@pytest.mark.parametrize("descent", flow.DESCENTS)
@costly(8)
@given(case=cases(bounds=(None,), archs=architectures(depths=(1, 2, 3), sides=(2, 4))))
def test_bounds_are_kept(descent, case):
    penalty = bounded(replace(case.problem.penalty, readout=1e-4), case.network, 1.0, 1.0)  # the start reaches both
    problem = mf.Problem(
        case.problem.architecture, case.problem.inputs, case.problem.targets, case.problem.loss.name, penalty
    )
    answer = flow.solve(problem, case.network, descent=descent, steps=6, step_size=0.3).network
    assert problem.excess(answer) <= 1e-12
    assert torch.isfinite(problem.value(answer))


@pytest.mark.parametrize("name", ["input_bound", "amplitude_bound"])
@pytest.mark.parametrize("descent", flow.DESCENTS)
def test_a_start_that_breaks_a_bound_is_refused_by_name(name, descent):
    problem, network = make(**{name: 0.01})
    with pytest.raises(ValueError, match=rf"{name}=0\.01 makes the network infeasible: it reaches"):
        flow.solve(problem, network, descent=descent, steps=2)


@pytest.mark.parametrize("descent", flow.DESCENTS)
def test_masses_off_keeps_them_bit_for_bit(descent):
    problem, network = make(3)
    answer = run(problem, network, descent=descent, masses=False, steps=10).network
    assert all(torch.equal(a, b) for a, b in zip(answer.masses, network.masses))
    assert not torch.equal(answer.readout, network.readout)


@pytest.mark.parametrize("descent", flow.DESCENTS)
@costly(8)
@given(case=cases(bounds=(None, 1.3), archs=architectures(sides=(2, 4))))
def test_masses_stay_positive_and_sum_to_one(descent, case):
    answer = run(case.problem, case.network, descent=descent, steps=15).network
    for p in answer.masses:
        assert (p > 0).all()
        assert p.sum().item() == pytest.approx(1, abs=len(p) * EPS)


@pytest.mark.parametrize("loss", ["squared", "logistic", "softmax"])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_velocities_are_the_same_for_any_block_size(monkeypatch, images, loss):
    problem, network = make(depth=3, bias=True, loss=loss, count=5)
    terms, whole = velocities.velocity(problem, network)
    each = 8 * problem.architecture.entries(network.widths, GRAPH)
    monkeypatch.setattr(limits, "BLOCK_BYTES", images * each)
    assert len(list(limits.blocks(5, each))) == math.ceil(5 / images)
    terms_again, blocked = velocities.velocity(problem, network)
    torch.testing.assert_close(terms_again, terms, rtol=1e-14, atol=0)
    tensors = lambda found: [*found.masses, *found.kernels, found.readout, *found.biases]  # noqa: E731
    torch.testing.assert_close(tensors(blocked), tensors(whole), rtol=1e-11, atol=1e-13)


def test_a_velocity_holds_the_graph_of_one_block_only(monkeypatch):
    """The largest tensor that is kept for a backward pass is the same for 6 and for 60 images."""

    def largest(count):
        problem, network = make(count=count)
        monkeypatch.setattr(limits, "BLOCK_BYTES", 6 * 8 * problem.architecture.entries(network.widths, GRAPH))
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            velocities.velocity(problem, network)
        return max(sizes)

    assert largest(60) == largest(6)


@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_minibatch_velocities_average_to_the_full_one(loss):
    problem, network = make(bias=True, loss=loss, count=6)
    batches = list(map(flow._Batches(problem, 2, 0).at, range(3)))
    seen = torch.cat([batch.inputs for batch in batches])
    assert sorted(seen.flatten(1).sum(1).tolist()) == sorted(problem.inputs.flatten(1).sum(1).tolist())
    moving = [velocities.velocity(batch, network)[1] for batch in batches]
    mean = moving[0].map(lambda *parts: sum(parts) / 3, *moving[1:])
    whole = velocities.velocity(problem, network)[1]
    for a, b in zip(
        (*mean.masses, *mean.kernels, mean.readout, *mean.biases),
        (*whole.masses, *whole.kernels, whole.readout, *whole.biases),
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_each_epoch_is_reshuffled():
    problem, _ = make(count=7)  # the last image of an order waits for the next one
    batches = flow._Batches(problem, 2, 0)
    orders = [
        tuple(batches.at(step).inputs.sum().item() for step in range(3 * epoch, 3 * epoch + 3)) for epoch in range(3)
    ]
    assert len(set(orders)) == 3
    again = flow._Batches(problem, 2, 0)
    assert again.at(7).inputs.sum().item() == orders[2][1]


@pytest.mark.parametrize("descent", flow.DESCENTS)
def test_same_seed_same_run(descent):
    problem, network = make(count=6)
    runs = [
        run(problem, network, descent=descent, steps=8, batch_size=2, seed=seed, record_every=1) for seed in (0, 0, 1)
    ]
    values = [[row["value"] for row in solution.history] for solution in runs]
    assert values[0] == values[1]
    assert values[0] != values[2]
    assert same(runs[0].network, runs[1].network)


@pytest.mark.parametrize("descent", flow.DESCENTS)
def test_minibatches_lower_the_value_on_all_images(descent):
    problem, network = make(count=6)
    solution = run(problem, network, descent=descent, steps=200, batch_size=2)
    assert solution.value < 0.7 * problem.value(network).item()
    assert solution.value == pytest.approx(min(row["value"] for row in solution.history), rel=1e-12)


@pytest.mark.parametrize(("descent", "step_size"), [("preconditioned", 0.1), ("gradient", 1.0)])
def test_minibatches_end_where_the_whole_batch_does(descent, step_size, monkeypatch):
    """Because their steps fall to zero; at constant steps the noise of the batches stays."""
    problem, network = make(depth=1, count=12)
    options = {"descent": descent, "step_size": step_size, "steps": 1500, "record_every": 1500, "tolerance": 0.0}
    limit = run(problem, network, **options, adaptive=False).value
    falling = run(problem, network, **options, batch_size=3).value - limit
    monkeypatch.setattr(descents, "annealed", lambda count, total: 1.0)
    constant = run(problem, network, **options, batch_size=3).value - limit
    assert abs(falling) < 0.1 * constant


@pytest.mark.parametrize("readout", mf.architecture.READOUTS)
def test_a_step_moves_what_multiplies_the_features_by_the_rate(readout):
    """u with the average readout, u / positions with the flattened one."""
    arch = mf.Architecture((1, 3, 3), (mf.Conv(1, activation="tanh"),), readout=readout)
    problem = mf.Problem(arch, random_inputs(arch, 4, 0), random_targets("squared", 1, 4, 0))
    network = random_network(arch, (2,), 0)
    method = descents.PreconditionedDescent(problem, 1e-3, 10**9)
    moved = method.propose(network, velocities.velocity(problem, network)[1])
    steps = (moved.readout - network.readout).abs() / (1 if readout == "average" else 9)
    torch.testing.assert_close(steps, torch.full_like(steps, 1e-3), rtol=1e-6, atol=0)


class TestResume:
    """A run that was broken off goes on from its file to the same bits."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"descent": "gradient"},
            {"batch_size": 2},
            {"descent": "gradient", "batch_size": 2, "masses": False},
            {"record_every": 7, "batch_size": 3, "seed": 5},
        ],
    )
    def test_bits(self, tmp_path, options):
        problem, network = make(bias=True, count=7)
        options = {"steps": 20, "record_every": 5, **options}
        whole = run(problem, network, **options)
        state = tmp_path / "flow.safetensors"
        for moment in (3, 9, 14, math.inf):
            with limits.watched(interrupt_at(moment)):
                found = run(problem, network, **options, state=state, state_seconds=0.0)
            assert state.exists() == (found.status == "interrupted") == (moment < math.inf)
        assert found.status == whole.status
        assert not state.exists()
        assert same(found.network, whole.network)
        untimed = [
            [{k: v for k, v in row.items() if k != "seconds"} for row in each.history] for each in (found, whole)
        ]
        assert repr(untimed[0]) == repr(untimed[1])

    def test_broken_off_while_it_is_certified(self, tmp_path, monkeypatch):
        """No step is lost, also where no state was due yet."""
        problem, network = make()
        whole, state, seen = run(problem, network, steps=20), tmp_path / "flow.safetensors", []

        def broken(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(flow.certificates, "stationary_multipliers", broken)
            assert run(problem, network, steps=20, state=state).status == "interrupted"
        found = run(problem, network, steps=20, state=state, callback=seen.append)
        assert seen == []
        assert same(found.network, whole.network)
        assert found.certificate is not None
        assert not state.exists()

    def test_a_state_of_another_run_is_refused(self, tmp_path):
        problem, network = make()
        state = tmp_path / "flow.safetensors"
        with limits.watched(interrupt_at(4)):
            assert run(problem, network, steps=20, state=state, state_seconds=0.0).status == "interrupted"
        with pytest.raises(ValueError, match="is of another run: its steps is 20, here 21"):
            run(problem, network, steps=21, state=state)
        other = network.map(lambda tensor: tensor.clone())
        other.readout[0] += 1e-16 + other.readout[0].abs() * 1e-15
        with pytest.raises(ValueError, match="is of another run: its start is"):
            run(problem, other, steps=20, state=state)


@pytest.mark.parametrize("size", [4, 99])
def test_a_batch_of_everything_is_the_full_run(size):
    problem, network = make(count=4)
    whole, batch = (run(problem, network, steps=5, batch_size=b, record_every=5).value for b in (None, size))
    assert batch == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("descent", flow.DESCENTS)
def test_runs_in_single_precision(descent):
    single, double = (
        run(*make(dtype=dtype), descent=descent, steps=20, step_size=0.05) for dtype in (torch.float32, torch.float64)
    )
    assert {tensor.dtype for tensor in single.network.tensors()} == {torch.float32}
    assert single.value == pytest.approx(double.value, rel=1e-4)
    assert single.value == pytest.approx(single.certificate.value, rel=1e-15)


@pytest.mark.parametrize("descent", flow.DESCENTS)
def test_permuted_particles_give_the_permuted_answer(descent):
    problem, network = make(bias=True)
    keep = [torch.tensor([3, 1, 4, 0, 2]), torch.tensor([2, 0, 3, 1])]
    options = {"descent": descent, "steps": 10, "step_size": 0.05}
    answer = mf.measures.select(run(problem, network, **options).network, keep)
    permuted = run(problem, mf.measures.select(network, keep), **options).network
    torch.testing.assert_close(permuted.tensors(), answer.tensors(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer", [0, 1])
def test_particles_without_mass_are_refused(layer):
    problem, network = make()
    masses = [p.clone() for p in network.masses]
    masses[layer][0] = 0
    masses[layer] /= masses[layer].sum()
    network = mf.ParticleNetwork(network.architecture, masses, network.kernels, network.readout)
    with pytest.raises(ValueError, match=rf"masses\[{layer}\] has particles without mass"):
        flow.solve(problem, network, steps=1)


BOUNDS = [
    ({}, "input_bound and amplitude_bound"),
    ({"input_bound": 9.0}, "amplitude_bound"),
    ({"amplitude_bound": 99.0}, "input_bound"),
]


@pytest.mark.parametrize(("given_", "missing"), BOUNDS)
def test_the_warning_names_the_missing_bounds(given_, missing):
    problem, network = make(activation="relu", **given_)
    with pytest.warns(UserWarning, match=rf"may not be attained: set {missing} \(") as caught:
        flow.solve(problem, network, steps=1)
    assert len(caught) == 1


def test_the_alternation_warns_once():
    problem, network = make(activation="relu")
    with pytest.warns(UserWarning, match="set input_bound and amplitude_bound") as caught:
        solution = alternating.solve(problem, network, rounds=2, tolerance=1e-12, flow_steps=3, program_iterations=20)
    assert len(caught) == 1
    assert len(solution.history) == 2


@pytest.mark.parametrize(
    ("activation", "bounds"), [("tanh", {}), ("relu", {"input_bound": 9.0, "amplitude_bound": 99.0})]
)
def test_no_warning_where_the_infimum_is_attained(activation, bounds):
    problem, network = make(activation=activation, **bounds)
    assert flow.solve(problem, network, steps=1).status == "max_iterations"  # warnings are errors here
    assert len(alternating.solve(problem, network, rounds=1, flow_steps=1, program_iterations=5).history) == 1


@pytest.mark.parametrize("stop", [0, 3])
def test_ctrl_c_keeps_the_best_network(stop):
    problem, network = make()

    def interrupt(row):
        if row["step"] == stop:
            raise KeyboardInterrupt

    solution = flow.solve(problem, network, steps=10, record_every=1, callback=interrupt)
    assert solution.status == "interrupted"
    assert "stopped by the user" in solution.message
    values = [row["value"] for row in solution.history]
    assert len(values) == stop + 1
    assert solution.value == pytest.approx(min(values), rel=1e-12)


def test_callback_sees_every_row():
    rows = []
    problem, network = make()
    assert flow.solve(problem, network, steps=4, record_every=2, callback=rows.append).history == rows
    assert [row["step"] for row in rows] == [0, 2, 4]


def test_time_limit_is_a_status():
    problem, network = make()
    solution = flow.solve(problem, network, steps=1000, max_seconds=0)
    assert solution.status == "max_seconds"
    assert len(solution.history) == 1
    assert same(solution.network, network)


def test_a_stationary_start_has_converged():
    problem, network = make(1)
    zero = mf.ParticleNetwork(
        network.architecture, network.masses, [w * 0 for w in network.kernels], network.readout * 0
    )
    solution = flow.solve(problem, zero, steps=5)
    assert solution.status == "converged"
    # masses of rounding over the probe's step
    assert solution.history[-1]["speed"] <= 8 * EPS / velocities.PROBE[torch.float64]
    assert solution.value == pytest.approx(problem.targets.square().sum(1).mean().item() / 2)


def test_convergence_to_the_tolerance_asked_for():
    problem, network = make(1)
    solution = flow.solve(problem, network, steps=3000, step_size=0.05, tolerance=1e-6, record_every=10)
    assert solution.status == "converged"
    assert solution.history[-1]["speed"] ** 2 <= 1e-6
    assert all(row["speed"] ** 2 > 1e-6 for row in solution.history[:-1])


def test_unknown_descent_suggests_the_nearest():
    problem, network = make()
    with pytest.raises(ValueError, match=r"descent='gradiant' is unknown.*did you mean 'gradient'"):
        flow.solve(problem, network, descent="gradiant")


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"step_size": -1.0}, {"step_size": math.nan}, {"steps": 2, "batch_size": 0}]
)
def test_bad_options_are_named(options):
    problem, network = make()
    with pytest.raises(ValueError, match=list(options)[-1]):
        flow.solve(problem, network, **options)


@pytest.mark.parametrize("bounds", [{}, {"input_bound": 9.0, "amplitude_bound": 99.0}])
@pytest.mark.parametrize(
    ("descent", "options"),
    [("preconditioned", {}), ("gradient", {"adaptive": False}), ("gradient", {"adaptive": True})],
)
def test_a_huge_step_is_a_status_and_not_an_exception(descent, options, bounds):
    problem, network = make(activation="tanh", **bounds)
    solution = flow.solve(problem, network, descent=descent, step_size=1e200, steps=20, record_every=1, **options)
    assert solution.status in ("stalled", "max_iterations")
    assert math.isfinite(solution.value)
    assert solution.value <= problem.value(network).item() * (1 + 4 * EPS)
    assert solution.gap >= -1e-9


def test_light_particles_of_both_layers_flow_in_float32_as_in_float64():
    """The product of two masses of 1e-24 is no float32: their rates were 0 / 0 and the flow ended at its start."""
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2, activation="tanh"), mf.Conv(2, activation="tanh")))
    values = []
    for dtype in (torch.float32, torch.float64):
        drawn = random_network(arch, (4, 3), 0, dtype)
        masses = [torch.cat([p.new_tensor([1e-24]), p[1:] / p[1:].sum()]) for p in drawn.masses]
        network = mf.ParticleNetwork(arch, masses, drawn.kernels, drawn.readout, drawn.biases)
        problem = mf.Problem(arch, random_inputs(arch, 4, 0, dtype), random_targets("squared", 1, 4, 0))
        solution = flow.solve(problem, network, steps=50)
        assert solution.status == "max_iterations"
        assert all(math.isfinite(row["speed"]) for row in solution.history)
        values.append(solution.value)
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0] < 0.1 * solution.history[0]["value"]
