"""The bound over all measures against explicit sums, exact optima and closed forms; the search for unseen features."""

import math

import numpy as np
import pytest
import reference as slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from stored_optima import EXACT_ONE_LAYER, one_layer_problem
from strategies import architectures, cases, normal, random_inputs, random_network, random_targets, seeded, seeds

import meanfield as mf
from meanfield import measures, starts
from meanfield.certificates import compositions, search, search_features
from meanfield.problem import project_bounds
from meanfield.solvers import arrangements, flow, splitting

PLANTED = mf.Architecture((1, 4, 4), (mf.Conv(2, activation="tanh", padding=1), mf.Conv(2, activation="tanh")))
WEAK = mf.Penalty(source=1e-4, readout=1e-3, input=1e-4)
QUICK = {"starts": 10, "steps": 12, "rounds": 2}


def feasible(problem, seed, size=1.0):
    """Any output multipliers, made feasible as a caller would."""
    count = len(problem.inputs)
    return (
        problem.loss.feasible(count * size * normal((count, problem.architecture.outputs), seed), problem.targets)
        / count
    )


def gradient(problem, network):
    return problem.loss.gradient(network(problem.inputs), problem.targets) / len(problem.inputs)


def with_readout(network, readout):
    return mf.ParticleNetwork(network.architecture, network.masses, network.kernels, readout, network.biases)


# --- the inequality, by explicit sums ---------------------------------------------------------------------------------


def kernel_norm(penalty, kernel):
    return np.abs(kernel).sum() if penalty.kernel_norm == "l1" else math.sqrt((kernel**2).sum())


def gains_and_costs(problem, network, output, mu):
    """|q_j|^2 / (4 lambda_u) and gamma_j of the last layer's particles, feature by feature, from w, p and the feature
    maps.
    """
    penalty, arch, masses = problem.penalty, problem.architecture, [slow.array(p) for p in network.masses]
    first = np.zeros(network.widths[0]) if network.biases[0] is None else slow.array(network.biases[0])
    gamma = [penalty.input * ((z**2).sum() + b**2) for z, b in zip(slow.array(network.kernels[0]), first)]
    for layer in range(1, arch.depth):
        w, below = slow.array(network.kernels[layer]), gamma
        gamma = []
        for j in range(network.widths[layer]):
            gamma.append(0.0)
            for i in range(network.widths[layer - 1]):
                c = 2 * math.sqrt(penalty.source * max(mu[layer - 1] + below[i], 0.0))
                gamma[j] += c * masses[layer - 1][i] * kernel_norm(penalty, w[j, i])
    maps, r, gains = slow.array(network.features(problem.inputs)[-1]), slow.array(output), []
    positions = maps.shape[2] * maps.shape[3]
    for j in range(maps.shape[1]):
        q = np.zeros((arch.outputs, positions))
        for n in range(len(maps)):
            q += np.outer(r[n], maps[n, j].flatten()) / positions
        q = q if arch.readout == "flatten" else q.sum(1)
        gains.append((q**2).sum() / (4 * penalty.readout))
    return np.array(gains), np.array(gamma)


def own_bound(problem, network, output, mu):
    """The bound with the supremum over the network's own features; g = 0 scores |q(h(0))|^2 / (4 lambda_u)."""
    gains, gamma = gains_and_costs(problem, network, output, mu)
    nothing = network.map(torch.zeros_like)
    nothing = mf.ParticleNetwork(network.architecture, network.masses, nothing.kernels, nothing.readout, nothing.biases)
    at_zero = gains_and_costs(problem, nothing, output, [0.0] * len(mu))[0][0]
    conjugate = problem.loss.conjugate(len(output) * output, problem.targets).mean().item()
    alive = slow.array(network.masses[-1]) > 0
    return -conjugate - sum(mu) - max((gains - gamma)[alive].max(), at_zero)


