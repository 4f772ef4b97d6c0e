"""Every number of a report, measured from one solved problem: plain lists and floats, ready for JSON."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meanfield import finite, limits, measures, solvers, starts
from meanfield.convex.program import ConvexProgram
from meanfield.data import Dataset
from meanfield.network import ParticleNetwork
from meanfield.problem import Problem
from meanfield.solvers.solution import Solution
from meanfield.studies.solve import sibling
from meanfield.studies.solve.run import Run

SAMPLED_WIDTHS, DRAWS = (8, 16, 32, 64, 128, 256), 20
TRAINED_WIDTHS, TRAINED_SEEDS, TRAINED_RATE = (4, 8, 16, 32), 2, 0.2
POINTS = 11
PEER_STEPS, PEER_BATCH, PEER_RATE, PEER_RECORDS = 1500, 100, 0.15, 10
JUDGED_MOST = 10_000  # images
KERNELS_SHOWN, IMAGES_SHOWN, MISTAKES_SHOWN = 12, 12, 8
NO_TIME = "no time was left"


def gather(run: Run, announce: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """All numbers, in the order of the report; `announce` hears what is being measured.

    What only a small program allows is measured of `run` where it is one, and of a small sibling otherwise, whose
    results then stand under "small".
    """
    with limits.grace(math.inf):  # what is not cut short: a few passes over the images
        results = {**heading(run), "images": len(run.training)} | _measured(run, ANSWER, announce)
    announce("a finite network, trained by Adam")
    results["peer"] = _peer(run)
    if run.is_small:
        return results | _measured(run, CLOSE, announce)
    announce("a small program of the same images")
    return results | {"small": _small(run, results["predictions"], lambda text: announce(f"small program, {text}"))}


def _measured(run: Run, sections: Sections, announce: Callable[[str], None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, text, measure in sections:
        announce(text)
        with _quiet():
            found[name] = measure(run)
    return found


def _small(run: Run, predictions: dict[str, Any], announce: Callable[[str], None]) -> dict[str, Any]:
    if limits.passed():
        return {"skipped": NO_TIME}
    judged = (predictions[name] for name in ("training", "held_out") if predictions[name] is not None)
    present = run.training.indices.unique().tolist()
    pair = run.pair or sibling.most_confused(np.sum([each["confusion"] for each in judged], axis=0), present)
    small = sibling.solved(run, pair)
    if small.solution.status == "interrupted":
        raise KeyboardInterrupt
    images = {"images": len(small.training), "shape": list(small.training.input_shape)}
    found = {"classes": list(small.training.class_names), "chosen": run.pair is not None, **images}
    return found | _measured(small, (*ANSWER[:-1], *CLOSE), announce)


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
    return {
        "value": solution.value,
        "gap": solution.gap,
        "relative_gap": solution.relative_gap,
        "dual_value": solution.value - solution.gap,
        "lower_bound": solution.lower_bound,
        "proven": solution.proven and solution.proven.figures(),
        "violation": certificate.violation if certificate else None,
        "status": solution.status,
        "message": solution.message,
        "seconds": solution.seconds,
        "rounds": len(solution.history),
        "widths": list(solution.network.widths),
        "terms": problem.terms(solution.network).figures(),
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


def _constraints(program: ConvexProgram) -> int:
    layers = zip(program.problem.architecture.geometry[1:], program.widths[1:])
    return len(program.problem.inputs) * sum(math.prod(size.output) * width for size, width in layers)


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


def predictions(run: Run) -> dict[str, Any]:
    """What the answer makes of the images; `images` of the results are the mistakes first, then the narrowest."""
    judged = _of_each(run, lambda data: _judged(run, run.solution.network, data))
    shown, name = (run.training, "training") if run.held_out is None else (run.held_out, "held_out")
    about = {"classes": list(run.training.class_names), "outputs": run.problem.architecture.outputs}
    return {**about, **judged, "images": {"of": name, **_shown(shown, judged[name])}}


def _of_each(run: Run, judge: Callable[[Dataset], Any]) -> dict[str, Any]:
    return {"training": judge(run.training), "held_out": None if run.held_out is None else judge(run.held_out)}


def _judged(run: Run, network: ParticleNetwork, data: Dataset) -> dict[str, Any]:
    """Of the first JUDGED_MOST images; confusion[i][j]: how many of class i are read as class j."""
    indices = data.indices[:JUDGED_MOST]
    output = network(data.inputs[:JUDGED_MOST].to(run.problem.inputs)).double().cpu()
    predicted, count = run.problem.loss.predict(output), len(data.classes)
    return {
        "count": len(indices),
        "accuracy": float((predicted == indices).double().mean()),
        "confusion": (indices * count + predicted).bincount(minlength=count**2).reshape(count, count).tolist(),
        "class_index": indices.tolist(),
        "predicted": predicted.tolist(),
        "shown": _margin(output, indices).tolist(),
    }


def _score(judged: dict[str, Any]) -> dict[str, Any]:
    return {name: judged[name] for name in ("count", "accuracy")}


def _shown(data: Dataset, judged: dict[str, Any]) -> dict[str, Any]:
    """Some images with their judgements: mistakes first, then those that were read rightly with the least margin."""
    margins = torch.tensor(judged["shown"]).abs()
    wrong = torch.tensor(judged["class_index"]) != torch.tensor(judged["predicted"])
    mistakes = (wrong * margins).argsort(descending=True)[: min(MISTAKES_SHOWN, int(wrong.sum()))]
    others = margins.masked_fill(wrong, math.inf).argsort()[: min(IMAGES_SHOWN - len(mistakes), int((~wrong).sum()))]
    rows = torch.cat([mistakes, others]).tolist()
    picked = {name: [judged[name][row] for row in rows] for name in ("class_index", "predicted", "shown")}
    return {**picked, "pixels": data.inputs[rows].mean(1).tolist(), "mistakes": int(wrong.sum())}


def _margin(output: Tensor, indices: Tensor) -> Tensor:
    """The output itself for one output; else that of the true class minus the largest other one."""
    if output.shape[1] == 1:
        return output[:, 0]
    own = torch.nn.functional.one_hot(indices, output.shape[1]).bool()
    return output[own] - output.masked_fill(own, -torch.inf).amax(1)


def _peer(run: Run) -> dict[str, Any]:
    """A finite network trained by Adam from the same start on the same J, with equal masses, in float32 as such
    networks are; it has as much time as the solve had.
    """
    if limits.passed():
        return {"skipped": NO_TIME}
    batch = min(PEER_BATCH, len(run.problem.inputs))
    with limits.within(max(run.budget, run.solution.seconds)):
        training = finite.train(
            run.problem.to(dtype=torch.float32),
            run.start.widths,
            run.seed,
            start=run.start.map(Tensor.float),
            steps=PEER_STEPS,
            batch_size=batch,
            learning_rate=PEER_RATE,
            record_every=max(1, PEER_STEPS // PEER_RECORDS),
        )
    if training.status == "interrupted":
        raise KeyboardInterrupt
    network = training.network.particles().map(lambda tensor: tensor.to(run.problem.inputs))
    with limits.grace(math.inf):
        terms = run.problem.terms(network)
        judged = _of_each(run, lambda data: _score(_judged(run, network, data)))
    return {
        "value": float(terms.total()),
        "loss": float(terms.loss),
        **judged,
        "widths": list(run.start.widths),
        "batch": batch,
        "steps": training.steps,
        "status": training.status,
        "message": training.message,
        "seconds": training.seconds,
    }


@torch.no_grad()
def _sampled(run: Run) -> dict[int, list[float]]:
    """J of DRAWS networks at every width, of fewer where the time is up."""
    network, depth = run.solution.network, run.problem.architecture.depth
    found: dict[int, list[float]] = {}
    with suppress(limits.TimeUp):
        for m, i in product(SAMPLED_WIDTHS, range(DRAWS)):
            limits.look()
            draw = finite.sample(network, [m] * depth, torch.Generator().manual_seed(run.seed + 1000 * m + i))
            value = float(run.problem.terms(draw.particles()).total())
            found.setdefault(m, []).append(value)
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


Sections = Sequence[tuple[str, str, Callable[[Run], Any]]]  # name in the results, what is said of it, measurement
ANSWER: Sections = (
    ("solution", "the answer", _solution),
    ("rounds", "rounds", lambda run: run.solution.history),
    ("populations", "populations", _populations),
    ("kernels", "kernels", _kernels),
    ("predictions", "predictions", predictions),
)
CLOSE: Sections = (  # what only a small program allows
    ("reference", "the same program in cvxpy", _reference),
    ("finite", "finite networks", _finite),
    ("segment", "the line between two solutions", _segment),
)
