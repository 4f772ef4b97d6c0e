"""The bound over all measures and the search for unseen features: weak duality by a slow twin,
exact optima, refusals.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import architectures, cases, normal, random_inputs, random_network

import meanfield as mf
from meanfield import measures
from meanfield.certificates import compositions, search_features
from meanfield.solvers import arrangements, splitting

EXACT = 0.32012158137  # one layer, ReLU: cone program over all activation patterns
TWO_TANH = mf.Architecture((1, 3, 3), (mf.Conv(2, activation="tanh"), mf.Conv(2, activation="tanh")))
QUICK = {"starts": 12, "steps": 10, "rounds": 2}


def one_layer(samples=12):
    digits = mf.data.load("digits", classes=(3, 5), samples=samples, pool=2)
    arch = mf.Architecture(digits.input_shape, (mf.Conv((1, 2)),))
    return mf.Problem(arch, digits.inputs, digits.targets("squared"), penalty=mf.Penalty(input=2e-3, readout=2e-3))


def two_layers(**strengths):
    penalty = mf.Penalty(**({"source": 0.01, "readout": 0.02, "input": 0.01} | strengths))
    return mf.Problem(TWO_TANH, random_inputs(TWO_TANH, 4, 0), normal((4, 1), 1), penalty=penalty)


def feasible(problem, seed):
    count = len(problem.inputs)
    return problem.loss.feasible(normal((count, problem.architecture.outputs), seed), problem.targets) / count


def slow_scores(problem, network, output, mu):
    """|q_j|^2 / (4 lambda_u) and gamma_j of the network's own features, a_ij = w_ij p_i, feature by feature."""
    penalty, arch, p = problem.penalty, problem.architecture, network.masses
    gamma = []
    for i, kernel in enumerate(network.kernels[0]):
        bias = 0.0 if network.biases[0] is None else network.biases[0][i].item()
        gamma.append(penalty.input * (kernel.square().sum().item() + bias**2))
    for layer in range(1, arch.depth):
        norm = (
            (lambda k: k.abs().sum().item())
            if penalty.kernel_norm == "l1"
            else (lambda k: k.square().sum().sqrt().item())
        )
        price = [2 * math.sqrt(penalty.source * (mu[layer - 1] + g)) for g in gamma]
        gamma = [
            sum(price[i] * norm(row[i]) * p[layer - 1][i].item() for i in range(len(row)))
            for row in network.kernels[layer]
        ]
    read = arch.readout_features(network.features(problem.inputs)[-1])
    gains = [
        sum((output[:, k] @ read[:, j]).square().sum().item() for k in range(arch.outputs))
        for j in range(read.shape[1])
    ]
    return [gain / (4 * penalty.readout) for gain in gains], gamma


