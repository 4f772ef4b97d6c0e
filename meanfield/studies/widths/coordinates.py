"""The coordinate check: is the change of features and outputs early in training independent of the width?

Yang & Hu 2021 ask it of every parameterisation: coordinates that grow with the width blow up in the limit, coordinates
whose change vanishes are not learned.  The table has a line per scaling, optimiser, width, layer and step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meanfield import finite
from meanfield.bench.sweep import Cell, Row
from meanfield.bench.task import Task
from meanfield.finite.scaling import SCALINGS, Scaling
from meanfield.problem import Problem


def check(cell: Cell) -> list[Row]:
    """A network of `width` from start `seed` trained for `steps` steps in `scaling` by `optimiser`, at its default
    rate: the rows of `along`.
    """
    task = Task.from_dict(cell)
    named = {name: cell[name] for name in ("scaling", "optimiser", "width", "seed")}
    rows = along(
        task.problem(), SCALINGS[cell["scaling"]], cell["width"], cell["seed"], cell["optimiser"], cell["steps"]
    )
    return [{**named, **row} for row in rows]


def along(
    problem: Problem,
    scaling: Scaling,
    width: int,
    seed: int,
    optimiser: str,
    steps: int,
    learning_rate: float | None = None,
) -> list[Row]:
    """A row per step and layer of a run on all images at a constant rate, default that of the scaling.

    size: mean |x| over images, positions and channels; change: that of x - x at the start.  layer 1..L are the
    pre-activations, "output" is F.
    """
    rate = scaling.rates[optimiser] if learning_rate is None else learning_rate
    ended = finite.train(
        problem,
        (width,) * problem.architecture.depth,
        seed,
        scaling=scaling,
        optimiser=optimiser,
        learning_rate=rate,
        schedule="constant",
        steps=steps,
        checkpoints=[rate * step for step in range(steps + 1)],
        record_every=steps,
    )
    start = _coordinates(ended.checkpoints[0][1], problem.inputs)
    rows = []
    for step, (_, network) in enumerate(ended.checkpoints):
        for layer, now in _coordinates(network, problem.inputs).items():
            rows.append({"step": step, "layer": layer, "size": _mean(now), "change": _mean(now - start[layer])})
    return rows


@torch.no_grad()
def _coordinates(network: finite.FiniteCNN, inputs: Tensor) -> dict[str, Tensor]:
    responses = network.particles().responses(inputs)
    return {**{str(layer + 1): maps for layer, maps in enumerate(responses.preactivations)}, "output": responses.output}


def _mean(x: Tensor) -> float:
    return float(x.abs().mean())
