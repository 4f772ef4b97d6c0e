"""The main job against known optima: one layer against the exact optimum, two layers against its own convex programs.

One layer: digits 3 against 5 (the first 12 in file order, pooled to 4x4), ReLU, kernel 1x2; the optimum over all
measures is a finite cone program over 174 activation patterns, whose value is EXACT_ONE_LAYER.  Two layers: the same
digits, 3x3 kernels, tanh.  There `flow_gap`, J at the end of a round's flow minus the dual value of the program frozen
there, bounds what the convex program could still gain; the final program is solved again by CLARABEL.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import meanfield as mf
from meanfield import data, measures

EXACT_ONE_LAYER = 0.32012158137
DIGITS = {"classes": (3, 5), "samples": 12, "pool": 2}


def one_layer_problem() -> mf.Problem:
    digits = data.load("digits", **DIGITS)
    arch = mf.Architecture(digits.input_shape, (mf.Conv((1, 2), activation="relu"),))
    return mf.Problem(arch, digits.inputs, digits.targets("squared"), penalty=mf.Penalty(input=2e-3, readout=2e-3))


def two_layer_problem() -> mf.Problem:
    digits = data.load("digits", **DIGITS)
    arch = mf.Architecture(digits.input_shape, (mf.Conv(3, padding=1, activation="tanh"),) * 2)
    return mf.Problem(
        arch, digits.inputs, digits.targets("squared"), penalty=mf.Penalty(source=3e-4, input=3e-4, readout=3e-3)
    )


def one_layer(seeds: range, particles: int = 64) -> list[dict[str, Any]]:
    problem = one_layer_problem()
    rows = []
    for seed in seeds:
        solution = mf.solve(problem, (particles,), seed=seed)
        rows.append(
            {
                "seed": seed,
                "value": solution.value,
                "excess": solution.value - EXACT_ONE_LAYER,
                "seconds": solution.seconds,
            }
        )
    return rows


def two_layers(seeds: range, rounds: int = 8, widths: tuple[int, int] = (30, 12)) -> list[dict[str, Any]]:
    problem = two_layer_problem()
    rows = []
    for seed in seeds:
        # a tolerance that is never met: every round is run
        solution = mf.solve(problem, widths, seed=seed, rounds=rounds, tolerance=1e-12, program_tolerance=1e-5)
        final = mf.ConvexProgram.freeze(problem, measures.drop_massless(solution.network))
        reference = mf.solvers.reference.solve(final)
        values = [row[key] for row in solution.history for key in ("flow_value", "value")]
        rows.append(
            {
                "seed": seed,
                "value": solution.value,
                "gap": solution.gap,
                "flow_gaps": [row["flow_gap"] for row in solution.history],
                "never_rises": all(after <= before * (1 + 1e-12) for before, after in pairwise(values)),
                "reference_value": reference.value,
                "reference_gap": reference.gap,
                "seconds": solution.seconds,
            }
        )
    return rows


def run(seeds_one: int = 5, seeds_two: int = 3, rounds: int = 8) -> dict[str, Any]:
    return {"one_layer": one_layer(range(seeds_one)), "two_layers": two_layers(range(seeds_two), rounds)}