@given(cases(archs=architectures(sides=(2, 4))), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_every_network_lies_above_the_bound_of_its_own_features(case, prices):
    """Any r in the conjugate's domain and any mu >= 0, three losses, both norms, biases, bounds, L = 1, 2, 3."""
    problem, network = case.problem, case.network
    mu, output = prices[: problem.architecture.depth - 1], feasible(problem, case.seed)
    gains, gamma = slow_scores(problem, network, output, mu)
    conjugate = problem.loss.conjugate(len(output) * output, problem.targets).mean().item()
    bound = -conjugate - sum(mu) - max(g - c for g, c in zip(gains, gamma))
    assert problem.value(network).item() >= bound - 1e-9 * (1 + abs(bound))
    own = compositions.own_features(problem, network, max(network.widths))
    torch.testing.assert_close(
        own.responses(problem, output) / (4 * problem.penalty.readout), torch.tensor(gains, dtype=torch.float64)
    )
    # the root of zero is smoothed by the smallest number there is
    torch.testing.assert_close(own.costs(problem, mu), torch.tensor(gamma, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_the_bound_is_tight_at_an_optimum():
    """Wrong factors would leave room: at the end of the alternation the network's own features give its value."""
    problem = two_layers()
    solution = mf.solve(problem, (8, 6), rounds=4, tolerance=1e-6, flow_steps=400)
    found = search_features(problem, solution.multipliers.output, solution.network, starts=2, steps=1, rounds=6)
    assert found.bound <= solution.value + 1e-12
    assert found.bound >= solution.value * (1 - 2e-3)


@pytest.mark.parametrize("conv", [mf.Conv((2, 3), (1, 0), (2, 1)), mf.Conv(3, 1), mf.Conv(1)])
def test_side_by_side_convolutions_are_those_of_each_feature(conv):
    signal, kernels = normal((3, 4, 5, 6, 7), 0), normal((4, 2, 5, *conv.kernel), 1)
    expected = torch.stack([conv.convolve(signal[:, r], kernels[r]) for r in range(4)], 1)
    torch.testing.assert_close(compositions.convolve_each(conv, signal, kernels), expected)


@pytest.fixture(scope="module")
def exact():
    problem = one_layer()
    return problem, arrangements.solve(problem)


def test_at_exact_multipliers_both_bounds_meet_the_exact_optimum(exact):
    problem, solution = exact
    found = search_features(problem, solution.multipliers.output, solution.network)
    assert solution.value == pytest.approx(EXACT, abs=1e-8)
    for bound in (found.bound, found.rigorous_bound):
        assert EXACT * (1 - 1e-5) <= bound <= EXACT + 1e-9
    assert found.rigorous_bound <= found.bound + 1e-12
    assert "arrangement" in found.rigorous_kind


@pytest.mark.parametrize("seed", range(4))
def test_poor_multipliers_give_a_bound_below_the_exact_optimum(exact, seed):
    problem, solution = exact
    network = random_network(problem.architecture, (5,), seed)
    output = problem.loss.gradient(network(problem.inputs) * 0.01 * seed, problem.targets) / len(problem.inputs)
    found = search_features(problem, output, network, seed=seed)
    assert found.rigorous_bound <= found.bound + 1e-12  # the search finds the largest response from below
    assert found.bound <= solution.value + 1e-9


def test_a_found_feature_is_what_its_score_says():
    problem = two_layers(readout=2e-3, source=2e-3, input=2e-3)
    network = random_network(TWO_TANH, (3, 2), 0)
    output = -problem.targets / len(problem.targets)
    found = search_features(problem, output, network, starts=24, steps=60, rounds=2)
    assert found.features is not None
    gains, gamma = slow_scores(problem, found.features, output, found.mu)
    torch.testing.assert_close(
        found.scores, torch.tensor([g - c for g, c in zip(gains, gamma)], dtype=torch.float64), rtol=1e-3, atol=1e-9
    )
    assert (found.scores > 0).all()
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


@pytest.mark.parametrize(
    ("layers", "penalty", "reason"),
    [
        (("relu", "relu"), mf.Penalty(), "amplitude_bound"),
        (("tanh", "tanh"), mf.Penalty(readout=0.0), "readout penalty"),
        (("tanh", "tanh"), mf.Penalty(source=0.0), "source penalty"),
    ],
)
def test_no_bound_is_claimed_where_there_is_none(layers, penalty, reason):
    arch = mf.Architecture((1, 3, 3), tuple(mf.Conv(2, activation=name) for name in layers))
    problem = mf.Problem(arch, random_inputs(arch, 3, 0), normal((3, 1), 1), penalty=penalty)
    found = search_features(problem, -problem.targets / 3)
    assert found.bound == -math.inf
    assert reason in found.summary()
    assert found.features is None


def test_the_summary_claims_no_proof_of_a_search():
    text = search_features(two_layers(), feasible(two_layers(), 0), **QUICK).summary()
    assert "best of" in text
    assert "missed a feature" in text
    assert "certified" not in text
    assert "proven" not in text


@pytest.mark.parametrize("make", [one_layer, two_layers])
def test_above_the_critical_penalty_the_bound_is_the_zero_network(make):
    problem = make()
    problem = mf.Problem(
        problem.architecture, problem.inputs, problem.targets, penalty=mf.Penalty(source=1.0, readout=1e3, input=1.0)
    )
    nothing = 0.5 * problem.targets.square().mean().item()
    found = search_features(problem, -problem.targets / len(problem.targets), **QUICK)
    assert found.bound == pytest.approx(nothing, rel=1e-6)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_linear_layer_has_a_closed_form(channels):
    """q(z) = r <x, z> / C_0 on one image of one pixel: |q| <= |r| |x| / C_0 on unit kernels."""
    arch = mf.Architecture((channels, 1, 1), (mf.Conv(1, activation="identity"),))
    x = torch.tensor([3.0, -4.0], dtype=torch.float64)[:channels].view(1, channels, 1, 1)
    problem = mf.Problem(
        arch, x, torch.tensor([[2.0]], dtype=torch.float64), penalty=mf.Penalty(input=0.1, readout=0.2)
    )
    limit = 2 * math.sqrt(0.1 * 0.2) / (x.norm().item() / channels)  # largest |r|
    r = min(2.0, limit)
    found = search_features(problem, torch.tensor([[-2.0]], dtype=torch.float64), starts=16, steps=200)
    assert found.bound == pytest.approx(2 * r - 0.5 * r**2, rel=1e-6)


def test_softplus_respects_what_it_becomes_far_away():
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2, activation="softplus"),))
    problem = mf.Problem(
        arch, random_inputs(arch, 4, 0), normal((4, 1), 1), penalty=mf.Penalty(input=0.01, readout=0.01)
    )
    solution = mf.solve(problem, (8,), rounds=2, flow_steps=200)
    found = search_features(problem, solution.multipliers.output, solution.network)
    assert 0 < found.bound <= solution.value + 1e-9


