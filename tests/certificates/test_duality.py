from dataclasses import replace

import numpy as np
import pytest
import reference as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from strategies import SMOOTH, architectures, cases, costly, normal, random_inputs, random_network, random_targets

import meanfield as mf
from meanfield import certificates
from meanfield.certificates import Certificate, Multipliers, certify, dual_value, stationary_multipliers

# an objective exact to 1e-9 leaves that much in outputs and multipliers, and the dual value has kinks
SOLVER_ERROR = 1e-9**0.5

shallow = architectures(depths=(1,), sides=(2, 4))
two_layers = architectures(depths=(2,), sides=(2, 3))
three_layers = architectures(depths=(3,), sides=(2, 3))


def random_multipliers(program, seed, size=1.0, output_size=1.0):
    """An output part in the conjugate's domain, off its boundary, and any realisation part."""
    problem = program.problem
    count = len(problem.inputs)
    r = (
        problem.loss.gradient(output_size * normal((count, problem.architecture.outputs), seed), problem.targets)
        / count
    )
    shapes = [
        (flows.shape[0], flows[0].numel() + (bias is not None))
        for flows, bias in zip(program.flows[1:], program.frozen.biases[1:])
    ]
    return Multipliers(r, tuple(size * normal(shape, seed + 1 + k) / count for k, shape in enumerate(shapes)))


sizes = st.sampled_from([0.0, 0.03, 1.0])


@costly(20)
@given(cases(archs=architectures(sides=(2, 3)), bounds=(None,), max_width=3, images=(2, 3)), sizes)
def test_dual_value_matches_the_explicit_sums_at_the_best_scale(case, size):
    program = case.freeze
    multipliers = random_multipliers(program, case.seed, size)
    twin = slow.DualTwin(program, multipliers)
    found = dual_value(program, multipliers)
    assert found == pytest.approx(twin.best(), rel=1e-7, abs=1e-9)
    assert found >= twin.value(1.0) - 1e-12


@costly(8)
@given(cases(archs=two_layers, bounds=(1.3,), max_width=3, images=(2, 3)), sizes)
def test_dual_value_with_a_bound_matches_the_explicit_sums(case, size):
    program = case.freeze
    multipliers = random_multipliers(program, case.seed, size)
    twin = slow.DualTwin(program, multipliers)
    found = dual_value(program, multipliers)
    assert found >= twin.value(1.0) - 1e-7 * (1 + abs(found))
    assert found == pytest.approx(twin.best(), rel=1e-6, abs=1e-8)


@costly(20)
@given(cases(archs=architectures(depths=(2, 3), sides=(2, 3)), bounds=(1.3,), max_width=3, images=(2, 3)), sizes)
def test_dual_value_with_given_prices_of_the_bound_matches_the_explicit_sums(case, size):
    """kappa from nothing (or less, which counts as nothing) to more than every |b_ij|* of a target."""
    program = case.freeze
    multipliers = random_multipliers(program, case.seed, size)
    largest = [norms.max(1) for norms, _, _ in slow.DualTwin(program, multipliers).layers]
    kappa = tuple(torch.from_numpy(n) * (normal(n.shape, case.seed + k) + 0.5) for k, n in enumerate(largest))
    given = replace(multipliers, amplitude=kappa)
    twin = slow.DualTwin(program, given)
    found = dual_value(program, given)
    assert found == pytest.approx(twin.best(), rel=1e-6, abs=1e-8)
    assert found >= twin.value(1.0) - 1e-9 * (1 + abs(found))


def tried_multipliers(program, solution, seed):
    """Random ones, and optimal and disturbed optimal ones, where a wrong factor shows."""
    best = solution.multipliers
    noisy = best.map(lambda t: t + 0.03 * t.abs().max() * normal(t.shape, seed))
    scaled = Multipliers(best.output, tuple(1.2 * b for b in best.realisation))
    return [random_multipliers(program, seed, 0.03), best, noisy, scaled]


