"""The estimate of what more starts would find, checked by twice the starts.

Digits 3 against 5 of 4x4 pixels, two tanh layers of 2x2 kernels: numbers of images, widths and penalties are drawn.
The multipliers are those of the program of a short flow.  A search with K starts a round says by how much as many again
lower its bound; a second one with other draws makes up the rest of 2K: `lowered` is how far the best bound on what both
found, at the multipliers of either, lies below the first; `lowered_there` the same at those of the first alone, where
the bound was chosen to be high.  All of it relative to the first bound; negative where twice the starts raise it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any

import torch
from torch import Tensor

import meanfield as mf
from benchmarks.options import BenchmarkOptions, Quick
from benchmarks.problems import digits
from meanfield import starts
from meanfield.bench.options import WORK, Seed, at_least, option
from meanfield.certificates import search, unseen
from meanfield.certificates.duality import feasible
from meanfield.convex.program import ConvexProgram
from meanfield.solvers import flow, splitting

IMAGES, WIDTHS = (8, 12, 16), ((4, 3), (8, 5), (16, 8))
SOURCE, READOUT = (1e-4, 3e-4, 1e-3), (1e-3, 3e-3)  # penalties; that of the input is the source's
FLOW_STEPS, STEPS, ROUNDS = 150, 300, 4
FEW = {"problems": 2, "starts": 12, "steps": 5}  # with --quick
RANKS = range(2, 9)  # of starts, the best first, at whose shortfall the estimate is checked


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    problems: Annotated[int, option("Problems that are drawn.", WORK), at_least(1)] = 50
    starts: Annotated[int, option("Starts of a round of a search, half of them drawn anew.", WORK), at_least(12)] = 32
    seed: Seed = 0
    quick: Quick = False


def drawn(seed: int) -> tuple[mf.Problem, mf.ParticleNetwork]:
    """A problem, and a random network for it."""
    generator = torch.Generator().manual_seed(seed)

    def one(choices: tuple[Any, ...]) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    inputs, targets = digits(one(IMAGES), 4)
    architecture = mf.Architecture((1, 4, 4), (mf.Conv(2, activation="tanh"),) * 2)
    source, widths = one(SOURCE), one(WIDTHS)
    penalty = mf.Penalty(source=source, readout=one(READOUT), input=source)
    network = starts.start(architecture, widths, inputs, generator)
    return mf.Problem(architecture, inputs, targets, penalty=penalty), network


def one_problem(seed: int, count: int, steps: int) -> dict[str, Any]:
    began = time.process_time()
    problem, network = drawn(seed)
    program = ConvexProgram.freeze(problem, flow.solve(problem, network, steps=FLOW_STEPS).network)
    solved = splitting.solve(program, 1e-3, max_iterations=1000)
    assert solved.multipliers is not None
    output = feasible(problem, solved.multipliers.output)
    first, second = (_searched(problem, output, solved.network, seed, each, count, steps) for each in (0, 1))
    (one, found), (other, again) = first, second
    size, at = abs(found.bound), (found.scale, list(found.mu))
    shortfalls = one._shortfalls(*at, found.bound).sort().values / size
    both = max(min(one._bound(*each), other._bound(*each)) for each in (*one.searched, *other.searched))
    return {
        "seed": seed,
        "images": len(problem.inputs),
        "value": solved.value,
        "bound": found.bound,
        "second_bound": again.bound,
        "fresh": found.fresh,
        "reached": found.reached,
        "chance": found.unseen_chance,
        "said": found.unseen_lowering / size,
        "shortfalls": shortfalls[: RANKS.stop - 1].tolist(),
        "lowered": (found.bound - both) / size,
        "lowered_there": (found.bound - min(found.bound, other._bound(*at))) / size,
        "seconds": time.process_time() - began,
    }


def _searched(
    problem: mf.Problem, output: Tensor, network: mf.ParticleNetwork, seed: int, which: int, count: int, steps: int
) -> tuple[search._Search, search.UnseenFeatures]:
    generator = torch.Generator().manual_seed(2 * seed + which)
    made = search._Search(problem, output, network, generator, count, steps)
    return made, made.run(ROUNDS, 1)


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often and how much, beside what was said; at_rank: by more than the start of that rank falls short."""
    return {
        "problems": len(rows),
        "more_than_said": sum(row["lowered"] > row["said"] for row in rows),
        "more_than_said_there": sum(row["lowered_there"] > row["said"] for row in rows),
        "lowered": sum(row["lowered"] > search.AGREEMENT for row in rows),
        "lowered_expected": sum(row["chance"] for row in rows),
        "reached_by_one_or_none": sum(row["reached"] < 2 for row in rows),
        "lowered_of_reached_by_more": sum(row["lowered"] > search.AGREEMENT for row in rows if row["reached"] > 1),
        "chance_of_reached_by_more": sum(row["chance"] for row in rows if row["reached"] > 1),
        "largest_lowering": max(row["lowered"] for row in rows),
        "mean_said": fmean(row["said"] for row in rows),
        "mean_lowered": fmean(max(row["lowered"], 0.0) for row in rows),
        "at_rank": {
            rank: {
                "said": unseen.chance(rank),
                "share": fmean(row["lowered"] > row["shortfalls"][rank - 1] for row in rows),
                "share_there": fmean(row["lowered_there"] > row["shortfalls"][rank - 1] for row in rows),
            }
            for rank in RANKS
        },
    }


def run(options: Options, report: Callable[[str], None]) -> dict[str, Any]:
    """Every figure of the benchmark, ready for JSON."""
    few = FEW if options.quick else {"problems": options.problems, "starts": options.starts, "steps": STEPS}
    rows = []
    for index in range(few["problems"]):
        rows.append(one_problem(options.seed + index, few["starts"], few["steps"]))
        report(f"problem {index + 1} of {few['problems']}: {rows[-1]['seconds']:.1f} CPU s")
    return {"level": unseen.LEVEL, "figures": figures(rows), "rows": rows}