def test_bounds_hold_for_what_is_found_and_seeds_repeat():
    problem = two_layers(readout=2e-3, source=2e-3, input=2e-3, input_bound=0.7, amplitude_bound=1.3)
    first, second = (search_features(problem, -problem.targets / 4, seed=3, **QUICK) for _ in range(2))
    assert first.bound == second.bound
    assert first.features is not None
    assert problem.excess(first.features) <= 1e-9


def test_single_precision_problems_get_figures_of_double_precision():
    problem = two_layers()
    found = search_features(problem.to(dtype=torch.float32), (-problem.targets / 4).float(), **QUICK)
    assert found.bound == pytest.approx(search_features(problem, -problem.targets / 4, **QUICK).bound, rel=1e-3)


def test_candidates_enter_without_mass_and_can_only_help():
    problem = two_layers(readout=2e-3, source=2e-3, input=2e-3)
    network, candidates = random_network(TWO_TANH, (3, 2), 0), random_network(TWO_TANH, (4, 3), 9)
    alone, joined = (
        mf.ConvexProgram.freeze(problem, network),
        mf.ConvexProgram.with_candidates(problem, network, candidates),
    )
    start = joined.point(joined.frozen)
    assert joined.value(start).item() == pytest.approx(problem.value(network).item(), rel=1e-12)
    assert joined.violation(start) < 1e-12
    assert joined.widths == (7, 5)
    few, many = splitting.solve(alone, 1e-7), splitting.solve(joined, 1e-7)
    assert many.value < few.value - many.gap - few.gap
    assert problem.value(many.network).item() == pytest.approx(many.value, rel=1e-8)


def test_adjoined_particles_change_neither_output_nor_value():
    problem = two_layers()
    network, others = random_network(TWO_TANH, (3, 2), 0), random_network(TWO_TANH, (4, 3), 9)
    joined = measures.adjoin(network, others)
    torch.testing.assert_close(joined(problem.inputs), network(problem.inputs))
    assert problem.value(joined).item() == pytest.approx(problem.value(network).item(), rel=1e-12)
    torch.testing.assert_close(joined.kernels[1][2:, 3:], others.kernels[1])


def test_balancing_one_layer_keeps_the_output_at_the_least_penalty():
    problem = one_layer()
    network = random_network(problem.architecture, (6,), 2, zero_mass=True)
    balanced = measures.balance(network, 2e-3, 8e-3)
    torch.testing.assert_close(balanced(problem.inputs), network(problem.inputs))
    total = (network.masses[0] * network.kernels[0].flatten(1).norm(dim=1) * network.readout[0].abs()).sum().item()
    penalty = mf.Problem(
        problem.architecture, problem.inputs, problem.targets, penalty=mf.Penalty(input=2e-3, readout=8e-3)
    )
    terms = penalty.terms(balanced)
    assert (terms.input + terms.readout).item() == pytest.approx(2 * math.sqrt(2e-3 * 8e-3) * total, rel=1e-12)


def test_the_alternation_grows_a_poor_support():
    problem = one_layer()
    solution = mf.solve(problem, (2,), rounds=12, grow=4, flow_steps=20, tolerance=1e-3)
    values = [row["value"] for row in solution.history]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(values))
    assert EXACT - 1e-9 <= solution.value <= EXACT * (1 + 1e-3)
    assert solution.lower_bound <= EXACT + 1e-9
    assert solution.status == "search_converged"
    assert "best of" in solution.message
    assert sum(row["added"] for row in solution.history) >= sum(len(row["kept"]) for row in solution.history) > 0
