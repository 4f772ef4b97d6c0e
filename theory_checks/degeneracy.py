"""Claim 2, beside convexity: with the source outside, the program's optimum is a network; with the target outside it
is not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import cvxpy as cp
import numpy as np

import meanfield as mf
from theory_checks.claim import Axes, Claim, Evidence, Series, Setting
from theory_checks.instances import random_network, random_problem
from theory_checks.statistics import largest

WIDTHS = (6, 4)
LIGHT = 1e-6  # of the mean mass: an interior-point method leaves about 1e-9 on particles without mass
CLARABEL = {"tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "tol_feas": 1e-9}
Order = Callable[[cp.Expression, cp.Variable, cp.Variable], cp.Expression]


def _source_outside(norms: cp.Expression, source: cp.Variable, target: cp.Variable) -> cp.Expression:
    """sum_i (sum_j |W_ij|)^2 / p_i."""
    return sum((cp.quad_over_lin(cp.sum(norms[:, i]), source[i]) for i in range(WIDTHS[0])), cp.Constant(0))


def _target_outside(norms: cp.Expression, source: cp.Variable, target: cp.Variable) -> cp.Expression:
    """sum_j (sum_i |W_ij|)^2 / p_j: convex too."""
    return sum((cp.quad_over_lin(cp.sum(norms[j]), target[j]) for j in range(WIDTHS[1])), cp.Constant(0))


def _optimum(program: mf.ConvexProgram, order: Order) -> tuple[np.ndarray, np.ndarray, float]:
    """Source masses and outflows sum_j |W_ij| at the optimum with the given penalty, and the optimal value."""
    problem, penalty = program.problem, program.problem.penalty
    preactivations, features = program.maps(problem.inputs)
    design = problem.architecture.layers[1].patches(features[0]).flatten(0, 1).cpu().numpy()  # (N P, M_1 S)
    g = preactivations[1].movedim(1, 0).flatten(1).cpu().numpy()  # (M_2, N P)
    offsets = problem.architecture.layers[1].offsets
    source, target = cp.Variable(WIDTHS[0], nonneg=True), cp.Variable(WIDTHS[1], nonneg=True)
    kernels, readout = cp.Variable((WIDTHS[1] * WIDTHS[0], offsets)), cp.Variable(WIDTHS[1])
    norms = cp.reshape(cp.norm(kernels, 2, axis=1), WIDTHS[::-1], order="C")
    flat = cp.reshape(kernels, (WIDTHS[1], WIDTHS[0] * offsets), order="C")
    misfit = program.readout_features.cpu().numpy() @ readout - problem.targets[:, 0].cpu().numpy()
    spread = sum(cp.quad_over_lin(readout[j], target[j]) for j in range(WIDTHS[1]))
    objective = (
        cp.sum_squares(misfit) / (2 * len(problem.inputs))
        + penalty.source * order(norms, source, target)
        + penalty.readout * spread
        + program.feature_costs.cpu().numpy() @ source
    )
    constraints = [cp.sum(source) == 1, cp.sum(target) == 1, flat @ design.T == cp.diag(target) @ g]
    model = cp.Problem(cp.Minimize(objective), constraints)
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        # outflows are told apart by orders of magnitude
        warnings.filterwarnings("ignore", message="Solution may be inaccurate")
        model.solve(solver="CLARABEL", **CLARABEL)
    assert model.solution is not None
    outflow = np.linalg.norm(np.asarray(kernels.value), axis=1).reshape(WIDTHS[::-1]).sum(0)
    return np.asarray(source.value), outflow, float(model.solution.opt_val)


def _through_light_sources(setting: Setting, order: Order) -> Evidence:
    """How much flows out of a source, against the most that a finite source penalty allows: sqrt(J p_i / lambda_s)."""
    ratios, shares, series = [], [], []
    for instance in range(setting.instances(3, 20)):
        generator = setting.generator(3, instance)
        problem = random_problem(generator, 2, side=2, images=1, loss="squared", device=setting.device)
        program = mf.ConvexProgram.freeze(problem, random_network(problem, WIDTHS, generator))
        masses, outflow, value = _optimum(program, order)
        masses = masses.clip(LIGHT / WIDTHS[0])
        ratios.append(float((outflow / np.sqrt(value * masses / problem.penalty.source)).max()))
        shares.append(float(outflow[masses <= LIGHT / WIDTHS[0]].sum() / outflow.sum()))
        series.append(Series(f"optimum {instance}", masses.tolist(), outflow.tolist(), "points"))
    text = (
        f"largest outflow {max(ratios):.2g} of what a source penalty of J allows; without mass {min(shares):.1%} to "
        f"{max(shares):.1%} of all flow"
    )
    return Evidence(largest(ratios), text, len(ratios), sum(ratio > 1 for ratio in ratios), tuple(series[:4]))


CLAIMS = (
    Claim(
        name="degeneracy",
        statement="With the source outside, nothing flows out of features without mass: the optimum of the program is "
        "a network.",
        source="docs/theory.md, sections 2 and 3",
        statistic="largest outflow sum_j |W_ij| of a source at the optimum, over sqrt(J p_i / lambda_s)",
        threshold=1.0,
        derivation=(
            "lambda_s (sum_j |W_ij|)^2 / p_i <= J at every finite point of value J; masses are read as at least 1e-6 "
            "of the mean, a thousand times what the interior-point method leaves"
        ),
        limits="The other order is convex as well: convexity alone does not make a penalty sensible.",
        measure=lambda setting: _through_light_sources(setting, _source_outside),
        controls={"target outside": lambda setting: _through_light_sources(setting, _target_outside)},
        axes=Axes("mass of the source at the optimum", "what flows out of it", "x"),
    ),
)
