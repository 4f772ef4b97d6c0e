"""One ReLU layer: the library's main job against pyscnn (Mishkin, Sahiner & Pilanci 2022) on the same objective.

pyscnn trains  h(x) = sum_i (x . w_i)_+ v_i  by  1/(2N) |h(X) - y|^2 + c sum_i |w_i| |v_i|  through sampled activation
patterns.  A kernel as large as the image makes a convolution such a network, with one position and one channel, and
minimising over masses and scales turns  lambda_1 sum p |z|^2 + lambda_u sum p u^2  into
2 sqrt(lambda_1 lambda_u) sum_i |w_i| |v_i|: the objectives agree for c = 2 sqrt(lambda_1 lambda_u).  Its neurons become
particles of mass |w_i| |v_i| / T, T their sum, with p |z|^2 and p u^2 balanced, so that J of that network is its
objective.  All answers are networks; J is taken in float64 outside.  With at most three kernel entries the exact
optimum over all measures bounds every answer from below; beyond that the excess is over the best value found, and says
so.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import meanfield as mf
from benchmarks import isolated, judge
from benchmarks.machine import fresh_peak, peak_bytes
from meanfield import data
from meanfield.bench.options import Settings
from meanfield.solvers import arrangements

STRENGTH = 5e-4  # lambda_1 = lambda_u
MAX_EXACT_ENTRIES = 3
PYSCNN_MODULES = ("models", "optimize", "solvers", "regularizers", "metrics", "activations")


@dataclass(frozen=True)
class Case(Settings):
    """Digits 0 against 1, drawn by the seed and averaged to `size`; `peers` sweeps pyscnn's tolerance, over `gates`
    patterns.
    """

    name: str
    images: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    particles: int = 64
    gates: int = 500
    peers: tuple[float, ...] = (1e-4, 1e-6, 1e-8)
    rounds: int = 8
    flow_steps: int = 2000
    seed: int = 0

    @property
    def entries(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def positions(self) -> int:
        return (self.size[0] - self.kernel[0] + 1) * (self.size[1] - self.kernel[1] + 1)


CASES = (
    Case("strip of 3 columns, kernel 1x3", 40, (1, 3), (1, 3)),
    Case("4x4 image, kernel 4x4", 100, (4, 4), (4, 4)),
    Case("8x8 image, kernel 3x3", 100, (8, 8), (3, 3)),
)
TINY = Case(
    "strip of 3 columns, kernel 1x3", 8, (1, 3), (1, 3), particles=8, gates=20, peers=(1e-3,), rounds=1, flow_steps=50
)


def problem(case: Case) -> mf.Problem:
    """The training problem of a case, in float64."""
    digits = data.load("digits", classes=(0, 1))
    chosen = torch.as_tensor(np.random.default_rng(case.seed).permutation(len(digits))[: case.images])
    inputs = torch.nn.functional.adaptive_avg_pool2d(digits.inputs[chosen].double(), case.size)
    architecture = mf.Architecture((1, *case.size), (mf.Conv(case.kernel, activation="relu"),), readout="average")
    return mf.Problem(
        architecture, inputs, digits.targets("squared")[chosen], "squared", mf.Penalty(input=STRENGTH, readout=STRENGTH)
    )


def measure(case: Case, max_seconds: float, fresh: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """All contenders of one case; those that cannot take part are listed with the reason."""
    runs, skipped = [], []
    for contender, tolerance in _orders(case):
        reason = absence(contender, case)
        if reason is None:
            runs.append(one_run(contender, case, tolerance, max_seconds, fresh))
            report(f"one layer, {case.name}: {contender}: {runs[-1].get('value')} ({runs[-1]['status']})")
        elif all(entry["contender"] != contender for entry in skipped):
            skipped.append({"contender": contender, "reason": reason})
            report(f"one layer, {case.name}: {contender} skipped: {reason}")
    return {**case.to_dict(), "case": case.name, **_add_excess(runs), "runs": runs, "skipped": skipped}


def _orders(case: Case) -> list[tuple[str, float | None]]:
    return [("meanfield", None), ("exact optimum", None), *(("pyscnn", tolerance) for tolerance in case.peers)]


def absence(contender: str, case: Case) -> str | None:
    """Why a contender cannot do a case; None where it can."""
    if contender == "exact optimum" and case.entries > MAX_EXACT_ENTRIES:
        return f"a kernel of {case.entries} entries; activation patterns are listed for at most {MAX_EXACT_ENTRIES}"
    if contender != "pyscnn":
        return None
    if case.positions > 1:
        return f"it takes one vector per example and cannot express a convolution with {case.positions} positions"
    if importlib.util.find_spec("scnn") is None:
        return "pyscnn is not installed; pip install 'meanfield[peers]'"
    return None


def _add_excess(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Every run's excess over the exact bound, or over the best value where there is none."""
    bounds = [run["lower_bound"] for run in runs if run.get("lower_bound") is not None]
    values = [run["value"] for run in runs if run.get("value") is not None]
    best = max(bounds) if bounds else min(values, default=None)
    judge.write_excess(runs, best)
    return {
        "best": best,
        "excess_over": "the exact optimum's lower bound" if bounds else "the best value found, which is no bound",
    }


