"""Claim 10: no lower bound ever lies above a value, whatever the multipliers and whoever made them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

import meanfield as mf
from meanfield import certificates
from meanfield.certificates import Multipliers
from meanfield.starts import normal
from meanfield.studies.convexity import ProgramVariables
from theory_checks.claim import Axes, Claim, Evidence, Series, Setting
from theory_checks.instances import LOSSES, random_network, random_problem
from theory_checks.statistics import share_text

WIDTHS = ((6,), (6, 4), (5, 4, 3))
NOISES = (0.0, 1e-6, 1e-4, 1e-2, 0.1, 0.5, 1.0, 10.0)
SOLVER_TOLERANCE, MOST_ITERATIONS = 1e-6, 400


@lru_cache(maxsize=128)
def _optimal(setting: Setting, instance: int) -> tuple[mf.ConvexProgram, mf.ProgramPoint, Multipliers]:
    """A random program with a near-optimal point: the smallest values that lower bounds have to stay under."""
    generator = setting.generator(10, instance)
    depth, loss = 1 + instance % 3, LOSSES[instance // 3 % 3]
    problem = random_problem(
        generator, depth, side=2, images=3, loss=loss, kernel_norm=("l2", "l1")[instance % 2], device=setting.device
    )
    program = mf.ConvexProgram.freeze(problem, random_network(problem, WIDTHS[depth - 1], generator))
    solved = mf.solvers.splitting.solve(program, SOLVER_TOLERANCE, max_iterations=MOST_ITERATIONS)
    assert solved.point is not None
    assert solved.multipliers is not None
    return program, program.restore(solved.point), solved.multipliers


def _perturbed(multipliers: Multipliers, noise: float, generator: torch.Generator) -> Multipliers:
    """Every multiplier plus Gaussian noise of `noise` times the root mean square of its kind."""
    return multipliers.map(lambda m: m + noise * m.square().mean().sqrt() * normal(m.shape, generator, m))


Bound = Callable[[mf.ConvexProgram, Multipliers, Multipliers], float]


def _repaired(program: mf.ConvexProgram, optimal: Multipliers, moved: Multipliers) -> float:
    return certificates.dual_value(program, moved)


def _unrepaired(program: mf.ConvexProgram, optimal: Multipliers, moved: Multipliers) -> float:
    """-mean conjugate of the moved multipliers less the mass multipliers of the optimal ones, which they no longer
    satisfy.
    """
    problem = program.problem
    count = len(problem.inputs)
    conjugate = float(problem.loss.conjugate(count * optimal.output, problem.targets).mean())
    masses = -certificates.dual_value(program, optimal) - conjugate  # sum of mu_l
    return -float(problem.loss.conjugate(count * moved.output, problem.targets).mean()) - masses


def _pairs(setting: Setting, bound: Bound) -> Evidence:
    """Every bound against the optimal value and against feasible points of all kinds; in units of rounding."""
    worst, at_optimum, total, beyond = [], [], 0, 0
    for instance in range(setting.either(9, 45)):
        program, point, multipliers = _optimal(setting, instance)
        generator, variables = setting.generator(101, instance), ProgramVariables(program)
        vectors = [point.vector(), *(variables.sample(generator) for _ in range(11))]
        values = torch.tensor([float(program.value(point.at(vector))) for vector in vectors], dtype=torch.float64)
        allowed = torch.tensor([2 * variables.rounding(vector) for vector in vectors], dtype=torch.float64)
        moved = [_perturbed(multipliers, noise, generator) for noise in NOISES for _ in range(setting.either(1, 4))]
        bounds = torch.tensor([bound(program, multipliers, each) for each in moved], dtype=torch.float64)
        ratios = (bounds[:, None] - values) / allowed
        worst.append(float(ratios.max()))
        at_optimum.append((bounds.reshape(len(NOISES), -1).amax(1) / values[0]).tolist())
        total, beyond = total + ratios.numel(), beyond + int((ratios > 1).sum())
    closest = [max(each[k] for each in at_optimum) for k in range(len(NOISES))]
    text = (
        f"{share_text(beyond, total, 'pairs have the bound above the value')}; the best bound reaches "
        f"{max(closest):.7f} of an optimal value"
    )
    shown = [max(noise, 1e-7) for noise in NOISES if noise <= 1]
    lines = tuple(Series(f"program {k}", shown, line[: len(shown)]) for k, line in enumerate(at_optimum[:6]))
    return Evidence(max(worst), text, total, beyond, lines)


CLAIMS = (
    Claim(
        name="weak_duality",
        statement="Any multipliers, once repaired, give a lower bound of the program: it never lies above a feasible "
        "value.",
        source="docs/theory.md, section 5",
        statistic="largest (lower bound - value) over random pairs, in rounding bounds of the value",
        threshold=1.0,
        derivation="running error bound of the value, twice (the bound is summed from as many terms)",
        limits="A bound on this support. Features nobody has tried need the bound over all measures.",
        measure=lambda setting: _pairs(setting, _repaired),
        controls={"multipliers not repaired": lambda setting: _pairs(setting, _unrepaired)},
        axes=Axes(
            "noise on the optimal multipliers (its root mean square = 1)",
            "best lower bound / optimal value",
            "x",
            1.0,
            "the optimal value",
        ),
    ),
)
