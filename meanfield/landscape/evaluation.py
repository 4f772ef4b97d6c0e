"""What a network does at points of a plane, exactly: loss, accuracy, and of a ParticleNetwork J and its terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from meanfield.landscape.directions import Plane
from meanfield.landscape.objective import Objective


class Evaluation:
    """Figures at points of a plane.

    objectives: name of a data set -> network, images and loss.
    figures: names of the columns, "train loss", "train accuracy", "held out loss", ...
    evaluations: points that were computed so far.
    """

    def __init__(self, plane: Plane, objectives: Mapping[str, Objective]) -> None:
        self.plane, self.objectives = plane, dict(objectives)
        self.figures: Sequence[str] = [f"{name} {figure}" for name in objectives for figure in ("loss", "accuracy")]
        self.evaluations = 0

    def __call__(self, points: Tensor) -> Tensor:
        """Figures (P, len(figures)), float64 on the CPU, at points (P, 2)."""
        self.evaluations += len(points)
        return torch.tensor([self._at(a, b) for a, b in points.tolist()], dtype=torch.float64)

    def _at(self, a: float, b: float) -> list[float]:
        parameters = self.plane.at(a, b)
        return [figure for each in self.objectives.values() for figure in each.score(parameters)]