def own_prices(problem, network):
    """mu_l = sum_i p_i (lambda_s s_i^2 - gamma_i), what stationary masses ask for; of any sign on a frozen support."""
    strength, mu = problem.penalty.source, []
    below = problem.terms(network).input.item()
    for layer in range(1, problem.architecture.depth):
        norms, p, target = (
            problem.penalty.norms(network.kernels[layer]),
            network.masses[layer - 1],
            network.masses[layer],
        )
        source = strength * sum((p[i] * (target @ norms[:, i]) ** 2).item() for i in range(len(p)))
        mu.append(source - below)
        below = 2 * source
    return mu


price = st.sampled_from([0.0, 1e-3, 0.05, 1.0])


@given(
    cases(archs=architectures(sides=(2, 4)), zero_mass=(False, True)),
    st.tuples(price, price),
    st.sampled_from([0.03, 1.0, 4.0]),
)
def test_no_network_is_below_the_bound_on_its_own_features(case, prices, size):
    """Three losses, both norms, biases, bounds, poolings, readouts and L = 1, 2, 3; any r and any mu."""
    problem, network = case.problem, case.network
    mu, value = list(prices[: problem.architecture.depth - 1]), problem.value(network).item()
    own = compositions.own_features(problem, network, max(network.widths))
    for output in (feasible(problem, case.seed, size), gradient(problem, network)):
        bound = own_bound(problem, network, output, mu)
        assert value >= bound - 1e-10 * (1 + abs(bound))
        gains, gamma = (
            each[slow.array(network.masses[-1]) > 0] for each in gains_and_costs(problem, network, output, mu)
        )
        np.testing.assert_allclose(
            slow.array(own.responses(problem, output)) / (4 * problem.penalty.readout), gains, rtol=1e-10, atol=1e-10
        )
        np.testing.assert_allclose(slow.array(own.costs(problem, mu)), gamma, rtol=1e-10, atol=1e-10)


@given(cases(archs=architectures(depths=(1, 2, 3), sides=(2, 4)), zero_mass=(False, True)), st.tuples(price, price))
def test_own_features_on_all_particles_give_the_explicit_sums(case, prices):
    problem, network = case.problem, case.network
    mu, output = list(prices[: problem.architecture.depth - 1]), gradient(problem, network)
    own, alive = compositions.OwnFeatures(network), slow.array(network.masses[-1]) > 0
    gains, gamma = (each[alive] for each in gains_and_costs(problem, network, output, mu))
    found = slow.array(own.responses(problem, output)) / (4 * problem.penalty.readout)
    np.testing.assert_allclose(found, gains, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(slow.array(own.costs(problem, mu)), gamma, rtol=1e-10, atol=1e-14)


def test_no_bound_lies_above_a_network_of_many_particles():
    """One feature that r is made of, tight in every inequality, its source cut into 320 clones: 64 carry a fifth."""
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2, activation="tanh"), mf.Conv(2, activation="tanh")))
    inputs = random_inputs(arch, 4, 0)
    one, weight = torch.ones(1, dtype=torch.float64), normal((1, 1, 2, 2), 2)
    network = mf.ParticleNetwork(arch, [one, one], [normal((1, 1, 2, 2), 1), weight], one[None], [None, None])
    output = arch.readout_features(network.features(inputs)[-1]) / 4
    q = 4 * output.square().sum()
    penalty = mf.Penalty(source=1e-3, readout=1.0, input=1e-9)
    network = with_readout(network, (-q / (2 * penalty.readout)).reshape(1, 1))
    problem = mf.Problem(arch, inputs, network(inputs) - 4 * output, penalty=penalty)
    many = measures.split(network, 0, 0, torch.full((320,), 1 / 320, dtype=torch.float64))
    value = problem.value(many).item()
    assert value == pytest.approx(problem.value(network).item(), rel=1e-12)
    assert search_features(problem, output, many, starts=1, steps=1, rounds=1).bound == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("size", [1e-150, 1e-20, 1e150])
def test_starts_from_patches_do_not_depend_on_the_size_of_images(size):
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2, activation="tanh"),))
    drawn = []
    for factor in (1.0, size):
        problem = mf.Problem(arch, factor * random_inputs(arch, 4, 0), normal((4, 1), 1), penalty=WEAK)
        drawn.append(search._Search(problem, normal((4, 1), 2), None, seeded(0), 4, 1)._drawn(6, patches=True))
    torch.testing.assert_close(drawn[1].kernels[0], drawn[0].kernels[0], rtol=1e-12, atol=0)