def check_weak_and_strong_duality(case):
    program = case.freeze
    solution = slow.solve(program)
    size = 1 + abs(solution.value)
    assert solution.certificate.violation < 1e-7
    for multipliers in tried_multipliers(program, solution, case.seed):
        assert dual_value(program, multipliers) <= solution.value + 1e-7 * size
    assert dual_value(program, solution.multipliers) >= solution.value - SOLVER_ERROR * size


@costly(20)
@given(cases(archs=shallow))
def test_duality_of_one_layer(case):
    check_weak_and_strong_duality(case)


@costly(12)
@given(cases(archs=two_layers, max_width=3))
def test_duality_of_two_layers(case):
    check_weak_and_strong_duality(case)


@costly(10)
@given(cases(archs=three_layers, bounds=(None,), max_width=3, images=(2, 2)))
def test_duality_of_three_layers(case):
    check_weak_and_strong_duality(case)


def roomy_case(
    loss="squared", norm="l2", bound=None, bias=True, outputs=1, readout="average", depth=2, activation="tanh", seed=7
):
    """Fewer image positions than source columns: the program can do more than the network."""
    layers = tuple(mf.Conv(2, activation=activation, bias=bias) for _ in range(depth))
    arch = mf.Architecture((1, depth + 2, depth + 1), layers, readout, outputs)
    network = random_network(arch, [5] * (depth - 1) + [4], seed)
    penalty = mf.Penalty(source=0.01, readout=0.02, input=0.01, kernel_norm=norm, amplitude_bound=bound)
    if bound is not None:
        free = mf.Problem(arch, random_inputs(arch, 3, seed), random_targets(loss, outputs, 3, seed), loss, penalty)
        penalty = replace(
            penalty, amplitude_bound=bound * {n: r for n, r, _ in free.bounds(network)}["amplitude_bound"]
        )
    return mf.Problem(
        arch, random_inputs(arch, 3, seed), random_targets(loss, outputs, 3, seed), loss, penalty
    ), network


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "logistic", "bound": 1.1},
        {"loss": "softmax", "outputs": 3, "norm": "l1"},
        {"bound": 1.1, "norm": "l1", "readout": "flatten"},
        {"loss": "softmax", "outputs": 3, "bound": 1.2, "bias": False},
        {"depth": 3, "loss": "logistic"},
        {"depth": 3, "norm": "l1"},
        {"outputs": 3, "readout": "flatten", "bias": False},
        {"depth": 1, "loss": "softmax", "outputs": 3},
        {"activation": "relu", "bound": 1.05},
    ],
    ids=str,
)
def test_gap_closes_at_the_optimum_and_nowhere_above_it(options):
    problem, network = roomy_case(**options)
    program = mf.ConvexProgram.freeze(problem, network)
    # without it three free biases stop the solver
    firm = {"static_regularization_constant": 1e-7} if program.depth == 3 else {}
    solution = slow.solve(program, **firm)
    start = problem.value(network).item()
    assert solution.value < start - 1e-3  # the case is not trivial
    assert -1e-8 <= solution.gap < SOLVER_ERROR * solution.value
    for t in (0.1, 1.0):
        point = solution.point.combine(program.point(network), t)
        certificate = certify(program, point, solution.multipliers)
        assert certificate.violation < 1e-7
        assert certificate.gap >= certificate.value - solution.value - 1e-8
        assert certificate.gap <= certificate.value - solution.value + SOLVER_ERROR * certificate.value


def test_certify_takes_the_best_of_several_multipliers():
    problem, network = roomy_case()
    program = mf.ConvexProgram.freeze(problem, network)
    point, choices = program.point(network), [random_multipliers(program, seed, 0.03) for seed in range(3)]
    expected = max(dual_value(program, choice) for choice in choices)
    certificate = certify(program, point, *choices)
    assert certificate.dual_value == expected
    assert certificate.value == program.value(point).item()
    assert certificate.gap == certificate.value - expected
    assert certificate.violation == program.violation(point)


def test_certify_without_multipliers_uses_the_stationary_ones():
    problem, network = roomy_case()
    program = mf.ConvexProgram.freeze(problem, network)
    point = program.point(network)
    assert certify(program, point) == certify(program, point, stationary_multipliers(program, point))


