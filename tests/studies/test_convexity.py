"""The convexity study against functions whose curvature is known, and the program's variables
against its own checks.
"""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import architectures, cases, costly, normal, seeded

import meanfield as mf
from meanfield import starts, storage
from meanfield.studies import convexity
from meanfield.studies.convexity import ProgramVariables, Witness


def quadratic(matrix):
    return lambda x: x @ matrix @ x / 2


def symmetric(eigenvalues, seed=0):
    basis = torch.linalg.qr(normal((len(eigenvalues), len(eigenvalues)), seed)).Q
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T, basis


def test_segments_of_a_quadratic_have_the_excess_of_its_curvature():
    matrix, _ = symmetric([3.0, 1.0, -2.0])
    points = normal((5, 3), 1)
    found = convexity.segments(quadratic(matrix), points, times=3)
    for row, (a, b) in zip(found.excess, found.pairs):
        step = points[b] - points[a]
        for excess, t in zip(row, (0.25, 0.5, 0.75)):  # f((1-t)a+tb) - chord = -t(1-t)/2 (b-a)'H(b-a)
            assert math.isclose(float(excess), float(-t * (1 - t) / 2 * step @ matrix @ step), abs_tol=1e-12)


def test_segments_name_their_worst_line_and_replay_it():
    function = lambda x: -x.square().sum()  # noqa: E731
    found = convexity.segments(function, normal((4, 2), 3))
    assert not found.convex
    assert bool(found.violated.all())
    assert found.worst.proves
    assert math.isclose(found.worst.replay(function), found.worst.violation, rel_tol=1e-12)


CONVEX = (
    lambda x: x.square().sum(),
    lambda x: x.abs().sum(),
    lambda x: x.square().sum().sqrt(),
    lambda x: x.exp().sum(),
)


@pytest.mark.parametrize("function", CONVEX)
def test_convex_functions_pass_all_three(function):
    points = normal((6, 4), 5) + 0.1
    assert convexity.segments(function, points).convex
    assert not convexity.curvature(function, points[0]).negative
    assert not convexity.falsify(function, lambda g: torch.randn(4, generator=g, dtype=torch.float64), 600).falsified


def test_an_affine_function_has_no_curvature_and_no_witness():
    function = lambda x: 3 * x[0] - x[1] + 2  # noqa: E731
    found = convexity.curvature(function, normal((2,), 0))
    assert (found.smallest, found.largest) == (0.0, 0.0)
    assert convexity.segments(function, normal((4, 2), 1), rounding=lambda x: 1e-14 * float(x.abs().sum() + 1)).convex


@pytest.mark.parametrize("dense", [True, False])
def test_curvature_finds_both_ends_of_a_known_spectrum(monkeypatch, dense):
    monkeypatch.setattr(convexity, "DENSE_DIMENSION", 1000 if dense else 3)
    eigenvalues = [-0.3, *torch.linspace(0, 4, 30).tolist()]
    matrix, basis = symmetric(eigenvalues)
    found = convexity.curvature(quadratic(matrix), normal((31,), 2))
    assert math.isclose(found.smallest, -0.3, abs_tol=1e-6)
    assert math.isclose(found.largest, 4.0, abs_tol=2e-2)  # the upper end only sets the scale
    assert found.negative
    assert abs(float(found.direction @ basis[:, 0])) > 1 - 1e-5
    assert found.residual < 1e-4


def test_curvature_on_a_tangent_space_sees_only_that_space():
    matrix = torch.diag(torch.tensor([1.0, -5.0, 2.0], dtype=torch.float64))
    plane = torch.eye(3, dtype=torch.float64)[:, [0, 2]]
    found = convexity.curvature(quadratic(matrix), normal((3,), 0), plane)
    assert (round(found.smallest, 12), round(found.largest, 12), found.dimension) == (1.0, 2.0, 2)
    with pytest.raises(ValueError, match=r"tangent has shape \(2, 2\)"):
        convexity.curvature(quadratic(matrix), normal((3,), 0), torch.eye(2, dtype=torch.float64))


def test_entries_that_no_direction_moves_may_sit_on_a_kink():
    function = lambda x: x[:2].square().sum() + torch.linalg.vector_norm(x[2:].reshape(1, 2), dim=1).sum() ** 2  # noqa: E731
    point = torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    found = convexity.curvature(function, point, torch.eye(4, dtype=torch.float64)[:, :2])
    assert math.isclose(found.smallest, 2.0)


def test_falsify_finds_a_dent_that_random_lines_miss():
    """Convex but for a narrow saddle at the origin."""
    function = lambda x: x.square().sum() - 1.2 * x[0] * x[1] * 2 * torch.exp(-20 * x.square().sum())  # noqa: E731
    sample = lambda g: torch.randn(2, generator=g, dtype=torch.float64)  # noqa: E731
    found = convexity.falsify(function, sample, 3000, seed=1)
    assert found.falsified
    assert found.witness.replay(function) == pytest.approx(found.witness.violation)
    assert found.evaluations <= 3000
    assert len(found.reached) == 3000 // (3 * (convexity.ASCENT_STEPS + 1))


