"""The contenders for one convex program, each run once from problem and network to answer in a process of its own.

Timed in CPU seconds of the process, on one thread.  The splitting's time holds everything it does: freezing with the
row space of the constraints, iterations, restoration, certificates.  For cvxpy, freezing, building and compiling the
model (up to the matrices that the solver is given) is stated apart from the solver's run; restoring its point to the
constraints is free of charge.  Memory is
the growth of peak resident memory from problem and network to the answer, compilation included.  A tiny program is
solved first, so that no one pays for imports.
"""

from __future__ import annotations

import importlib
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import isolated, judge, problems
from benchmarks.judge import Answer
from benchmarks.machine import fresh_peak, peak_bytes
from benchmarks.problems import Case
from meanfield.convex.program import ConvexProgram
from meanfield.network import ParticleNetwork
from meanfield.problem import Problem
from meanfield.solvers import splitting

WARM_UP = Case(images=4, side=2, widths=(3, 2))
WARM_UP_TOLERANCE = 1e-2
GRACE = 600.0  # wall seconds beside the time limit: a factorisation cannot be interrupted
CVXPY_OPTIONS: dict[str, Callable[[float, float], dict[str, Any]]] = {
    "CLARABEL": lambda tolerance, seconds: {
        "tol_gap_abs": tolerance,
        "tol_gap_rel": tolerance,
        "tol_feas": tolerance,
        "time_limit": seconds,
        "max_threads": 1,
    },
    "SCS": lambda tolerance, seconds: {
        "eps_abs": tolerance,
        "eps_rel": tolerance,
        "max_iters": 1_000_000,
        "time_limit_secs": seconds,
    },
}
Setting = tuple[Problem, ParticleNetwork]
CONTENDERS = ("splitting", *CVXPY_OPTIONS)


@dataclass
class Outcome:
    """An answer and what it took; history only where the contender keeps one."""

    status: str
    cpu_seconds: float
    answer: Answer | None
    wall_seconds: float = 0.0
    compile_cpu_seconds: float = 0.0
    iterations: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


def one_run(name: str, case: Case, tolerance: float, max_seconds: float, fresh: bool, **more: Any) -> dict[str, Any]:
    """One contender at one tolerance, judged; a process without an answer is a run with its reason as the status.

    max_seconds: of the wall clock.  fresh: in a process of its own.  more: further entries of the order of `run`.
    """
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory, "answer.pt")
        order = {
            "contender": name,
            "case": case.to_dict(),
            "tolerance": tolerance,
            "max_seconds": max_seconds,
            "answer": str(answer),
            **more,
        }
        try:
            found = isolated.call("benchmarks.contenders:run", order, timeout=max_seconds + GRACE, fresh=fresh)
        except isolated.Failure as failure:
            return {
                "contender": name,
                "tolerance": tolerance,
                "status": f"failed: {failure}",
                "answered": False,
                "feasible": False,
            }
        if not found["answered"]:
            return {**found, "feasible": False}
        return {**found, **judge.figures(judge.judge(problems.program(case), Answer.load(answer)))}


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Run order["contender"] on order["case"]; the answer goes to the file order["answer"], its cost is returned."""
    name, device, dtype = order["contender"], order.get("device", "cpu"), getattr(torch, order.get("dtype", "float64"))

    def prepare(case: Case) -> Setting:
        problem, network = problems.setting(case)
        return problem.to(dtype=dtype, device=device), network.to(dtype=dtype, device=device)

    solve(name, prepare(WARM_UP), WARM_UP_TOLERANCE, 60.0)
    setting = prepare(Case.from_dict(order["case"]))
    before = fresh_peak()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    outcome = solve(name, setting, order["tolerance"], order["max_seconds"], order.get("check_every"))
    grown = peak_bytes() - before if device == "cpu" else torch.cuda.max_memory_allocated()
    if outcome.answer is not None:
        outcome.answer.save(order["answer"])
    return {
        "contender": name,
        "tolerance": order["tolerance"],
        "status": outcome.status,
        "cpu_seconds": outcome.cpu_seconds,
        "wall_seconds": outcome.wall_seconds,
        "compile_cpu_seconds": outcome.compile_cpu_seconds,
        "iterations": outcome.iterations,
        "peak_bytes": grown,
        "answered": outcome.answer is not None,
        "history": outcome.history,
    }


def solve(name: str, setting: Setting, tolerance: float, max_seconds: float, check_every: int | None = None) -> Outcome:
    """One contender on the program of one problem and network.

    check_every is the splitting's, for a history with more rows than its own choice.
    """
    if name == "splitting":
        return _splitting(setting, tolerance, max_seconds, check_every)
    return _cvxpy(name, setting, tolerance, max_seconds)


def _splitting(setting: Setting, tolerance: float, max_seconds: float, check_every: int | None) -> Outcome:
    began, wall = time.process_time(), time.perf_counter()
    program = ConvexProgram.freeze(*setting)
    solution = splitting.solve(
        program, tolerance, max_iterations=1_000_000, max_seconds=max_seconds, check_every=check_every
    )
    took, wall = time.process_time() - began, time.perf_counter() - wall
    points = [solution.point]
    if solution.point.readout.dtype == torch.float32:  # restored for the judge, who works in float64
        exact = program.to(dtype=torch.float64, device="cpu")
        points.append(exact.restore(solution.point.map(lambda tensor: tensor.double().cpu())))
    answer = Answer(points, [] if solution.multipliers is None else [solution.multipliers])
    iterations = int(solution.history[-1]["iteration"]) if solution.history else 0
    return Outcome(solution.status, took, answer, wall_seconds=wall, iterations=iterations, history=solution.history)


def _cvxpy(solver: str, setting: Setting, tolerance: float, max_seconds: float) -> Outcome:
    reference = importlib.import_module("meanfield.solvers.reference")
    options = CVXPY_OPTIONS[solver](tolerance, max_seconds)
    began = time.process_time()
    program = ConvexProgram.freeze(*setting)
    model = reference._Model(program, reference._Units.of(program, reference.UNITS[0]))
    data, chain, inverse = model.problem.get_problem_data(solver, solver_opts=options)
    compiled, wall = time.process_time(), time.perf_counter()
    raw = chain.solve_via_data(model.problem, data, False, False, options)
    took, wall = time.process_time() - compiled, time.perf_counter() - wall
    found = _unpack(model, raw, chain, inverse)
    answer = None
    if model.masses[0].value is not None:
        points = [model.point(), *reference._cleaned(program, model.point())]
        answer = Answer(points, [model.multipliers(sign) for sign in (1.0, -1.0)])
    return Outcome(found[0], took, answer, wall_seconds=wall, compile_cpu_seconds=compiled - began, iterations=found[1])


def _unpack(model: Any, raw: Any, chain: Any, inverse: Any) -> tuple[str, int | None]:
    """Status and iterations of a cvxpy run; the point is then in the model's variables."""
    cp = importlib.import_module("cvxpy")
    try:
        with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():  # judged outside
            warnings.simplefilter("ignore")
            model.problem.unpack_results(raw, chain, inverse)
    except cp.SolverError as error:
        return f"failed: {error}", None
    stats = model.problem.solver_stats
    return str(model.problem.status), None if stats is None else stats.num_iters
