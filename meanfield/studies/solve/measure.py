"""Every number of a report, measured from one solved problem: plain lists and floats, ready for JSON."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from meanfield import finite, limits, measures, solvers, starts
from meanfield.convex.program import ConvexProgram
from meanfield.data import Dataset
from meanfield.network import ParticleNetwork
from meanfield.problem import Problem
from meanfield.solvers.solution import Solution

REFERENCE_LIMIT = 66 * 34 * 400  # M_{l-1} M_l (images x positions), the largest product that cvxpy is given
SAMPLED_WIDTHS, DRAWS = (8, 16, 32, 64, 128, 256), 20
TRAINED_WIDTHS, TRAINED_SEEDS, TRAINED_RATE = (4, 8, 16, 32), 2, 0.2
POINTS = 11
HELD_OUT_MOST = 1000
KERNELS_SHOWN, IMAGES_SHOWN = 12, 12
NO_TIME = "no time was left"


@dataclass(frozen=True, eq=False)
class Run:
    """A solved problem with what it came from; the subject of a report.

    training, held_out: the images (held_out None where all were trained on).  start: the network before the first
    round.  made: what made it, as JSON (`bench.provenance.Provenance`).  warnings: texts to repeat in the report.
    """

    problem: Problem
    training: Dataset
    held_out: Dataset | None
    start: ParticleNetwork
    solution: Solution
    made: dict[str, Any]
    seed: int
    warnings: list[str] = field(default_factory=list)
    trained_steps: int = 1500
    segment_steps: int = 300
    budget: float = 40.0  # seconds for each measurement of the report that can be cut short


def gather(run: Run, announce: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """All numbers, in the order of the report; `announce` hears what is being measured."""
    sections: list[tuple[str, str, Callable[[Run], Any]]] = [
        ("solution", "the answer", _solution),
        ("rounds", "rounds", lambda run: run.solution.history),
        ("reference", "the same program in cvxpy", _reference),
        ("populations", "populations", _populations),
        ("kernels", "kernels", _kernels),
        ("predictions", "predictions", _predictions),
        ("finite", "finite networks", _finite),
        ("segment", "the line between two solutions", _segment),
    ]
    results = heading(run)
    for name, text, measure in sections:
        announce(text)
        with _quiet():
            results[name] = measure(run)
    return results


def heading(run: Run) -> dict[str, Any]:
    """What every JSON file of a solve begins with."""
    return {"made": run.made, "warnings": run.warnings}


@contextmanager
def _quiet() -> Iterator[None]:
    """The solve has warned of an unattained infimum once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the infimum over all measures")
        yield


def solution_figures(problem: Problem, solution: Solution) -> dict[str, Any]:
    """The figures of a Solution and the terms of J at its network."""
    certificate = solution.certificate
    terms = problem.terms(solution.network)._asdict()
    return {
        "value": solution.value,
        "gap": solution.gap,
        "relative_gap": solution.relative_gap,
        "dual_value": solution.value - solution.gap,
        "lower_bound": solution.lower_bound,
        "violation": certificate.violation if certificate else None,
        "status": solution.status,
        "message": solution.message,
        "seconds": solution.seconds,
        "rounds": len(solution.history),
        "widths": list(solution.network.widths),
        "terms": {name: float(term) for name, term in terms.items()},
    }


def _solution(run: Run) -> dict[str, Any]:
    figures = solution_figures(run.problem, run.solution)
    rows = run.solution.history
    figures["start_value"] = float(run.problem.value(run.start))
    figures["last_flow_moved"] = len(rows) < 2 or rows[-1]["flow_value"] < rows[-2]["value"]
    return figures


def _reference(run: Run) -> dict[str, Any]:
    """cvxpy's optimum of the program frozen at the answer, without its massless particles."""
    network = measures.drop_massless(run.solution.network)
    program = ConvexProgram.freeze(run.problem, network).to(dtype=torch.float64, device="cpu")
    ours = float(program.problem.value(program.frozen))
    found: dict[str, Any] = {"widths": list(network.widths), "constraints": _constraints(program), "our_value": ours}
    size = max(
        (m * n * rows for m, n, rows in zip(network.widths, network.widths[1:], _rows(program))),
        default=network.widths[0],
    )
    if size > REFERENCE_LIMIT:
        return found | {
            "skipped": f"{size:,} entries (particles x particles x constraint rows); cvxpy is given at most "
            f"{REFERENCE_LIMIT:,}"
        }
    if limits.passed():
        return found | {"skipped": NO_TIME}
    began = time.perf_counter()
    try:
        solved = solvers.reference.solve(program)
    except Exception as error:  # a failure inside cvxpy must not cost the report
        return found | {"skipped": f"cvxpy failed: {type(error).__name__}: {error}"}
    if solved.status == "failed":
        return found | {"skipped": solved.message}
    violation = solved.certificate.violation if solved.certificate else math.nan
    return found | {
        "cvxpy_value": solved.value,
        "difference": found["our_value"] - solved.value,
        "cvxpy_gap": solved.gap,
        "cvxpy_violation": violation,
        "message": solved.message,
        "seconds": time.perf_counter() - began,
    }


def _rows(program: ConvexProgram) -> list[int]:
    """Images times positions of layers >= 2."""
    return [len(program.problem.inputs) * math.prod(size.output) for size in program.problem.architecture.geometry[1:]]


def _constraints(program: ConvexProgram) -> int:
    return sum(rows * width for rows, width in zip(_rows(program), program.widths[1:]))