def test_falsify_stays_inside_the_hull_of_what_the_sampler_gives():
    seen = []

    def function(x):
        seen.append(x.detach())
        return -x.square().sum()

    convexity.falsify(function, lambda g: torch.rand(3, generator=g, dtype=torch.float64), 300)
    stacked = torch.stack(seen)
    assert float(stacked.min()) >= 0
    assert float(stacked.max()) <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_with_the_point(bad):
    """NaN is below no chord and above none: it said falsified False, and convex False of lines."""
    function = lambda x: torch.where(x[0] > 0.5, bad * torch.ones(()).double(), x.square().sum())  # noqa: E731
    expected = re.escape(f"function is {bad:g} at the feasible point [0.") + ".*judged where it is finite"
    with pytest.raises(ValueError, match=expected):
        convexity.falsify(function, lambda g: torch.rand(2, generator=g, dtype=torch.float64), 300)
    with pytest.raises(ValueError, match=expected):
        convexity.segments(function, torch.tensor([[0.0, 0.0], [0.9, 0.0]], dtype=torch.float64))


def test_what_is_no_number_that_torch_differentiates_is_refused():
    points = torch.ones(2, 3, dtype=torch.float64)
    for measure in (lambda f: convexity.segments(f, points), lambda f: convexity.curvature(f, points[0])):
        with pytest.raises(ValueError, match=r"function=\(3,\) is the shape of its value: must be \(\)"):
            measure(lambda x: 2 * x)
        with pytest.raises(TypeError, match=r"function\(point\) must be a torch\.Tensor, not float"):
            measure(lambda x: x[0].detach().item())
    with pytest.raises(ValueError, match=r"function=1\.0 is a value without a gradient"):
        convexity.curvature(lambda x: x[0].detach(), points[0])