@given(architectures(sides=(2, 4), activations=("tanh", "identity")), st.sampled_from(["l2", "l1"]), seeds)
def test_the_bound_is_attained_where_every_inequality_is_tight(arch, norm, seed):
    """One feature a layer, in clones of unequal masses; u = -q / (2 lambda_u), targets that make r the gradient.

    Too small a factor breaks the test above, too large a one this.
    """
    count, penalty = 3, mf.Penalty(source=0.03, readout=0.5, input=0.02, kernel_norm=norm)
    inputs, output = random_inputs(arch, count, seed), normal((count, arch.outputs), seed) / count
    network = random_network(arch, [1] * arch.depth, seed)
    q = torch.einsum("nk,nj...->kj...", output, arch.readout_features(network.features(inputs)[-1]))
    network = with_readout(network, -q / (2 * penalty.readout))
    problem = mf.Problem(arch, inputs, network(inputs) - count * output, penalty=penalty)
    mu, gamma = [], problem.terms(network).input.item()
    for kernels in network.kernels[1:]:
        outflow = penalty.norms(kernels).item()
        mu.append(penalty.source * outflow**2 - gamma)  # of any sign: equality asks for no other
        gamma = 2 * penalty.source * outflow**2
    for layer in range(arch.depth):
        network = measures.split(network, layer, 0, torch.tensor([0.3, 0.7], dtype=torch.float64))
    gains, costs = gains_and_costs(problem, network, output, mu)
    conjugate = problem.loss.conjugate(count * output, problem.targets).mean().item()
    value = problem.value(network).item()
    for score in gains - costs:
        assert -conjugate - sum(mu) - score == pytest.approx(value, rel=1e-10, abs=1e-12)
    own = compositions.own_features(problem, network, 2)
    scores = own.responses(problem, output) / (4 * penalty.readout) - own.costs(problem, mu)
    np.testing.assert_allclose(slow.array(scores), gains - costs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("depth", "loss", "outputs", "norm", "readout", "bias"),
    [
        (1, "logistic", 1, "l2", "average", True),
        (2, "squared", 1, "l2", "average", False),
        (2, "softmax", 3, "l1", "flatten", True),
        (3, "squared", 2, "l1", "average", False),
    ],
)
def test_own_features_give_the_value_at_the_optimum_of_their_program(depth, loss, outputs, norm, readout, bias):
    arch = mf.Architecture(
        (2, depth + 1, depth + 2),
        tuple(mf.Conv(2, activation="tanh", bias=bias) for _ in range(depth)),
        readout,
        outputs,
    )
    penalty = mf.Penalty(source=0.01, readout=0.02, input=0.01, kernel_norm=norm)
    problem = mf.Problem(arch, random_inputs(arch, 3, 1), random_targets(loss, outputs, 3, 1), loss, penalty)
    start = random_network(arch, [4] * depth, 2)
    solution = slow.solve(mf.ConvexProgram.freeze(problem, start))
    network, output = solution.network, solution.multipliers.output
    value = problem.value(network).item()
    assert value < problem.value(start).item() - 1e-3  # the case is not trivial
    output, mu = problem.loss.feasible(3 * output, problem.targets) / 3, own_prices(problem, network)
    gains, gamma = gains_and_costs(problem, network, output, mu)
    bound = -problem.loss.conjugate(3 * output, problem.targets).mean().item() - sum(mu) - (gains - gamma).max()
    assert bound == pytest.approx(value, rel=1e-4)


# --- exact optima and closed forms ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact():
    problem = one_layer_problem()
    return problem, arrangements.solve(problem)


@pytest.mark.parametrize("with_network", [False, True])
def test_optimal_multipliers_give_the_exact_optimum(exact, with_network):
    problem, solution = exact
    found = search_features(problem, solution.multipliers.output, solution.network if with_network else None)
    assert EXACT_ONE_LAYER - 1e-5 <= found.rigorous_bound <= EXACT_ONE_LAYER + 1e-9
    assert found.bound >= found.rigorous_bound - 1e-12
    # own features reach the supremum, a search comes close
    assert found.bound <= EXACT_ONE_LAYER + (1e-9 if with_network else 1e-5)
    assert "arrangement" in found.rigorous_kind


