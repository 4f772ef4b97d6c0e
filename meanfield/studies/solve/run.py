"""The subject of a report: a solved problem with what it came from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from meanfield.data import Dataset
from meanfield.network import ParticleNetwork
from meanfield.problem import Problem
from meanfield.solvers.solution import Solution

REFERENCE_LIMIT = 66 * 34 * 400  # entries of the constraints, or of what the readout multiplies, that cvxpy is given


@dataclass(frozen=True, eq=False)
class Run:
    """A solved problem with what it came from.

    training, held_out: the images (held_out None where all were trained on).  start: the network before the first
    round.  made: what made it, as JSON (`bench.provenance.Provenance`).  warnings: texts to repeat in the report.
    pair: positions of the two classes that the small program is about (None: the two that are confused most).
    """

    problem: Problem
    training: Dataset
    held_out: Dataset | None
    start: ParticleNetwork
    solution: Solution
    made: dict[str, Any]
    seed: int
    warnings: list[str] = field(default_factory=list)
    pair: tuple[int, int] | None = None
    trained_steps: int = 1000
    segment_steps: int = 300
    budget: float = 40.0  # seconds for each measurement of the report that can be cut short

    @property
    def is_small(self) -> bool:
        """Whether the program of the answer is small enough for cvxpy, and its images for hundreds of networks."""
        return entries(self.problem, self.solution.network.widths) <= REFERENCE_LIMIT


def entries(problem: Problem, widths: tuple[int, ...]) -> int:
    """The largest matrix that a cone solver would see: M_{l-1} M_l (images x positions) of the constraints of a layer,
    or images x outputs x readout features.
    """
    architecture, count = problem.architecture, len(problem.inputs)
    layers = zip(widths, widths[1:], architecture.geometry[1:])
    constraints = [m * n * count * math.prod(size.output) for m, n, size in layers]
    return max(*constraints, 0, count * math.prod(architecture.readout_shape(widths[-1])))
