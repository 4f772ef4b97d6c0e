import math
import re
from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import architectures, costly, normal, random_inputs, random_network, random_targets, seeds

import meanfield as mf
from meanfield.solvers import arrangements

PENALTY = mf.Penalty(input=2e-3, readout=5e-3)
EXACT_DIGITS = 0.32012158137


def one_layer(
    channels=1,
    kernel=(1, 2),
    bias=False,
    loss="squared",
    count=6,
    side=3,
    seed=0,
    penalty=PENALTY,
    dtype=torch.float64,
    **conv,
):
    arch = mf.Architecture((channels, side, side), (mf.Conv(kernel, bias=bias, **conv),))
    return mf.Problem(
        arch, random_inputs(arch, count, seed, dtype), random_targets(loss, 1, count, seed), loss, penalty
    )


def digits_problem():
    digits = mf.data.load("digits", classes=(3, 5), samples=12, pool=2)
    arch = mf.Architecture(digits.input_shape, (mf.Conv((1, 2), activation="relu"),))
    return mf.Problem(arch, digits.inputs, digits.targets("squared"), penalty=mf.Penalty(input=2e-3, readout=2e-3))


def twin(problem, patches):
    """The cone program as written: sampled patterns, every row a constraint, patches (N, P, d) from the test itself."""
    count, positions, d = patches.shape
    rows = patches.reshape(-1, d)
    sampled = np.unique(normal((20_000, d), 9).numpy() @ rows.T > 0, axis=0)
    output, variation, constraints = 0, 0, []
    for sign in (1, -1):
        for pattern in sampled:
            v = cp.Variable(d)
            output = (
                output
                + sign * (np.add.reduceat(pattern[:, None] * rows, np.arange(0, len(rows), positions)) / positions) @ v
            )
            variation = variation + cp.norm(v, 2)
            constraints.append(((2 * pattern - 1)[:, None] * rows) @ v >= 0)
    y, penalty = problem.targets[:, 0].numpy(), problem.penalty
    loss = (
        cp.sum_squares(output - y) / 2
        if problem.loss.name == "squared"
        else cp.sum(cp.logistic(-cp.multiply(y, output)))
    )
    objective = loss / count + 2 * math.sqrt(penalty.input * penalty.readout) * variation
    return cp.Problem(cp.Minimize(objective), constraints).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10
    )


def certified(problem, tolerance=1e-8):
    """The solution, with what must hold of every one."""
    solution = arrangements.solve(problem)
    assert solution.status == "optimal"
    exact = problem.to(dtype=torch.float64)
    assert solution.value == exact.value(solution.network.to(dtype=torch.float64)).item()
    assert -1e-12 <= solution.value - solution.lower_bound <= tolerance * solution.value
    assert -1e-12 <= solution.gap <= tolerance * solution.value
    return solution


def test_digits_optimum():
    solution = certified(digits_problem())
    assert solution.value == pytest.approx(EXACT_DIGITS, abs=1e-8)
    assert solution.lower_bound == pytest.approx(EXACT_DIGITS, abs=1e-8)
    assert solution.message.startswith("174 patterns; CLARABEL ended as optimal: ")


def image_patches(problem):
    """Kernel (1, 2) without padding, or (1, 1); 1 / C_0 on the image's part only."""
    conv, x = problem.architecture.layers[0], problem.inputs.numpy()
    kernel_width = conv.kernel[1]
    rows = [
        [
            np.concatenate([image[:, i, j : j + kernel_width].reshape(-1) / len(image), np.ones(int(conv.bias))])
            for i in range(image.shape[1])
            for j in range(image.shape[2] - kernel_width + 1)
        ]
        for image in x
    ]
    return np.array(rows)


@pytest.mark.parametrize(
    "case",
    [
        {"channels": 1, "kernel": (1, 2)},
        {"channels": 2, "kernel": 1, "side": 2, "count": 4},
        {"channels": 1, "kernel": 1, "bias": True, "side": 2, "count": 4},
        {"channels": 1, "kernel": (1, 2), "loss": "logistic", "side": 2, "count": 4},
        {"channels": 2, "kernel": 1, "bias": True, "side": 1, "count": 6},
    ],
)
def test_agrees_with_the_program_as_written(case):
    problem = one_layer(**case)
    assert certified(problem).value == pytest.approx(twin(problem, image_patches(problem)), rel=3e-8)


