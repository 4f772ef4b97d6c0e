"""The outside scorer: every contender hands over points and multipliers, and is told its value, gap and violation.

All in float64 by `meanfield.certificates`, with the contender's own multipliers; the value's excess is taken over the
best dual bound that any contender proved for the same program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meanfield import certificates
from meanfield.certificates import Certificate, Multipliers
from meanfield.convex.program import ConvexProgram
from meanfield.convex.repopulation import ProgramPoint
from meanfield.problem import FEASIBLE

LARGEST_VIOLATION = FEASIBLE[torch.float64]  # of a point whose value counts


class Answer(NamedTuple):
    """Points that the contender offers (the best feasible one counts) and its multipliers (the best bound counts)."""

    points: list[ProgramPoint]
    multipliers: list[Multipliers]

    def save(self, path: str | Path) -> None:
        points = [
            {"masses": list(p.masses), "kernels": list(p.kernels), "readout": p.readout, "biases": list(p.biases)}
            for p in self.points
        ]
        duals = [{"output": m.output, "realisation": list(m.realisation)} for m in self.multipliers]
        torch.save({"points": points, "multipliers": duals}, path)

    @classmethod
    def load(cls, path: str | Path) -> Answer:
        held: dict[str, list[dict[str, Any]]] = torch.load(path, weights_only=True, map_location="cpu")
        points = [
            ProgramPoint(tuple(p["masses"]), tuple(p["kernels"]), p["readout"], tuple(p["biases"]))
            for p in held["points"]
        ]
        return cls(points, [Multipliers(m["output"], tuple(m["realisation"])) for m in held["multipliers"]])


def judge(program: ConvexProgram, answer: Answer) -> Certificate:
    """The certificate of the lowest feasible point of an answer, of the least violating one where none is feasible."""
    duals = [multipliers.map(Tensor.double) for multipliers in answer.multipliers]
    judged = [certificates.certify(program, point, *duals) for point in answer.points]
    feasible = [each for each in judged if each.violation <= LARGEST_VIOLATION and math.isfinite(each.value)]
    return min(feasible, key=lambda each: each.value) if feasible else min(judged, key=lambda each: each.violation)


def figures(certificate: Certificate) -> dict[str, Any]:
    """What is stored of a certificate; numbers that are not finite become None."""
    found = {
        "value": certificate.value,
        "dual_value": certificate.dual_value,
        "relative_gap": certificate.relative_gap,
        "violation": certificate.violation,
    }
    finite = {name: number if math.isfinite(number) else None for name, number in found.items()}
    return {**finite, "feasible": certificate.violation <= LARGEST_VIOLATION and finite["value"] is not None}


def best_bound(runs: Sequence[dict[str, Any]]) -> float | None:
    """The highest dual value that any run proved."""
    return max((run["dual_value"] for run in runs if run.get("dual_value") is not None), default=None)


def write_excess(runs: Sequence[dict[str, Any]], best: float | None) -> None:
    """Write every run's `excess`, (value - best) / |value|; None where there is nothing to compare."""
    for run in runs:
        value = run.get("value")
        run["excess"] = None if best is None or value is None else (value - best) / max(abs(value), 1e-300)


def meets(run: dict[str, Any], gap: float) -> bool:
    """Whether a run's feasible point is proven to be within a relative gap."""
    return bool(run.get("feasible")) and run["relative_gap"] is not None and run["relative_gap"] <= gap