def _populations(run: Run) -> dict[str, Any]:
    return {
        "before": [p.tolist() for p in run.start.masses],
        "after": [p.tolist() for p in run.solution.network.masses],
        "effective": [float(1 / p.square().sum()) for p in run.solution.network.masses],
    }


def _kernels(run: Run) -> dict[str, Any]:
    network = run.solution.network
    order = network.masses[0].argsort(descending=True)[:KERNELS_SHOWN]
    return {"masses": network.masses[0][order].tolist(), "entries": network.kernels[0][order].tolist()}


def _predictions(run: Run) -> dict[str, Any]:
    found = {"classes": list(run.training.class_names), "training": _judged(run, run.training, keep_images=True)}
    return found | {"held_out": _judged(run, run.held_out) if run.held_out is not None else None}


@torch.no_grad()
def _judged(run: Run, data: Dataset, keep_images: bool = False) -> dict[str, Any]:
    inputs = data.inputs[:HELD_OUT_MOST].to(run.problem.inputs)
    indices = data.indices[: len(inputs)]
    output = run.solution.network(inputs).double().cpu()
    predicted = run.problem.loss.predict(output)
    right = predicted == indices
    found = {
        "count": len(inputs),
        "accuracy": float(right.double().mean()),
        "class_index": indices.tolist(),
        "predicted": predicted.tolist(),
        "shown": _margin(output, indices).tolist(),
    }
    if keep_images:
        found["images"] = inputs[:IMAGES_SHOWN].mean(1).tolist()
    return found


def _margin(output: Tensor, indices: Tensor) -> Tensor:
    """The output itself for one output; else that of the true class minus the largest other one."""
    if output.shape[1] == 1:
        return output[:, 0]
    own = torch.nn.functional.one_hot(indices, output.shape[1]).bool()
    return output[own] - output.masked_fill(own, -torch.inf).amax(1)


@torch.no_grad()
def _sampled(run: Run) -> dict[int, list[float]]:
    """J of DRAWS networks at every width, of fewer where the time is up."""
    network, depth = run.solution.network, run.problem.architecture.depth
    found: dict[int, list[float]] = {}
    for m, i in product(SAMPLED_WIDTHS, range(DRAWS)):
        if limits.passed():
            break
        draw = finite.sample(network, [m] * depth, torch.Generator().manual_seed(run.seed + 1000 * m + i))
        found.setdefault(m, []).append(float(run.problem.terms(draw.particles()).total()))
    return found


def _finite(run: Run) -> dict[str, Any]:
    with limits.within(run.budget):
        sampled = _sampled(run)
    with limits.within(run.budget):
        trained = _trained(run)
    skipped = len(TRAINED_WIDTHS) * TRAINED_SEEDS - sum(map(len, trained.values()))
    return {
        "limit": run.solution.value,
        "draws": DRAWS,
        "sampled_widths": len(SAMPLED_WIDTHS),
        "trained_steps": run.trained_steps,
        "trained_skipped": skipped,
        "sampled": {str(m): found for m, found in sampled.items()},
        "trained": {str(m): found for m, found in trained.items()},
    }


def _trained(run: Run) -> dict[int, list[float]]:
    """J of networks trained in full; those that the time was too short for are left out."""
    found: dict[int, list[float]] = {}
    for m, seed in product(TRAINED_WIDTHS, range(TRAINED_SEEDS)):
        if limits.passed():
            break
        widths = [m] * run.problem.architecture.depth
        training = finite.train(
            run.problem, widths, run.seed + seed, steps=run.trained_steps, learning_rate=TRAINED_RATE
        )
        if training.status == "interrupted":  # the report is the user's to stop
            raise KeyboardInterrupt
        if training.status == "completed":
            found.setdefault(m, []).append(training.value)
    return found


@torch.no_grad()
def _segment(run: Run) -> dict[str, Any]:
    """J between two flows' answers from two seeds, all particles kept: mixture of measures, and averaged weights."""
    try:
        return _joined(run)
    except limits.TimeUp:
        return {"skipped": NO_TIME}


def _joined(run: Run) -> dict[str, Any]:
    limits.look()
    (first, steps), (second, _) = (_flowed(run, run.seed + offset) for offset in (1, 2))
    times = [i / (POINTS - 1) for i in range(POINTS)]
    ends = float(run.problem.terms(first).total()), float(run.problem.terms(second).total())
    inner = {"program": measures.mixture, "weights": measures.interpolate}
    found: dict[str, Any] = {
        "t": times,
        "seeds": [run.seed + 1, run.seed + 2],
        "widths": list(first.widths),
        "steps": steps,
    }
    for name, join in inner.items():
        values = []
        for t in times[1:-1]:
            limits.look()
            values.append(float(run.problem.terms(join(first, second, t)).total()))
        found[name] = [ends[0], *values, ends[1]]
    middle = POINTS // 2
    found["midpoint_violation"] = {name: max(0.0, found[name][middle] - sum(ends) / 2) for name in inner}
    return found


def _flowed(run: Run, seed: int) -> tuple[ParticleNetwork, int]:
    """The end of a flow from a seed, and how many steps there was time for."""
    generator = torch.Generator().manual_seed(seed)
    start = starts.draw(run.problem, run.start.widths, generator, "low_rank")
    solved = solvers.flow.solve(run.problem, start, steps=run.segment_steps, seed=seed, max_seconds=run.budget / 2)
    if solved.status == "interrupted":
        raise KeyboardInterrupt
    return solved.network, solved.history[-1]["step"]