def test_one_image_one_position_has_a_closed_form():
    """min over v of (a v - y)^2 / 2 + c |v| with c = 2 sqrt(lambda_1 lambda_u): c y / a - c^2 / (2 a^2)."""
    a, y, c = 0.7, 1.3, 2 * math.sqrt(2e-3 * 5e-3)
    problem = mf.Problem(
        mf.Architecture((1, 1, 1), mf.Conv(1)), np.full((1, 1, 1, 1), a), np.array([y]), penalty=PENALTY
    )
    solution = certified(problem)
    assert solution.value == pytest.approx(c * y / a - c**2 / (2 * a**2), rel=1e-10)
    assert solution.network.widths == (1,)


EXACT_ARCHITECTURES = architectures(
    depths=(1,), outputs=(1,), activations=("relu",), poolings=("none", "average"), readouts=("average",)
)


@given(EXACT_ARCHITECTURES.filter(lambda a: a.input_shape[0] * a.layers[0].offsets + a.layers[0].bias <= 3), seeds)
def test_outputs_are_those_of_the_network(arch, seed):
    """Patches merged by direction and cells give the output of one particle: channels, strides,
    padding, pooling, bias.
    """
    problem = mf.Problem(arch, random_inputs(arch, 3, seed), random_targets("squared", 1, 3, seed))
    network = random_network(arch, (5,), seed)
    layer = arrangements._Layer.of(problem)
    kernels = [network.kernels[0].flatten(1)] + ([] if network.biases[0] is None else [network.biases[0][:, None]])
    for z, expected in zip(
        torch.cat(kernels, 1).numpy(), arch.readout_features(network.responses(problem.inputs).features[0]).T
    ):
        cell = np.flatnonzero((layer.arrangement.cells == (layer.arrangement.normals @ z > 0)).all(1))
        assert layer.features(cell)[:, 0] @ z == pytest.approx(expected.numpy(), abs=1e-12)
        assert layer.responses(np.array([1.0, -2.0, 0.5]))[cell[0]] @ z == pytest.approx(
            expected.numpy() @ [1.0, -2.0, 0.5], abs=1e-12
        )


@costly(15)
@given(
    EXACT_ARCHITECTURES.filter(lambda a: a.input_shape[0] * a.layers[0].offsets + a.layers[0].bias <= 3),
    seeds,
    st.sampled_from(["squared", "logistic"]),
)
def test_random_problems_are_solved_and_no_network_falls_below_the_bound(arch, seed, loss):
    problem = mf.Problem(arch, random_inputs(arch, 4, seed), random_targets(loss, 1, 4, seed), loss, PENALTY)
    solution = certified(problem)
    value = problem.value(solution.network).item()
    for noise in (0.0, 1e-3, 1e-1):
        moved = solution.network.map(lambda t, noise=noise: t + noise * normal(t.shape, seed) if t.ndim > 1 else t)
        assert problem.value(moved).item() >= value - 2e-8 * value
    assert problem.value(random_network(arch, (7,), seed)).item() > solution.lower_bound


@pytest.mark.parametrize(("case", "seed"), [({}, 0), ({"kernel": (1, 3), "count": 4}, 1)])
def test_the_particle_solver_ends_at_the_exact_optimum(case, seed):
    problem = one_layer(**case)
    exact, particles = certified(problem), mf.solve(problem, (64,), seed=seed)
    assert exact.lower_bound <= particles.value <= exact.value + 1e-5


@pytest.mark.parametrize(
    "case", [{"kernel": (1, 2), "side": 4}, {"kernel": (1, 2), "bias": True, "loss": "logistic", "count": 3}]
)
def test_cells_one_after_the_other_give_the_optimum_of_all_cells(monkeypatch, case):
    problem = one_layer(**case)
    found = []
    for limit in (10**9, 0):
        monkeypatch.setattr(arrangements, "ALL_CELLS", limit)
        found.append(certified(problem))
    assert found[1].value == pytest.approx(found[0].value, rel=1e-8)
    assert len(found[0].history) == 1 < len(found[1].history)
    assert found[1].history[-1]["cells"] < found[0].history[-1]["cells"] / 2
    bounds = [row["lower_bound"] for row in found[1].history]
    assert bounds == sorted(bounds)


