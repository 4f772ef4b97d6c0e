import math
import re

import cvxpy as cp
import pytest
import reference as slow
import torch
from hypothesis import given
from stored_optima import TRUTH, stored_case
from strategies import architectures, cases, costly, normal, random_inputs, random_network, random_targets, seeded

import meanfield as mf
from meanfield import certificates


@pytest.fixture(scope="module", params=sorted(TRUTH))
def solved(request):
    problem, network, settings_ = stored_case(request.param)
    program = mf.ConvexProgram.freeze(problem, network)
    return request.param, problem, program, slow.solve(program), settings_


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_stored_start_value(name):
    problem, network, settings_ = stored_case(name)
    program = mf.ConvexProgram.freeze(problem, network)
    assert problem.value(network).item() == pytest.approx(settings_["start"], abs=1e-8)
    assert program.value(program.point(network)).item() == pytest.approx(settings_["start"], abs=1e-8)
    assert program.violation(program.point(network)) < 1e-12


def test_stored_optimum_is_reached(solved):
    name, _, _, solution, settings_ = solved
    truth, tolerance = TRUTH[name]
    assert settings_["optimum"] == pytest.approx(truth, rel=2e-6)
    assert solution.value == pytest.approx(settings_["optimum"], rel=tolerance)
    assert solution.value == pytest.approx(truth, rel=1e-6)


def test_stored_optimum_is_certified(solved):
    _, problem, program, solution, _ = solved
    assert solution.certificate.violation < 1e-7
    assert -1e-9 <= solution.gap < 1e-6
    assert solution.gap == solution.certificate.gap == solution.value - solution.certificate.dual_value
    assert solution.relative_gap == pytest.approx(solution.gap / solution.value)
    assert certificates.dual_value(program, solution.multipliers) == pytest.approx(
        solution.certificate.dual_value, abs=1e-12
    )
    assert problem.value(solution.network).item() == pytest.approx(solution.value, rel=1e-8)


def test_stored_optimum_lies_in_its_bracket(solved):
    name, _, _, solution, _ = solved
    low, high = (1.08029856, 1.08029880) if name == "tanh_softmax_l1" else (0.46029874, 0.46029875)
    # the bracket contains the truth: a value may not fall below it, a lower bound may not exceed it
    assert solution.value >= low - 1e-9
    assert solution.certificate.dual_value <= high + 1e-9


@costly(15)
@given(cases(archs=architectures(depths=(1, 2), sides=(2, 3)), zero_mass=(False, True), max_width=3))
def test_random_programs_are_solved_to_a_small_gap(case):
    program = case.freeze
    solution = slow.solve(program)
    assert solution.status in ("optimal", "inaccurate")
    assert solution.certificate.violation < 1e-7
    # multipliers are exact to the root of the solver's tolerance
    assert -1e-8 * (1 + solution.value) <= solution.gap < 1e-9**0.5 * (1 + solution.value)
    assert solution.value <= case.problem.value(case.network).item() + 1e-7
    assert case.problem.value(solution.network).item() <= solution.value + 1e-8 * (1 + solution.value)
    assert solution.history[0]["solver_value"] == pytest.approx(solution.value, rel=1e-5, abs=1e-6)


def small_program(dtype=torch.float64, loss="squared"):
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2, activation="tanh"), mf.Conv(2, activation="tanh")), outputs=2)
    problem = mf.Problem(arch, random_inputs(arch, 4, 0, dtype), random_targets(loss, 2, 4, 0), loss)
    return mf.ConvexProgram.freeze(problem, random_network(arch, (5, 4), 0, dtype))


def test_candidates_of_zero_mass_never_raise_the_optimum():
    arch = mf.Architecture((1, 3, 3), (mf.Conv(2, activation="tanh"), mf.Conv(2, activation="tanh")))
    network = random_network(arch, (4, 3), 0)
    problem = mf.Problem(
        arch, random_inputs(arch, 3, 0), [0.0, 1.0, 2.0], penalty=mf.Penalty(source=0.01, readout=0.02, input=0.01)
    )
    grown = mf.measures.extend(network, [3, 3], 0.5, seeded(0))
    few, many = (slow.solve(mf.ConvexProgram.freeze(problem, net)).value for net in (network, grown))
    assert many <= few + 1e-8
    assert many < few * (1 - 1e-3)