@pytest.mark.slow
def test_the_bound_of_two_layers_is_tight_at_an_optimum():
    """Wrong factors would leave room: at the end of the alternation the network's own features give its value."""
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2, activation="tanh"),) * 2)
    penalty = mf.Penalty(source=0.01, readout=0.02, input=0.01)
    problem = mf.Problem(arch, random_inputs(arch, 4, 0), normal((4, 1), 1), penalty=penalty)
    solution = mf.solve(problem, (8, 6), rounds=4, tolerance=1e-6, flow_steps=400)
    found = search_features(problem, solution.multipliers.output, solution.network, starts=2, steps=1, rounds=6)
    assert solution.value * (1 - 2e-3) <= found.bound <= solution.value + 1e-12


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_multipliers_of_poor_networks_stay_below_the_exact_optimum(exact, steps):
    problem, _ = exact
    start = starts.start(problem.architecture, (4,), problem.inputs, seeded(steps))
    network = flow.solve(problem, start, steps=steps).network
    found = search_features(problem, gradient(problem, network), network, seed=steps)
    assert 0 < found.rigorous_bound <= EXACT_ONE_LAYER + 1e-9
    assert found.bound <= EXACT_ONE_LAYER + 1e-9
    assert found.bound >= found.rigorous_bound - 1e-12


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("start", [0.5, 2.0])
def test_a_linear_layer_in_closed_form(channels, bias, start):
    """One image of one pixel: q = r (<x, z> / C_0 + b), so |q| <= |r| |(x / C_0, 1)| on unit (z, b).

    The bound is the largest 2 r - r^2 / 2 over |r| <= 2 sqrt(lambda_1 lambda_u) / |(x / C_0, 1)| and twice the r given.
    """
    x = torch.tensor([3.0, -4.0], dtype=torch.float64)[:channels]
    size = math.sqrt((x / channels).square().sum().item() + bias)
    arch = mf.Architecture((channels, 1, 1), (mf.Conv(1, activation="identity", bias=bias),))
    penalty = mf.Penalty(input=0.5, readout=1.3)
    problem = mf.Problem(arch, x.view(1, channels, 1, 1), torch.tensor([[2.0]], dtype=torch.float64), penalty=penalty)
    r = min(2.0, 2 * start, 2 * math.sqrt(0.5 * 1.3) / size)
    found = search_features(problem, torch.tensor([[-start]], dtype=torch.float64), starts=16, steps=200)
    assert found.bound == pytest.approx(2 * r - 0.5 * r**2, rel=1e-6)


@pytest.mark.parametrize("activation", ["tanh", "softplus"])
def test_input_bound_of_one_pixel_in_closed_form(activation):
    """|q| <= |r| h(B x): the supremum is found by a fine grid over z."""
    arch = mf.Architecture((1, 1, 1), (mf.Conv(1, activation=activation),))
    penalty = mf.Penalty(input=0.05, readout=0.1, input_bound=0.8)
    problem = mf.Problem(
        arch,
        torch.full((1, 1, 1, 1), 1.5, dtype=torch.float64),
        torch.tensor([[1.0]], dtype=torch.float64),
        penalty=penalty,
    )
    z = np.linspace(-0.8, 0.8, 2001)
    h = np.array([slow.ACTIVATIONS[activation](1.5 * each) for each in z])
    r = np.linspace(0, 1, 4001)
    worst = np.maximum((r[:, None] ** 2 * h**2 / 0.4 - 0.05 * z**2).max(1), 0)
    found = search_features(problem, torch.tensor([[-0.5]], dtype=torch.float64), starts=24, steps=100, rounds=12)
    assert found.bound == pytest.approx((r - 0.5 * r**2 - worst).max(), rel=1e-5)