def test_the_zero_network_is_optimal_from_the_critical_penalty_on():
    problem = one_layer(count=5)
    layer = arrangements._Layer.of(problem)
    critical = layer.peaks(layer.gradient(np.zeros(5))).max()
    zero = 0.5 * problem.targets.square().mean().item()
    for factor, vanishes in ((1.001, True), (0.9, False)):
        problem.penalty = replace(PENALTY, input=factor * critical / 2, readout=factor * critical / 2)
        solution = certified(problem)
        assert (solution.value == zero) == vanishes
        assert bool((solution.network.readout == 0).all()) == vanishes


@pytest.mark.parametrize("bias", [False, True])
def test_images_without_content(bias):
    problem = one_layer(bias=bias, kernel=1)
    blank = mf.Problem(problem.architecture, torch.zeros_like(problem.inputs), problem.targets, penalty=PENALTY)
    solution = certified(blank)
    mean, c = problem.targets.mean().abs().item(), 2 * math.sqrt(PENALTY.input * PENALTY.readout)
    gain = 0.5 * max(mean - c, 0) ** 2 if bias else 0.0  # a bias alone fits a constant
    assert solution.value == pytest.approx(0.5 * problem.targets.square().mean().item() - gain, rel=1e-9)


def test_penalties_are_balanced():
    """Input and readout penalty are equal at the optimum, each sqrt(lambda_1 lambda_u) times the total variation."""
    problem = one_layer()
    terms = problem.terms(certified(problem).network)
    assert terms.input.item() == pytest.approx(terms.readout.item(), rel=1e-12)


def test_atoms_of_one_direction_and_sign_are_merged_into_their_sum():
    vectors = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1e-5], [5.0, 0.0], [0.0, 0.0]])
    merged = arrangements._Atoms(vectors, np.array([1.0, 1.0, 1.0, -1.0, -1.0])).merged().heavier(0)
    found = {(sign, *vector) for sign, vector in zip(merged.signs, merged.vectors)}
    assert found == {(1.0, 4.0, 1e-5), (1.0, 0.0, 2.0), (-1.0, 5.0, 0.0)}


def test_neighbouring_cells_do_not_leave_a_particle_each():
    """An optimal vector on a facet may be split between the cells on both sides; the digits need two particles."""
    assert certified(digits_problem()).network.widths == (2,)


def test_incomplete_pooling_windows_count_for_nothing():
    pooled = one_layer(side=4, pooling="average", pool_size=2)  # outputs 4 x 3, the last column is dropped
    cut = mf.Architecture((1, 4, 3), (mf.Conv((1, 2)),))
    plain = mf.Problem(cut, pooled.inputs[..., :3], pooled.targets, penalty=PENALTY)
    assert certified(pooled).value == pytest.approx(certified(plain).value, rel=1e-9)


def test_answer_follows_the_dtype_of_the_problem():
    solution = certified(one_layer(dtype=torch.float32), tolerance=1e-6)
    assert {tensor.dtype for tensor in solution.network.tensors()} == {torch.float32}
    assert solution.value == pytest.approx(certified(one_layer()).value, rel=1e-5)


@pytest.mark.parametrize("value", [None, "error"])
def test_a_solver_without_an_answer_leaves_the_zero_network_and_a_bound(monkeypatch, value):
    problem = one_layer()
    true = certified(problem).value

    def no_answer(self, **options):
        if value is not None:
            raise cp.SolverError("out of steps")

    monkeypatch.setattr(cp.Problem, "solve", no_answer)
    solution = arrangements.solve(problem)
    assert solution.status == "failed"
    assert solution.value == 0.5 * problem.targets.square().mean().item()
    assert 0 < solution.lower_bound < true
    assert re.search(
        r"CLARABEL ended as (None|an error \(out of steps\)): the solver returned no point", solution.message
    )


def test_a_program_on_which_the_solver_fails_at_first_is_solved():
    """Met at random: CLARABEL gave up at its default regularisation."""
    arch = mf.Architecture((1, 5, 4), (mf.Conv((2, 1), padding=1, bias=True),))
    penalty = mf.Penalty(input=0.04060106359184891, readout=4.759542320573617e-05)
    problem = mf.Problem(arch, random_inputs(arch, 6, 928809), random_targets("logistic", 1, 6, 0), "logistic", penalty)
    assert certified(problem).value == pytest.approx(0.4444436145, rel=1e-8)


