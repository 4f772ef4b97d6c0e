"""Penalties of power q against the definition alone, and terms of the user's own, which nothing certifies."""

import math
import warnings
from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
import reference as slow
import torch
from strategies import normal, random_inputs, random_network

import meanfield as mf
from meanfield import certificates
from meanfield.certificates import Multipliers, dual_value
from meanfield.certificates.compositions import OwnFeatures
from meanfield.solvers import arrangements, flow, reference, splitting, velocities
from meanfield.studies import convexity
from meanfield.validation import Misuse

POWERS = (1.5, 3.0)
EXPONENTS = {1.5: (2, 1), 3.0: (1, 2)}  # s <= (t^a p^b)^(1/3) is t >= s^q / p^(q-1)


def make(power, layers=2, norm="l2", activation="tanh", bound=None, **penalty):
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2, activation=activation),) * layers)
    strengths = {"source": 0.02, "readout": 0.03, "input": 0.01, "amplitude_bound": bound} | penalty
    inputs, targets = random_inputs(arch, 5, 0), normal((5, 1), 1)
    problem = mf.Problem(arch, inputs, targets, penalty=mf.Penalty(power=power, kernel_norm=norm, **strengths))
    return problem, random_network(arch, (4, 3)[:layers], 0)


def optimum_by_definition(program, power):
    """Section 3 of the theory in atoms of cvxpy; features and constraints by explicit sums."""
    problem, penalty, (sources, targets) = program.problem, program.problem.penalty, program.widths
    conv, (g, f) = problem.architecture.layers[1], slow.frozen_maps(program)
    A, size = slow.design(f[0], conv), conv.offsets
    W, U = cp.Variable((sources * size, targets)), cp.Variable(targets)
    p, q = cp.Variable(sources, nonneg=True), cp.Variable(targets, nonneg=True)
    held = [cp.sum(p) == 1, cp.sum(q) == 1]
    held += [A @ W[:, j] == q[j] * g[1][:, j].ravel() for j in range(targets)]
    norms = [[cp.norm(W[i * size : (i + 1) * size, j], 2 if penalty.kernel_norm == "l2" else 1) for j in range(targets)]
             for i in range(sources)]  # fmt: skip
    if penalty.amplitude_bound is not None:
        held += [sum(norms[i][j] for i in range(sources)) <= penalty.amplitude_bound * q[j] for j in range(targets)]
    costs = []
    for strength, amounts, masses in (
        (penalty.source, [cp.sum(row) for row in norms], p),
        (penalty.readout, [cp.abs(U[j]) for j in range(targets)], q),
    ):
        t = cp.Variable(len(amounts))
        held += [s <= cp.geo_mean(cp.hstack([t[i], masses[i]]), EXPONENTS[power]) for i, s in enumerate(amounts)]
        costs.append(strength * cp.sum(t))
    inputs = [slow.input_cost(program.frozen, i) for i in range(sources)]
    output, y = f[1].mean((2, 3)) @ U, problem.targets.numpy()[:, 0]
    loss = 0.5 * cp.sum_squares(output - y) / len(y)
    goal = cp.Problem(cp.Minimize(loss + sum(costs) + penalty.input * (np.array(inputs) @ p)), held)
    goal.solve(solver="CLARABEL", tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return goal.value


@pytest.mark.parametrize(("norm", "bound"), [("l2", None), pytest.param("l1", 1.5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("power", POWERS)
def test_programs_end_at_the_optimum_of_the_definition(power, norm, bound):
    problem, network = make(power, norm=norm, bound=bound)
    if bound is not None:
        network = mf.problem.project_bounds(problem, network)
    program = mf.ConvexProgram.freeze(problem, network)
    expected = optimum_by_definition(program, power)
    ours, checked = splitting.solve(program, 1e-6), reference.solve(program)
    start = program.value(program.point(network)).item()
    for found in (ours, checked):
        assert found.status == "optimal"
        assert abs(found.relative_gap) <= 1e-6
        assert found.value == pytest.approx(expected, rel=2e-6)
        assert found.certificate.dual_value <= expected + 1e-8
        assert problem.value(found.network).item() == pytest.approx(found.value, rel=1e-9)
    assert expected < 0.99 * start  # or the start alone would do


@pytest.mark.parametrize("power", POWERS)
def test_values_and_duals_are_the_explicit_sums(power):
    problem, network = make(power)
    np.testing.assert_allclose(problem.terms(network), slow.objective_terms(problem, network), rtol=1e-12)
    program = mf.ConvexProgram.freeze(problem, network)
    point = program.point(network)
    assert program.value(point).item() == pytest.approx(slow.program_value(program, point), rel=1e-12)
    r = problem.loss.gradient(normal((5, 1), 3), problem.targets) / 5
    shapes = [tuple(flows.flatten(1).shape) for flows in program.flows[1:]]
    multipliers = Multipliers(r, tuple(0.05 * normal(shape, 4) for shape in shapes))
    assert dual_value(program, multipliers) == pytest.approx(slow.DualTwin(program, multipliers).best(), rel=1e-7)


@pytest.mark.parametrize("power", POWERS)
def test_no_gap_survives_another_power(power):
    """Control: multipliers and point of one power prove nothing of another."""
    problem, network = make(power)
    program = mf.ConvexProgram.freeze(problem, network)
    solved = splitting.solve(program, 1e-6)
    other = replace(program, problem=make(2.0)[0])
    assert certificates.certify(other, solved.point, solved.multipliers).relative_gap > 1e-2


@pytest.mark.parametrize("masses", [True, False])
@pytest.mark.parametrize("power", POWERS)
def test_dissipation_identity(power, masses):
    """dJ / dt = -speed^2 to first order: with another power in prox or price the ratio has another limit."""
    problem, network = make(power, source=0.5, readout=0.3)
    errors = []
    for step in (2e-4, 1e-4):
        terms, moving = velocities.velocity(problem, network, masses)
        moved = velocities.euler(problem, network, moving, step)
        fall = float(problem.terms(moved).total() - terms.total())
        errors.append(abs(fall * step / -float(velocities.squared_distance(network, moved)) - 1))
    assert errors[1] < 0.6 * errors[0] < 0.05


@pytest.mark.parametrize("power", POWERS)
def test_the_pull_of_the_source_penalty_is_that_at_the_end_of_a_step(power):
    """dJ / dt is blind to the order h of where it is taken; where the flow rests is not."""
    problem, network = make(power, source=0.5)
    still = velocities.velocity(problem, network)[1].map(torch.zeros_like)
    moved = velocities.euler(problem, network, still, 0.3)
    before, after = (problem.penalty.norms(each.kernels[1]) for each in (network, moved))
    pull = 0.3 * power * 0.5 * (network.masses[1] @ after) ** (power - 1)
    torch.testing.assert_close(after, (before - pull).clamp_min(0), rtol=1e-12, atol=1e-14)
    assert bool((after > 0).any())


@pytest.mark.slow
@pytest.mark.parametrize(("power", "activation"), [(1.5, "tanh"), (3.0, "relu")])
def test_bounds_over_all_measures_meet_the_value(power, activation):
    """With a wrong conjugate the bound at the end of a search would stay away, or pass the value."""
    problem, _ = make(power, 1, activation=activation)
    solution = mf.solve(problem, (6,), rounds=5, flow_steps=200, grow=4, tolerance=1e-4)
    bound = solution.history[-1]["search_bound"]
    assert solution.status == "search_converged"
    assert solution.history[-1]["refuted_bound"] is None
    assert 0 <= solution.value - bound <= 1e-4 * solution.value
    assert solution.lower_bound is None


@pytest.mark.parametrize("power", POWERS)
def test_own_features_give_the_value_at_the_optimum_of_their_program(power):
    """Prices and gains of the bound over all measures; with wrong factors room would be left, or less than none.

    mu = sum_i p_i ((q - 1) lambda_s s_i^q - gamma_i) is what stationary masses ask for.
    """
    problem, start = make(power)
    solution = slow.solve(mf.ConvexProgram.freeze(problem, start))
    network, penalty, output = solution.network, problem.penalty, solution.multipliers.output
    p, outflow = network.masses[0], network.masses[1] @ penalty.norms(network.kernels[1])
    mu = float((power - 1) * penalty.source * (p @ outflow**power) - problem.terms(network).input)
    own = OwnFeatures(network)
    gains = penalty.outer.conjugate_of_squares(own.responses(problem, output), penalty.readout)
    conjugate = float(problem.loss.conjugate(5 * output, problem.targets).mean())
    bound = -conjugate - mu - float((gains - own.costs(problem, [mu])).max())
    assert solution.value < 0.99 * problem.value(start).item()
    assert bound == pytest.approx(solution.value, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("power", POWERS)
def test_single_precision_solves(power):
    problem, network = make(power)
    single = problem.to(dtype=torch.float32)
    program = mf.ConvexProgram.freeze(single, network.to(dtype=torch.float32))
    exact = splitting.solve(mf.ConvexProgram.freeze(problem, network), 1e-6)
    found = splitting.solve(program, 1e-4)
    assert found.status == "optimal"
    assert found.value == pytest.approx(exact.value, rel=2e-4)


def test_one_layer_arrangements_and_proven_bounds_are_of_squares():
    arch, output = mf.Architecture((1, 3, 3), (mf.Conv((1, 2)),)), 0.1 * normal((5, 1), 2)
    for power in (2.0, 3.0):
        problem = mf.Problem(arch, random_inputs(arch, 5, 0), normal((5, 1), 1), penalty=mf.Penalty(power=power))
        found = certificates.search_features(problem, output, starts=2, steps=2, rounds=1)
        assert (found.rigorous_bound is None) == (power != 2)
    with pytest.raises(ValueError, match="power=3"):
        arrangements.solve(problem)


# ---- terms of one's own


def spread(network):
    """lambda sum_ij p_i p_j |w_ij|^2: weight decay, which is not convex in program variables."""
    p = network.masses
    return 0.05 * (p[1] @ network.kernels[1].square().sum((2, 3)) @ p[0])


def own(function=spread):
    problem, network = make(2.0, uncertified=function)
    return problem, network


def test_own_terms_are_part_of_J_and_of_the_program():
    problem, network = own()
    plain, _ = make(2.0)
    extra = spread(network).item()
    assert problem.value(network).item() == pytest.approx(plain.value(network).item() + extra, rel=1e-14)
    program = mf.ConvexProgram.freeze(problem, network)
    assert program.value(program.point(network)).item() == pytest.approx(problem.value(network).item(), rel=1e-12)
    assert problem.terms(network).figures()["uncertified"] == pytest.approx(extra)
    assert "uncertified" not in plain.terms(network).figures()


def test_flows_follow_own_terms_and_say_that_nothing_is_proven():
    problem, network = own()
    errors = []
    for step in (2e-3, 1e-3):
        terms, moving = velocities.velocity(problem, network)
        moved = velocities.euler(problem, network, moving, step)
        fall = float(problem.terms(moved).total() - terms.total())
        errors.append(abs(fall * step / -float(velocities.squared_distance(network, moved)) - 1))
    assert errors[1] < 0.6 * errors[0] < 0.05
    found = flow.solve(problem, network, steps=20)
    assert found.value < problem.value(network).item()
    assert found.gap == math.inf
    assert found.certificate is None
    assert "uncertified" in found.message
    assert found.history[-1]["uncertified"] == pytest.approx(spread(found.network).item(), rel=1e-3)


def outflows(network):
    """The source penalty, as a user would write it: convex in program variables."""
    p, norms = network.masses, network.kernels[1].flatten(2).norm(dim=2)
    return 50 * (p[0] @ (p[1] @ norms).square())


@pytest.mark.slow
@pytest.mark.parametrize(("function", "falsified"), [(lambda network: 1000 * spread(network), True), (outflows, False)])
def test_checks_of_convexity_see_own_terms(function, falsified):
    problem, network = own(function)
    variables = convexity.ProgramVariables(mf.ConvexProgram.freeze(problem, network))
    found = convexity.falsify(variables.objective, variables.sample, budget=300, rounding=variables.rounding)
    assert found.falsified == falsified


@pytest.mark.parametrize(
    "certify",
    [
        lambda problem, network: mf.solve(problem, (3, 3)),
        lambda problem, network: splitting.solve(mf.ConvexProgram.freeze(problem, network)),
        lambda problem, network: reference.solve(mf.ConvexProgram.freeze(problem, network)),
        lambda problem, network: certificates.certify(
            mf.ConvexProgram.freeze(problem, network), mf.ConvexProgram.freeze(problem, network).point(network)
        ),
        lambda problem, network: certificates.search_features(problem, torch.zeros(5, 1)),
        lambda problem, network: arrangements.solve(problem),
    ],
    ids=["solve", "splitting", "reference", "certify", "search", "arrangements"],
)
def test_whatever_certifies_refuses_own_terms_by_name(certify):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Misuse, match=r"uncertified=.*spread.* has no certificate"):
            certify(*own())


@pytest.mark.parametrize(
    "function",
    [lambda network: 1.0, lambda network: network.masses[0], lambda network: network.readout.sum() * 1j],
)
def test_own_terms_are_numbers(function):
    problem, network = own(function)
    with pytest.raises(Misuse, match="must return a 0-dimensional tensor"):
        problem.value(network)


def test_flows_refuse_own_terms_that_they_would_not_see():
    problem, network = own(lambda network: spread(network.detach()))
    assert problem.value(network).isfinite()
    with pytest.raises(Misuse, match="operations that torch differentiates: no flow would see it"):
        flow.solve(problem, network, steps=1)


def test_own_terms_are_functions_and_no_state_names_them(tmp_path):
    with pytest.raises(Misuse, match=r"uncertified=0.3 must be a function"):
        mf.Penalty(uncertified=0.3)
    problem, network = own()
    with pytest.raises(Misuse, match="leave out `state`"):
        flow.solve(problem, network, steps=2, state=tmp_path / "run.safetensors")
