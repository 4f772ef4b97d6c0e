"""Active bounds of every kind: whatever a solver returns has J finite and equal to its value, and a gap that is one."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import NORMS, bounded, costly, random_inputs, random_network, random_targets, seeds

import meanfield as mf
from meanfield.problem import FEASIBLE, project_bounds
from meanfield.solvers import alternating, flow, reference, splitting

ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-9}  # of J: sums over images of a few hundred terms; gaps included
SOLVERS = {
    "splitting": lambda problem, frozen: splitting.solve(frozen, max_iterations=1000),
    "CLARABEL": lambda problem, frozen: reference.solve(frozen),
    "SCS": lambda problem, frozen: reference.solve(frozen, "SCS", eps_abs=1e-6, eps_rel=1e-6, max_iters=2000),
    "flow": lambda problem, frozen: flow.solve(problem, frozen.frozen, steps=30),
    "alternating": lambda problem, frozen: alternating.solve(
        problem, frozen.frozen, rounds=2, flow_steps=20, program_iterations=200
    ),
}


@st.composite
def active(draw, dtypes=(torch.float32, torch.float64), depths=(1, 2, 3)):
    """A problem and a start whose bounds, at 0.7 of what a random network reaches, bind after projection."""
    bias, depth = draw(st.booleans()), draw(st.sampled_from(depths))
    layers = tuple(mf.Conv(size, activation="tanh", bias=bias) for size in (2, (1, 2), 1)[:depth])
    arch = mf.Architecture((1, 3, 3), layers, outputs=2)
    seed, dtype = draw(seeds), draw(st.sampled_from(dtypes))
    network = random_network(arch, (5, 4, 3)[:depth], seed)
    penalty = mf.Penalty(source=0.003, readout=0.005, input=0.002, kernel_norm=draw(st.sampled_from(NORMS)))
    penalty = bounded(penalty, network, 0.7, draw(st.sampled_from([None, 0.7])))
    inputs, targets = random_inputs(arch, 3, seed), random_targets("squared", 2, 3, seed)
    problem = mf.Problem(arch, inputs, targets, penalty=penalty).to(dtype=dtype)
    start = project_bounds(problem, network.to(dtype=dtype))
    return problem, mf.ConvexProgram.freeze(problem, start)


def judge(problem, solution, close=ROUNDING):
    """All that holds of any answer."""
    dtype = problem.inputs.dtype
    value, rounding = problem.value(solution.network).item(), ROUNDING[dtype] * abs(solution.value)
    assert math.isfinite(value)
    assert value == pytest.approx(solution.value, rel=close[dtype])
    assert solution.gap >= -rounding
    assert problem.excess(solution.network) <= FEASIBLE[dtype]
    assert solution.certificate.violation <= FEASIBLE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("solver", sorted(SOLVERS))
@costly(12)
@given(active())
def test_every_answer_has_its_value_as_j(solver, case):
    problem, frozen = case
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the infimum over all measures")
        solution = SOLVERS[solver](problem, frozen)
    judge(problem, solution)
    start = problem.value(frozen.frozen).item()
    assert solution.value <= start + ROUNDING[problem.inputs.dtype] * start
    if solution.status == "optimal":
        assert abs(solution.relative_gap) <= 1e-6


@pytest.mark.slow
@costly(6)
@given(active(dtypes=(torch.float64,), depths=(2, 3)))
def test_splitting_and_clarabel_agree_within_their_gaps(case):
    problem, frozen = case
    ours, theirs = splitting.solve(frozen), reference.solve(frozen)
    for solution in (ours, theirs):
        judge(problem, solution)
    assert ours.status == "optimal"
    rounding = ROUNDING[torch.float64] * ours.value
    assert -theirs.gap - rounding <= ours.value - theirs.value <= ours.gap + rounding


def after_a_flow(seed):
    """Digits, widths (8, 4) and B = 0.6: kernels that the images fix, with amplitudes on the bound itself."""
    digits = mf.data.load("digits", classes=(3, 5), samples=8, pool=2)
    layer = mf.Conv(3, padding=1, activation="tanh")
    arch = mf.Architecture(digits.input_shape, (layer, layer))
    problem = mf.Problem(arch, digits.inputs, digits.targets("squared"), penalty=mf.Penalty(amplitude_bound=0.6))
    start = mf.starts.draw(problem, (8, 4), torch.Generator().manual_seed(seed), "low_rank")
    return problem, flow.solve(problem, start, steps=300).network


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 4, 5])
def test_a_program_frozen_after_a_flow_is_solved_and_not_its_start_returned(seed):
    """Sources of mass 1e-10 realise 1e-8 to 1e-6 of the features: the splitting takes all their mass."""
    problem, network = after_a_flow(seed)
    solution, theirs = (
        solve(mf.ConvexProgram.freeze(problem, network)) for solve in (splitting.solve, reference.solve)
    )
    # such a support may realise its features to FEASIBLE only, which leaves as much of a value open, from below too
    unrealised = FEASIBLE[torch.float64] * theirs.value
    assert -theirs.gap - unrealised <= solution.value - theirs.value <= 2e-5 * theirs.value
    # proven to have gone a thousandth short of the way from the start to the optimum, at most
    assert solution.gap < 1e-3 * (problem.value(network).item() - solution.value)
    judge(problem, solution, FEASIBLE)


@pytest.mark.parametrize(
    ("solver", "strengths"),
    [
        ("CLARABEL", (1e-9, 1e3, 1e-3)),
        ("SCS", (1e-9, 1e6, 1e-3)),
        ("CLARABEL", (1e-9, 1e6, 1e-3)),
        ("CLARABEL", (1e6, 1e-3, 1e-3)),
        ("CLARABEL", (1e-12, 1e-12, 1e-12)),
        ("CLARABEL", (1e3, 1e-9, 1e6)),
        ("CLARABEL", (1e-9, 1e-9, 1e3)),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_extreme_penalties_are_solved(solver, strengths, seed):
    """Without units to suit them relative gaps were 2e-5 to 0.81, or the solver gave up."""
    arch = mf.Architecture((1, 2, 2), (mf.Conv(1, activation="tanh"), mf.Conv(1, activation="tanh")))
    penalty = mf.Penalty(**dict(zip(("source", "readout", "input"), strengths)))
    problem = mf.Problem(arch, random_inputs(arch, 4, seed), random_targets("squared", 1, 4, seed), penalty=penalty)
    solution = reference.solve(mf.ConvexProgram.freeze(problem, random_network(arch, (4, 3), seed)), solver)
    judge(problem, solution)
    assert solution.status == "optimal"
    assert abs(solution.relative_gap) <= 1e-6


def test_a_solver_that_is_stopped_short_is_not_optimal_by_its_own_word():
    """Its message says what the certificate reached."""
    arch = mf.Architecture((1, 2, 2), (mf.Conv(1, activation="tanh"), mf.Conv(1, activation="tanh")))
    penalty = mf.Penalty(source=1e-9, readout=1e3, input=1e-3)
    problem = mf.Problem(arch, random_inputs(arch, 4, 0), random_targets("squared", 1, 4, 0), penalty=penalty)
    frozen = mf.ConvexProgram.freeze(problem, random_network(arch, (4, 3), 0))
    solution = reference.solve(frozen, "SCS", max_iters=50)
    assert solution.status == "inaccurate"
    assert f"relative gap {solution.relative_gap:.2g}: " in solution.message
    assert solution.relative_gap > 1e-6
    assert len(solution.history) == len(reference.UNITS)