REFUSED = [
    ({"layers": (mf.Conv(1), mf.Conv(1))}, {}, "layers has 2 entries"),
    ({"layers": mf.Conv(1, activation="tanh")}, {}, "activation='tanh'"),
    ({"layers": mf.Conv(1, pooling="max")}, {}, "pooling='max'"),
    ({"layers": mf.Conv(1), "readout": "flatten"}, {}, "readout='flatten'"),
    ({"layers": mf.Conv(1), "outputs": 2}, {}, "outputs=2: the penalty is then a nuclear norm"),
    ({"layers": mf.Conv(1)}, {"input": 0.0}, "input=0: .* use a positive input penalty"),
    ({"layers": mf.Conv(1)}, {"readout": 0.0}, "readout=0: .* use a positive readout penalty"),
    ({"layers": mf.Conv(1)}, {"input_bound": 2.0}, r"input_bound=2\.0: .* no multiple of a total variation"),
    (
        {"layers": mf.Conv((1, 3), bias=True)},
        {},
        r"kernel_size=\(1, 3\) has 4 entries .* `certificates.search_features`",
    ),
]


@pytest.mark.parametrize(("shape", "strengths", "text"), REFUSED)
def test_what_has_no_exact_optimum_is_refused(shape, strengths, text):
    arch = mf.Architecture((1, 3, 3), **shape)
    targets = normal((3, arch.outputs), 0)
    problem = mf.Problem(arch, random_inputs(arch, 3, 0), targets, penalty=mf.Penalty(**strengths))
    with pytest.raises(ValueError, match=text):
        arrangements.solve(problem)


def test_is_found_by_name_without_loading_the_others():
    assert mf.solvers.arrangements is arrangements


@pytest.mark.parametrize(("images", "targets"), [(1e6, 1.0), (1e-2, 1e3), (1e-12, 1e-12), (1e12, 1e12), (1.0, 1e-9)])
def test_sizes_of_images_and_targets_are_units(images, targets):
    """F(a z x) = a F(z x): with lambda_1 a^2 and lambda_u b^2 the optimum is b^2 times that of a = b = 1."""
    plain = one_layer()
    penalty = mf.Penalty(input=PENALTY.input * images**2, readout=PENALTY.readout * targets**2)
    scaled = mf.Problem(plain.architecture, images * plain.inputs, targets * plain.targets, penalty=penalty)
    found = arrangements.solve(scaled)
    assert found.status == "optimal"
    assert -1e-12 <= (found.value - found.lower_bound) / found.value <= 1e-8
    assert found.value == pytest.approx(targets**2 * certified(plain).value, rel=1e-8)
    for row in found.history:
        assert row["solver_value"] == pytest.approx(found.value, rel=1e-6)
    gradient = scaled.loss.gradient(found.network(scaled.inputs), scaled.targets) / len(scaled.inputs)
    torch.testing.assert_close(found.multipliers.output, gradient, rtol=1e-3, atol=1e-4 * targets)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("images", "targets"), [(1e6, 1.0), (1e-2, 1e3), (1e3, 1e3)])
def test_large_images_and_large_targets_at_fixed_penalties_are_solved(images, targets, bias):
    """CLARABEL ended short of it at images x 1e6; x 0.01 with targets x 1000 came out far above a grid of kernels."""
    plain = one_layer(bias=bias)
    problem = mf.Problem(plain.architecture, images * plain.inputs, targets * plain.targets, penalty=PENALTY)
    certified(problem, tolerance=1e-6)


def test_what_rounding_to_float32_leaves_is_judged():
    """Atoms that cancel in float64 are of no use after rounding: J was 28,000 times that of the network without any."""
    arch = mf.Architecture((1, 2, 3), mf.Conv((1, 1), bias=True))
    inputs, targets = normal((4, 1, 2, 3), 7) * 1e12, normal((4,), 8) * 1e-3
    problem = mf.Problem(arch, inputs, targets, penalty=mf.Penalty(readout=1e-12, input=1e-3)).to(dtype=torch.float32)
    solution = arrangements.solve(problem)
    assert solution.value <= float(problem.targets.double().square().mean() / 2)
    assert solution.status == "inaccurate"