@pytest.mark.parametrize("layers", [("relu",), ("tanh", "tanh")])
def test_above_the_critical_penalty_the_zero_network_is_optimal(layers):
    arch = mf.Architecture((1, 3, 4), tuple(mf.Conv(2, activation=name) for name in layers))
    inputs, targets = random_inputs(arch, 5, 0), normal((5, 1), 1)
    problem = mf.Problem(arch, inputs, targets, penalty=mf.Penalty(source=1.0, readout=1e3, input=1.0))
    nothing = with_readout(random_network(arch, [2] * arch.depth, 0), torch.zeros(1, 2, dtype=torch.float64))
    nothing = mf.ParticleNetwork(arch, nothing.masses, [torch.zeros_like(k) for k in nothing.kernels], nothing.readout)
    found = search_features(problem, gradient(problem, nothing), **QUICK)
    assert found.bound == pytest.approx(problem.value(nothing).item(), abs=1e-6)
    assert found.features is None


@pytest.fixture(scope="module")
def softplus():
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2, activation="softplus"),))
    problem = mf.Problem(
        arch, random_inputs(arch, 5, 0), normal((5, 1), 1), penalty=mf.Penalty(input=0.01, readout=0.01)
    )
    return problem, mf.solve(problem, (8,), rounds=3, flow_steps=300)


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.8])
def test_softplus_is_bounded_below_whatever_the_scale(softplus, factor):
    problem, solution = softplus
    found = search_features(problem, factor * solution.multipliers.output, solution.network, starts=32)
    others = [random_network(problem.architecture, (3,), seed) for seed in range(8)]
    assert 0 < found.bound <= min(solution.value + 1e-9, *(problem.value(other).item() for other in others))
    if factor >= 1:  # the scale comes down to what the multipliers allow
        assert found.bound >= 0.8 * solution.value


# --- the features found -----------------------------------------------------------------------------------------------


def planted_problem(penalty=WEAK, seed=4):
    planted = random_network(PLANTED, (2, 1), seed)
    inputs = random_inputs(PLANTED, 8, seed)
    return mf.Problem(PLANTED, inputs, planted(inputs), penalty=penalty), planted


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_planted_feature_is_found_and_scores_what_is_claimed(norm):
    problem, planted = planted_problem(mf.Penalty(source=1e-4, readout=1e-3, input=1e-4, kernel_norm=norm))
    network = with_readout(random_network(PLANTED, (3, 2), 9), torch.zeros(1, 2, dtype=torch.float64))
    output = gradient(problem, network)
    found = search_features(problem, output, network, starts=32, steps=150, rounds=2)
    gains, gamma = gains_and_costs(problem, found.features, output, found.mu)
    np.testing.assert_allclose(slow.array(found.scores), gains - gamma, rtol=1e-9, atol=1e-9)
    assert (found.scores > 0).all()
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert found.features.widths[-1] == len(found.scores) <= 8
    for other in (planted, network):
        assert found.scores[0] >= (np.subtract(*gains_and_costs(problem, other, output, found.mu))).max()


def test_a_found_feature_lowers_the_value():
    """A positive score above every own one is a direction of descent."""
    problem, _ = planted_problem()
    network = with_readout(random_network(PLANTED, (3, 2), 9), torch.zeros(1, 2, dtype=torch.float64))
    found = search_features(problem, gradient(problem, network), network, count=1, starts=16, steps=100, rounds=1)
    program = mf.ConvexProgram.with_candidates(problem, network, found.features)
    few, many = splitting.solve(mf.ConvexProgram.freeze(problem, network), 1e-4), splitting.solve(program, 1e-4)
    assert many.value < few.value - many.gap - few.gap


def bounded_problem(norm, bias):
    arch = mf.Architecture(
        (1, 4, 4), (mf.Conv(2, activation="relu", bias=bias), mf.Conv(2, activation="relu", bias=bias))
    )
    penalty = mf.Penalty(source=1e-4, readout=1e-3, input=1e-4, kernel_norm=norm, amplitude_bound=0.7, input_bound=0.9)
    return mf.Problem(arch, random_inputs(arch, 5, 0), normal((5, 1), 1), penalty=penalty)