def test_relative_gap_is_the_share_of_the_value():
    assert Certificate(-2.0, -3.0, 1.0, 0.0).relative_gap == 0.5


@given(
    cases(
        archs=architectures(depths=(2, 3), sides=(2, 3), activations=SMOOTH, poolings=("none", "average")),
        zero_mass=(False, True),
    )
)
def test_stationary_multipliers_are_gradients_of_the_loss_over_masses(case):
    """In the flows w_ij p_i of a feature, and its bias."""
    program = case.freeze
    multipliers = stationary_multipliers(program, program.point(case.network))
    output = program.output(program.point(case.network))
    expected = case.problem.loss.gradient(output, case.problem.targets) / len(output)
    torch.testing.assert_close(multipliers.output, expected, rtol=1e-10, atol=1e-12)
    for layer, pulls in enumerate(multipliers.realisation, start=1):
        p, step = case.network.masses[layer], 1e-6
        assert not bool(pulls[p == 0].any())
        direction = normal(pulls.shape, case.seed)
        ends = [loss_after(case, layer, sign * step * direction) for sign in (1, -1)]
        slope = (pulls * -p[:, None] * direction).sum().item()
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-8 * (1 + ends[0]))


def loss_after(case, changed, rows):
    """The mean loss of the network when the flows and the biases of one layer are moved by rows of both."""
    network, signal = case.network, case.problem.inputs
    sources = (torch.full((signal.shape[1],), 1 / signal.shape[1]).double(), *network.masses[:-1])
    for layer, (conv, w, b, p) in enumerate(zip(network.architecture.layers, network.kernels, network.biases, sources)):
        flows = w * p[None, :, None, None]
        if layer == changed:
            flows, b = flows + rows[:, : flows[0].numel()].reshape(flows.shape), None if b is None else b + rows[:, -1]
        signal = conv.activate(conv.convolve(signal, flows, b))
    return case.problem.loss.value(network.read(signal), case.problem.targets).mean().item()


def test_stationary_multipliers_of_a_trained_network_close_the_gap():
    """L = 1, tanh: a network that is stationary in masses and readout is optimal for its own program."""
    problem, network = roomy_case(depth=1, loss="logistic")
    program = mf.ConvexProgram.freeze(problem, network)
    solution = slow.solve(program)
    multipliers = stationary_multipliers(program, solution.point)
    assert 0 <= solution.value - dual_value(program, multipliers) + 1e-9 < 1e-5


@pytest.mark.parametrize("loss", ["squared", "logistic", "softmax"])
def test_multipliers_outside_the_domain_are_repaired(loss):
    problem, network = roomy_case(loss=loss, outputs=3)
    program = mf.ConvexProgram.freeze(problem, network)
    optimum = slow.solve(program).value
    wild = random_multipliers(program, 0, 0.03)
    for size in (1.0, 10.0, 1e3):
        found = dual_value(program, wild.map(lambda t, size=size: size * normal(t.shape, 1)))
        assert np.isfinite(found)
        assert found <= optimum + 1e-8


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("zero", ["source", "input", "readout"])
@pytest.mark.parametrize("bound", [None, 1.3])
def test_weak_duality_holds_where_a_strength_is_zero(zero, norm, bound):
    problem, network = roomy_case(norm=norm, bound=bound, outputs=2)
    problem = mf.Problem(
        problem.architecture, problem.inputs, problem.targets, penalty=replace(problem.penalty, **{zero: 0.0})
    )
    program = mf.ConvexProgram.freeze(problem, network)
    solution = slow.solve(program)
    for multipliers in tried_multipliers(program, solution, 3):
        assert -np.inf < dual_value(program, multipliers) <= solution.value + 1e-7
    assert solution.gap < 1e-5


def test_free_bias_needs_centred_multipliers_and_gets_them():
    """A multiplier along the nearest direction of the row space to the bias changes nothing."""
    problem, network = roomy_case(bias=True)
    program = mf.ConvexProgram.freeze(problem, network)
    multipliers = random_multipliers(program, 0, 0.03)
    ones = [space.right @ space.right[-1] for space in program.spaces]
    assert all(float(direction[-1]) > 0.1 for direction in ones)
    moved = Multipliers(multipliers.output, tuple(b + 5.0 * d for b, d in zip(multipliers.realisation, ones)))
    assert dual_value(program, moved) == pytest.approx(dual_value(program, multipliers), rel=1e-9)


