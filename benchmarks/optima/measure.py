"""The main job against known optima: one layer against the exact optimum, two layers against its own convex programs.

One layer: digits 3 against 5 (the first 12 in file order, pooled to 4x4), ReLU, kernel 1x2; the optimum over all
measures is a finite cone program over 174 activation patterns, whose value is EXACT_ONE_LAYER.  Two layers: the same
digits, 3x3 kernels, tanh.  There `flow_gap`, J at the end of a round's flow minus the dual value of the program frozen
there, bounds what the convex program could still gain; the final program is solved again by CLARABEL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import meanfield as mf
from benchmarks.options import BenchmarkOptions
from meanfield import data, measures
from meanfield.bench.options import WORK, at_least, option

EXACT_ONE_LAYER = 0.32012158137
PARTICLES, WIDTHS = 64, (30, 12)  # of the starts


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    seeds_one: Annotated[int, option("Seeds of the one-layer problem.", WORK), at_least(1)] = 5
    seeds_two: Annotated[int, option("Seeds of the two-layer problem.", WORK), at_least(1)] = 3
    rounds: Annotated[int, option("Rounds of the two-layer alternation.", WORK), at_least(1)] = 8


def one_layer_problem() -> mf.Problem:
    return _problem((mf.Conv((1, 2), activation="relu"),), mf.Penalty(input=2e-3, readout=2e-3))


def two_layer_problem() -> mf.Problem:
    layers = (mf.Conv(3, padding=1, activation="tanh"),) * 2
    return _problem(layers, mf.Penalty(source=3e-4, input=3e-4, readout=3e-3))


def _problem(layers: tuple[mf.Conv, ...], penalty: mf.Penalty) -> mf.Problem:
    digits = data.load("digits", classes=(3, 5), samples=12, pool=2)
    return mf.Problem(
        mf.Architecture(digits.input_shape, layers), digits.inputs, digits.targets("squared"), penalty=penalty
    )


def one_layer(seed: int) -> dict[str, Any]:
    solution = mf.solve(one_layer_problem(), (PARTICLES,), seed=seed)
    return {
        "seed": seed,
        "value": solution.value,
        "excess": solution.value - EXACT_ONE_LAYER,
        "seconds": solution.seconds,
    }


def two_layers(seed: int, rounds: int) -> dict[str, Any]:
    problem = two_layer_problem()
    # a tolerance that is never met: every round is run
    solution = mf.solve(problem, WIDTHS, seed=seed, rounds=rounds, tolerance=1e-12, program_tolerance=1e-5)
    final = mf.ConvexProgram.freeze(problem, measures.drop_massless(solution.network))
    reference = mf.solvers.reference.solve(final)
    values = [row[key] for row in solution.history for key in ("flow_value", "value")]
    return {
        "seed": seed,
        "value": solution.value,
        "gap": solution.gap,
        "flow_gaps": [row["flow_gap"] for row in solution.history],
        "never_rises": all(after <= before * (1 + 1e-12) for before, after in pairwise(values)),
        "reference_value": reference.value,
        "reference_gap": reference.gap,
        "seconds": solution.seconds,
    }


def run(options: Options, report: Callable[[str], None]) -> dict[str, Any]:
    """Every figure of the benchmark, ready for JSON."""
    one, two = [], []
    for seed in range(options.seeds_one):
        one.append(one_layer(seed))
        report(f"one layer, seed {seed}: {one[-1]['seconds']:.1f} s")
    for seed in range(options.seeds_two):
        two.append(two_layers(seed, options.rounds))
        report(f"two layers, seed {seed}: {two[-1]['seconds']:.1f} s")
    return {"exact_one_layer": EXACT_ONE_LAYER, "particles": PARTICLES, "one_layer": one, "two_layers": two}