@pytest.mark.parametrize(("norm", "bias"), [("l2", True), ("l1", False)])
def test_found_features_meet_the_bounds(norm, bias):
    problem = bounded_problem(norm, bias)
    found = search_features(problem, -problem.targets / 5, **QUICK)
    assert found.features is not None
    assert problem.excess(found.features) <= 1e-9
    reached = {name: value / bound for name, value, bound in problem.bounds(found.features)}
    assert max(reached.values()) > 0.99  # the bounds matter here
    network = project_bounds(problem, random_network(problem.architecture, (3, 2), 1))
    found = search_features(problem, gradient(problem, network), network, **QUICK)
    assert -math.inf < found.bound <= problem.value(network).item()


def test_a_seed_repeats_and_another_differs():
    problem, _ = planted_problem()
    output, state = feasible(problem, 0), torch.get_rng_state()
    first, second, other = (search_features(problem, output, seed=seed, **QUICK) for seed in (5, 5, 6))
    assert (first.bound, first.mu, first.scale) == (second.bound, second.mu, second.scale)
    for a, b in zip(first.features.tensors(), second.features.tensors()):
        assert torch.equal(a, b)
    assert other.bound != first.bound
    assert torch.equal(torch.get_rng_state(), state)


def test_single_precision_problems_get_double_precision_figures():
    problem, _ = planted_problem()
    network = random_network(PLANTED, (3, 2), 9)
    single, output = problem.to(dtype=torch.float32), gradient(problem, network)
    found = search_features(single, output.float(), network.to(dtype=torch.float32), **QUICK)
    assert found.features.dtype == found.scores.dtype == torch.float64
    same = search_features(
        single.to(dtype=torch.float64),
        output.float().double(),
        network.to(dtype=torch.float32).to(dtype=torch.float64),
        **QUICK,
    )
    assert found.bound == same.bound


# --- what is claimed --------------------------------------------------------------------------------------------------

ONE, TWO = ("relu",), ("relu", "relu")


@pytest.mark.parametrize(
    ("layers", "penalty", "reasons"),
    [
        (TWO, mf.Penalty(), ["input_bound", "amplitude_bound"]),
        (TWO, mf.Penalty(input_bound=1.0), ["amplitude_bound"]),
        (TWO, mf.Penalty(amplitude_bound=1.0), ["input_bound"]),
        (("tanh", "relu"), mf.Penalty(), ["input_bound", "amplitude_bound"]),
        (ONE, mf.Penalty(readout=0.0), ["readout penalty"]),
        (("tanh", "tanh"), mf.Penalty(source=0.0), ["source penalty"]),
        (ONE, mf.Penalty(input=0.0), ["input_bound"]),
    ],
)
def test_without_a_bound_the_reason_is_named(layers, penalty, reasons):
    arch = mf.Architecture((1, 3, 4), tuple(mf.Conv((1, 2), activation=name) for name in layers))
    problem = mf.Problem(arch, random_inputs(arch, 3, 0), normal((3, 1), 1), penalty=penalty)
    found = search_features(problem, -problem.targets / 3, **QUICK)
    assert found.bound == -math.inf
    assert found.rigorous_bound is None
    assert found.features is None
    for reason in reasons:
        assert reason in found.reason
        assert reason in found.summary()
    for bound in {"input_bound", "amplitude_bound"} - set(reasons):
        assert bound not in found.reason
    assert "certified" not in found.summary()


def test_summaries_claim_what_was_shown(exact):
    problem, _ = planted_problem()
    found = search_features(problem, feasible(problem, 0), **QUICK)
    assert f"best of {found.starts} starts" in found.summary()
    assert found.starts == QUICK["starts"] * QUICK["rounds"]
    proven = search_features(exact[0], exact[1].multipliers.output, starts=8)
    assert f"best of {proven.starts} starts" in proven.summary()
    assert "proven (" in proven.summary()
    assert "proven" not in found.summary()
    assert "missed a feature" in found.summary()
    for text in (found.summary(), proven.summary()):
        assert "certified" not in text


# --- candidates, and the loop that uses them --------------------------------------------------------------------------