def test_what_lies_outside_the_row_space_does_not_count():
    problem, network = roomy_case(bias=False)
    program = mf.ConvexProgram.freeze(problem, network)
    multipliers, right = random_multipliers(program, 0, 0.03), program.spaces[0].right
    step = normal(multipliers.realisation[0].shape, 3)
    step = step - (step @ right) @ right.T
    assert float(step.norm()) > 1
    moved = Multipliers(multipliers.output, (multipliers.realisation[0] + step,))
    assert dual_value(program, moved) == pytest.approx(dual_value(program, multipliers), rel=1e-9)


def test_common_scale_of_the_multipliers_is_chosen_well():
    problem, network = roomy_case()
    program = mf.ConvexProgram.freeze(problem, network)
    best = slow.solve(program).multipliers
    expected = dual_value(program, best)
    assert dual_value(program, best.map(lambda t: 0.7 * t)) == pytest.approx(expected, rel=1e-6)
    assert dual_value(program, best.map(lambda t: 3.0 * t)) < expected


@pytest.mark.parametrize("options", [{"bound": 1.2}, {"loss": "softmax", "outputs": 3, "norm": "l1"}])
def test_certificates_of_float32_points_are_float64_figures(options, device):
    problem, network = roomy_case(**options)
    program = mf.ConvexProgram.freeze(problem, network)
    exact = certify(program, program.point(network))
    single = program.to(dtype=torch.float32, device=device)
    rough = certify(single, single.point(single.frozen))
    assert rough.value == pytest.approx(exact.value, rel=1e-5)
    assert rough.dual_value == pytest.approx(exact.dual_value, rel=1e-4)
    assert rough.violation < 1e-5


def test_module_text_states_the_bound_that_is_evaluated():
    assert "-(1/N) sum_n loss*(N r_n) - sum_l mu_l" in certificates.duality.__doc__


scales = st.sampled_from([1e-150, 1e-75, 1e-20, 1e-11, 1e-6, 1.0, 1e6, 1e20, 1e75, 1e150])
strengths = st.sampled_from([0.0, 1e-150, 1e-20, 1e-6, 1.0, 1e20, 1e150])


def scaled_case(arch, loss, seed, inputs, targets, penalty):
    network = random_network(arch, [2] * arch.depth, seed)
    images = inputs * random_inputs(arch, 4, seed)
    images[0] *= (1.0, 1e-17)[seed % 2]  # one image darker than rounding of the others
    wanted = random_targets(loss, arch.outputs, 4, seed)
    return mf.Problem(arch, images, targets * wanted if loss == "squared" else wanted, loss, penalty), network


def readouts_of_all_sizes(network, problem, seed):
    """Both signs, from nothing to outputs far beyond the targets, against features of any size."""
    features = problem.architecture.readout_features(network.features(problem.inputs)[-1])
    unit = 1 / float(features.abs().max().clamp_min(1e-300))
    for power in range(-6, 9, 2):
        for sign in (1, -1):
            for flat in (False, True):
                drawn = normal(network.readout.shape, seed)
                drawn = drawn.abs() if flat else drawn
                yield mf.ParticleNetwork(
                    network.architecture,
                    network.masses,
                    network.kernels,
                    sign * min(unit * 10.0**power, 1e200) * drawn,
                    network.biases,
                )