def test_a_file_of_other_tensors_is_no_witness(tmp_path):
    path = storage.save_tensors({"start": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w.safetensors holds no witness against convexity, but \['start'\]"):
        Witness.load(path)


def test_a_witness_survives_its_file(tmp_path):
    witness = Witness(normal((3,), 0), normal((3,), 1), 0.25, 1.5, 2.0, 1e-12)
    again = Witness.load(witness.save(tmp_path / "w.safetensors"))
    assert torch.equal(again.start, witness.start)
    assert (again.t, again.violation, again.scale, again.rounding) == (0.25, 1.5, 2.0, 1e-12)


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match=r"points has shape \(1, 3\)"):
        convexity.segments(lambda x: x.sum(), torch.zeros(1, 3, dtype=torch.float64))


smooth = architectures(activations=("tanh", "softplus"), poolings=("none", "average"))


@costly(25)
@given(case=cases(archs=smooth, bounds=(None,)), seed=st.integers(0, 1000))
def test_sampled_vectors_are_feasible_and_the_tangent_keeps_them_so(case, seed):
    variables = ProgramVariables(case.freeze)
    draw = seeded(seed)
    vector = variables.sample(draw)
    assert variables.program.violation(variables.point(vector)) < 1e-9
    tangent = variables.tangent(vector)
    moved = variables.point(vector + tangent @ (1e-2 * normal((tangent.shape[1],), seed)))
    assert all(abs(float(p.sum()) - 1) < 1e-12 for p in moved.masses)
    for layer in range(1, variables.program.depth):
        scale = float(variables.program.flows[layer].abs().max()) + float(moved.kernels[layer - 1].abs().max())
        assert float(variables.program.residual(moved, layer).abs().max()) < 1e-10 * (1 + scale)


@costly(25)
@given(case=cases(archs=smooth, bounds=(None,)))
def test_the_vector_form_has_the_program_s_value(case):
    variables = ProgramVariables(case.freeze)
    vector = variables.template.vector()
    assert torch.equal(variables.point(vector).vector(), vector)
    value = float(case.problem.value(case.network))
    assert abs(float(variables.objective(vector)) - value) <= 4 * variables.rounding(vector) + 1e-13 * value


def test_the_rounding_bound_covers_single_precision():
    """The same formula in float32 against float64: the bound holds and is no more than a few
    hundred times too large.
    """
    arch = mf.Architecture((2, 3, 3), (mf.Conv(2, activation="tanh"), mf.Conv(2, activation="tanh")), "average", 1)
    inputs, targets = normal((4, 2, 3, 3), 0), normal((4, 1), 1)
    network = starts.start(arch, (6, 5), inputs, seeded(0))
    exact = ProgramVariables(mf.ConvexProgram.freeze(mf.Problem(arch, inputs, targets), network))
    single = ProgramVariables(exact.program.to(dtype=torch.float32))
    for seed in range(20):
        vector = exact.sample(seeded(seed)).float()
        error = abs(float(single.objective(vector)) - float(exact.objective(vector.double())))
        assert error <= single.rounding(vector)
        assert single.rounding(vector) < 1e-2 * float(single.objective(vector))


def plane(x):
    return x[1:] - 1


def disc(x):
    return x.square().sum() - 4


def sampler(size, dtype=torch.float64):
    return lambda g: 2 * torch.randn(size, generator=g, dtype=torch.float64).to(dtype)


class TestConstraints:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_a_function_that_is_convex_only_where_the_constraints_hold(self, dtype):
        """x^2 - y^2 where y = 1, x^3 where x >= 0."""
        saddle, cubic = (lambda x: x[0] ** 2 - x[1] ** 2 + 5), (lambda x: x.pow(3).sum())
        assert convexity.falsify(saddle, sampler(2, dtype), 600).falsified
        assert not convexity.falsify(saddle, sampler(2, dtype), 600, equalities=plane).falsified
        assert convexity.falsify(cubic, sampler(2, dtype), 600).falsified
        assert not convexity.falsify(cubic, sampler(2, dtype), 600, inequalities=lambda x: -x).falsified

    def test_a_convex_function_is_not_falsified_and_another_is_by_points_of_the_set(self):
        both = {"equalities": plane, "inequalities": disc}
        assert not convexity.falsify(lambda x: x.exp().sum(), sampler(3), 600, **both).falsified
        found = convexity.falsify(lambda x: 9 - x.square().sum(), sampler(3), 600, **both)
        assert found.falsified
        for point in (found.witness.start, found.witness.end):
            assert float(plane(point).abs().max()) < 1e-14
            assert float(disc(point)) < 1e-7
        # along y = z = 1, x between -sqrt(2) and sqrt(2): 9 - 3 at the middle against 9 - 5... at the ends 9 - 4
        assert found.witness.violation == pytest.approx(2, abs=0.3)

    def test_points_that_are_in_the_set_are_left_alone(self):
        point = torch.tensor([0.3, 0.4], dtype=torch.float64)
        assert torch.equal(convexity._Constraints(None, disc).restored(point), point)

    def test_a_point_moves_to_the_set_by_the_least_change(self):
        """To an affine set the nearest point, to a disc along the radius."""
        rows, point = normal((2, 4), 3), normal((4,), 4)
        moved = convexity._Constraints(lambda x: rows @ x - 1, None).restored(point)
        expected = point - torch.linalg.pinv(rows) @ (rows @ point - 1)
        torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)
        far = torch.tensor([3.0, 4.0], dtype=torch.float64)
        torch.testing.assert_close(convexity._Constraints(None, disc).restored(far), far * 2 / 5, rtol=1e-7, atol=1e-7)

    def test_sets_that_are_not_convex_or_empty_are_refused(self):
        square = lambda x: x.square().sum()  # noqa: E731
        with pytest.raises(ValueError, match="no convex set, halfway between two of its points: constraints are off"):
            convexity.falsify(square, sampler(2), 600, equalities=disc)
        with pytest.raises(ValueError, match="no convex set"):
            convexity.falsify(square, sampler(2), 600, inequalities=lambda x: 1 - x.square().sum())
        with pytest.raises(ValueError, match="no feasible point was found near one that was drawn"):
            convexity.falsify(square, sampler(2), 600, inequalities=lambda x: 1 + x.square().sum())

    def test_curvature_is_that_of_the_directions_which_keep_the_equalities(self):
        """H = diag(2, -4, 6) where x_1 = x_2: along (1, 1, 0) / sqrt(2) it is (2 - 4) / 2, along the last axis 6."""
        function = lambda x: x[0] ** 2 - 2 * x[1] ** 2 + 3 * x[2] ** 2  # noqa: E731
        point = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)
        found = convexity.curvature(function, point, equalities=lambda x: x[0] - x[1])
        assert (found.smallest, found.largest) == (pytest.approx(-1), pytest.approx(6))
        kept = convexity.curvature(function, point, equalities=lambda x: x[1:2] - 1)
        assert (kept.smallest, kept.largest, kept.negative) == (pytest.approx(2), pytest.approx(6), False)
        assert convexity.curvature(function, point).smallest == pytest.approx(-4)

    def test_an_inequality_takes_no_direction_away(self):
        """x^3 at its border x = 0 of x >= 0, and -x^2 there: negative inside as well."""
        border = torch.zeros(1, dtype=torch.float64)
        assert not convexity.curvature(lambda x: x.pow(3).sum(), border, inequalities=lambda x: -x).negative
        assert convexity.curvature(lambda x: -x.square().sum(), border, inequalities=lambda x: -x).negative

    def test_curvature_refuses_what_it_cannot_judge(self):
        square, point = (lambda x: x.square().sum()), torch.tensor([2.0, 0.0], dtype=torch.float64)
        with pytest.raises(ValueError, match="equalities are not affine"):
            convexity.curvature(square, point, equalities=disc)
        with pytest.raises(ValueError, match=r"point is not in the set: constraints are off by 1 at \[2.0, 0.0\]"):
            convexity.curvature(square, point, equalities=plane)
        with pytest.raises(ValueError, match="point is not in the set"):
            convexity.curvature(square, 2 * point, inequalities=disc)
        with pytest.raises(ValueError, match="leave no direction"):
            convexity.curvature(square, point, equalities=lambda x: x - point)
        with pytest.raises(ValueError, match=r"tangent=\(2, 2\) and equalities both say"):
            convexity.curvature(square, point, torch.eye(2).double(), equalities=lambda x: x[1])