def test_penalties_beyond_their_critical_value_leave_the_zero_readout():
    """L = 1: the zero readout is optimal once |q_j|^2 / (4 lambda_u) never exceeds lambda_1 (|z_j|^2 - min |z|^2)."""
    arch = mf.Architecture((1, 3, 3), mf.Conv(2, activation="tanh"))
    network = random_network(arch, (1,), 0)
    problem = mf.Problem(arch, random_inputs(arch, 3, 0), [1.0, -1.0, 0.5], penalty=mf.Penalty(readout=1e3, input=0.3))
    solution = slow.solve(mf.ConvexProgram.freeze(problem, network))
    zero = 0.5 * problem.targets.square().mean().item() + 0.3 * network.kernels[0].square().sum().item()
    assert solution.value == pytest.approx(zero, rel=1e-5)


def test_one_feature_has_a_closed_form():
    """L = 1, M = 1, squared loss: min over U of mean (U f - y)^2 / 2 + lambda U^2."""
    arch = mf.Architecture((1, 3, 3), mf.Conv(2, activation="tanh"))
    network = random_network(arch, (1,), 0)
    problem = mf.Problem(arch, random_inputs(arch, 5, 0), normal((5,), 3), penalty=mf.Penalty(readout=0.07, input=0.3))
    program = mf.ConvexProgram.freeze(problem, network)
    f, y = program.readout_features[:, 0].numpy(), problem.targets[:, 0].numpy()
    u = (f @ y / 5) / (f @ f / 5 + 2 * 0.07)
    expected = 0.5 * ((u * f - y) ** 2).mean() + 0.07 * u * u + program.feature_costs.item()
    solution = slow.solve(program)
    assert solution.value == pytest.approx(expected, abs=1e-8)
    assert solution.point.readout.item() == pytest.approx(u, abs=1e-4)


def test_scs_agrees_with_clarabel():
    program = small_program()
    exact = slow.solve(program)
    rough = slow.solve(program, solver="SCS", eps_abs=1e-7, eps_rel=1e-7)
    assert rough.value == pytest.approx(exact.value, rel=1e-4)
    assert rough.gap >= rough.value - exact.value - 1e-6


def test_answer_follows_the_dtype_of_the_program():
    exact, single = slow.solve(small_program()), slow.solve(small_program(torch.float32))
    assert {t.dtype for t in (*single.network.tensors(), *single.point.masses, single.point.readout)} == {torch.float32}
    assert single.value == pytest.approx(exact.value, rel=1e-4)


@pytest.mark.parametrize("loss", ["squared", "softmax"])
def test_iteration_limit_is_a_status_and_not_an_exception(loss):
    program = small_program(loss=loss)
    solution = slow.solve(program, max_iter=2)
    assert solution.status in ("inaccurate", "failed")
    assert math.isfinite(solution.value)
    assert "CLARABEL ended as" in solution.message
    assert solution.gap > 1e-6


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        (cp.SolverError("out of steps"), r"CLARABEL ended as an error \(out of steps\)"),
        (None, "CLARABEL ended as None"),
    ],
)
def test_a_solver_without_an_answer_is_a_failed_solution(monkeypatch, outcome, text):
    program = small_program()

    def no_answer(self, **options):
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(cp.Problem, "solve", no_answer)
    solution = slow.solve(program)
    assert solution.status == "failed"
    assert re.fullmatch(text + ": the solver returned no point", solution.message)
    assert solution.network is program.frozen
    assert solution.value == program.problem.value(program.frozen).item()
    assert solution.gap >= 0


def test_unknown_solver_is_named():
    with pytest.raises(ValueError, match=r"solver='CLARBEL' is unknown.*did you mean 'CLARABEL'"):
        slow.solve(small_program(), solver="CLARBEL")


@pytest.mark.parametrize("seed", [3, 4])
def test_no_bound_comes_of_what_rounding_left_of_float32_features(seed):
    """Multipliers outside the range of the design made of it bounds 4% and 15% above the optimum."""
    arch = mf.Architecture((1, 4, 4), (mf.Conv(2, padding=1, activation="identity"), mf.Conv(3, activation="tanh")))
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64)
    targets = torch.randn(8, generator=generator, dtype=torch.float64)
    penalty = mf.Penalty(source=1e-3, readout=1e-3, input=1e-9)
    problem = mf.Problem(arch, inputs, targets, penalty=penalty).to(dtype=torch.float32)
    network = mf.starts.draw(problem, (8, 3), generator, "low_rank")
    solution = mf.solvers.reference.solve(mf.ConvexProgram.freeze(problem, network))
    assert solution.status == "optimal"
    assert abs(solution.relative_gap) <= 1e-6