@settings(max_examples=100)
@given(
    architectures(depths=(1, 2), sides=(2, 3), activations=("relu", "tanh"), poolings=("none",)),
    st.sampled_from(["squared", "logistic", "softmax"]),
    st.integers(0, 10**6),
    scales,
    scales,
    st.tuples(strengths, strengths, strengths),
)
def test_weak_duality_at_all_scales(arch, loss, seed, inputs, targets, penalties):
    """No network of the same features is below the dual value, at sizes where products under- and overflow."""
    arch = replace(arch, outputs=3) if loss == "softmax" else arch
    source, readout, first = penalties
    problem, network = scaled_case(
        arch, loss, seed, inputs, targets, mf.Penalty(source=source, readout=readout, input=first)
    )
    program = mf.ConvexProgram.freeze(problem, network)
    zero = network.map(torch.zeros_like).readout
    idle = mf.ParticleNetwork(arch, network.masses, network.kernels, zero, network.biases)
    tried = [network, idle, *readouts_of_all_sizes(network, problem, seed)]
    values = [problem.value(each).item() for each in tried]
    least = min(value for value in [*values, np.inf] if not np.isnan(value))
    for each in (network, idle):
        duals = stationary_multipliers(program, program.point(each))
        for multipliers in (duals, duals.map(lambda t: 1e-8 * t), duals.map(lambda t, s=seed: t * normal(t.shape, s))):
            found = dual_value(program, multipliers)
            assert not np.isnan(found)
            assert found <= least * (1 + 1e-9)


@pytest.mark.parametrize("size", [1e-150, 1e-11, 1.0])
@pytest.mark.parametrize(("loss", "outputs"), [("squared", 1), ("logistic", 1), ("softmax", 3)])
def test_readouts_without_penalty_use_features_of_any_size(loss, outputs, size):
    """One feature, readouts along many directions: no bound lies above the best of them."""
    arch = mf.Architecture((1, 2, 2), (mf.Conv(2, activation="relu"),), outputs=outputs)
    sizes = torch.logspace(-3, 3, 60, dtype=torch.float64) / size
    for seed in range(20):
        network = random_network(arch, [1], seed)
        images, wanted = size * random_inputs(arch, 4, seed), random_targets(loss, outputs, 4, seed)
        problem = mf.Problem(arch, images, wanted, loss, mf.Penalty(readout=0.0, input=0.0))
        feature = network.features(images)[-1].flatten()
        outputs_of = [t * feature[:, None] * normal((outputs,), seed) for t in torch.cat([sizes, -sizes])]
        least = min(problem.loss.value(F, problem.targets).mean().item() for F in outputs_of)
        gradient = problem.loss.gradient(torch.zeros(4, outputs, dtype=torch.float64), problem.targets) / 4
        found = dual_value(mf.ConvexProgram.freeze(problem, network), Multipliers(gradient, ()))
        assert found <= least * (1 + 1e-12)


def test_the_dual_value_without_readout_penalty_is_tight_where_the_domain_leaves_room():
    """At the logistic optimum over one feature r is orthogonal to it and inside its domain, at any scale of images."""
    f = torch.tensor([1.0, 2.0, -1.5, 0.7], dtype=torch.float64)
    arch = mf.Architecture((1, 1, 1), (mf.Conv(1, activation="identity"),))
    one = torch.ones(1, dtype=torch.float64)
    network = mf.ParticleNetwork(arch, [one], [one.reshape(1, 1, 1, 1)], torch.zeros(1, 1, dtype=torch.float64), [None])
    labels = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    loss = lambda t: np.logaddexp(0, -labels.numpy() * t * f.numpy()).mean()  # noqa: E731
    best = optimize.minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-12})
    for size in (1e-150, 1e-11, 1.0, 1e150):
        images = (size * f).reshape(4, 1, 1, 1)
        problem = mf.Problem(arch, images, labels, "logistic", mf.Penalty(readout=0.0, input=0.0))
        r = problem.loss.gradient((best.x * f)[:, None], problem.targets) / 4
        found = dual_value(mf.ConvexProgram.freeze(problem, network), Multipliers(r, ()))
        assert found == pytest.approx(best.fun, rel=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_multipliers_that_are_no_numbers_bound_nothing(bad):
    """As a solver's overflow in float32 leaves them; a gap of NaN is above no tolerance and below none."""
    problem, network = roomy_case()
    program = mf.ConvexProgram.freeze(problem, network)
    good = random_multipliers(program, 0, 0.03)
    broken = good.map(lambda t: t * bad)
    assert dual_value(program, broken) == -np.inf
    certificate = certify(program, program.point(network), broken, good)
    assert certificate.dual_value == dual_value(program, good)