def one_run(contender: str, case: Case, tolerance: float | None, max_seconds: float, fresh: bool) -> dict[str, Any]:
    """One contender in a process of its own; its network is read back and valued here."""
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory, "network.pt")
        order = {
            "contender": contender,
            "case": case.to_dict(),
            "tolerance": tolerance,
            "max_seconds": max_seconds,
            "answer": str(answer),
        }
        try:
            found = isolated.call("benchmarks.solve.one_layer:run", order, timeout=max_seconds, fresh=fresh)
        except isolated.Failure as failure:
            return {"contender": contender, "tolerance": tolerance, "status": f"failed: {failure}"}
        held = torch.load(answer, weights_only=True)
    exact = problem(case)
    network = mf.ParticleNetwork(exact.architecture, [held["masses"]], [held["kernels"]], held["readout"])
    return {**found, "value": float(exact.value(network)), "particles": network.widths[0]}


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Time one contender, write its network to order["answer"], return what it took."""
    case = Case.from_dict(order["case"])
    name, exact = order["contender"], problem(case)
    if name == "pyscnn":
        _pyscnn_modules()  # no one pays for imports
    before, began = fresh_peak(), time.process_time()
    network, status, bound = CONTENDERS[name](exact, case, order)
    took = time.process_time() - began
    torch.save(
        {"masses": network.masses[0], "kernels": network.kernels[0], "readout": network.readout}, order["answer"]
    )
    return {
        "contender": name,
        "tolerance": order["tolerance"],
        "status": status,
        "cpu_seconds": took,
        "peak_bytes": peak_bytes() - before,
        "lower_bound": bound,
    }


def _meanfield(exact: mf.Problem, case: Case, order: dict[str, Any]) -> tuple[mf.ParticleNetwork, str, float | None]:
    lengths = {"rounds": case.rounds, "flow_steps": case.flow_steps, "max_seconds": order["max_seconds"]}
    solution = mf.solve(exact, (case.particles,), seed=case.seed, **lengths)
    return solution.network, solution.status, None


def _exact_optimum(
    exact: mf.Problem, case: Case, order: dict[str, Any]
) -> tuple[mf.ParticleNetwork, str, float | None]:
    solution = arrangements.solve(exact)
    return solution.network, solution.status, solution.lower_bound


def _pyscnn(exact: mf.Problem, case: Case, order: dict[str, Any]) -> tuple[mf.ParticleNetwork, str, float | None]:
    """pyscnn's augmented Lagrangian method over sampled activation patterns, the way its documentation trains."""
    models, optimize, solvers, regularizers, metrics, activations = _pyscnn_modules()
    logging.getLogger("scnn").setLevel(logging.ERROR)
    patches = exact.inputs.flatten(1).numpy()
    model = models.ConvexReLU(activations.sample_gate_vectors(case.seed + 1, case.entries, case.gates), c=1)
    solver = solvers.AL(model, tol=order["tolerance"], constraint_tol=order["tolerance"])
    penalty = regularizers.NeuronGL1(2 * math.sqrt(exact.penalty.input * exact.penalty.readout))
    trained, _ = optimize.optimize_model(
        model,
        solver,
        metrics.Metrics(),
        patches,
        exact.targets.flatten().numpy(),
        regularizer=penalty,
        unitize_data=False,
        dtype="float64",
    )
    first, second = (torch.as_tensor(array, dtype=torch.float64) for array in trained.parameters[:2])
    return balanced_network(exact, first, second.flatten()), "stopped", None


def _pyscnn_modules() -> list[Any]:
    return [importlib.import_module(f"scnn.{name}") for name in PYSCNN_MODULES]


def balanced_network(exact: mf.Problem, first: Tensor, second: Tensor) -> mf.ParticleNetwork:
    """The particles of neurons (x . w_i)_+ v_i, w (m, d), v (m,), with the least penalty for their output."""
    alive = (first.norm(dim=1) * second.abs()) > 0
    if not bool(alive.any()):
        kernels, masses, readout = torch.zeros_like(first[:1]), first.new_ones(1), first.new_zeros(1, 1)
    else:
        first, second = first[alive], second[alive]
        lengths = first.norm(dim=1)
        share = lengths * second.abs()
        total = float(share.sum())
        scale = (exact.penalty.readout / exact.penalty.input) ** 0.25 * math.sqrt(total)  # |z|; |u| = total / |z|
        kernels, masses = first / lengths[:, None] * scale, share / total
        readout = (second.sign() * total / scale)[None]
    shape = exact.architecture.kernel_shapes((len(masses),))[0]
    return mf.ParticleNetwork(exact.architecture, [masses], [kernels.reshape(shape)], readout)


CONTENDERS: dict[str, Callable[[mf.Problem, Case, dict[str, Any]], tuple[mf.ParticleNetwork, str, float | None]]] = {
    "meanfield": _meanfield,
    "exact optimum": _exact_optimum,
    "pyscnn": _pyscnn,
}
