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
from meanfield.finite.scaling import SCALINGS


def check(cell: Cell) -> list[Row]:
    """A network of `width` from start `seed` trained for `steps` steps in `scaling` by `optimiser`, at its default
    rate.

    size: mean |x| over images, positions and channels; change: that of x - x at the start.  layer 1..L are the
    pre-activations, "output" is F.
    """
    task = Task.from_dict(cell)
    problem = task.problem()
    rate = SCALINGS[cell["scaling"]].rates[cell["optimiser"]]
    ended = finite.train(
        problem,
        (cell["width"],) * task.depth,
        cell["seed"],
        scaling=cell["scaling"],
        optimiser=cell["optimiser"],
        schedule="constant",
        steps=cell["steps"],
        checkpoints=[rate * step for step in range(cell["steps"] + 1)],
        record_every=cell["steps"],
    )
    named = {name: cell[name] for name in ("scaling", "optimiser", "width", "seed")}
    start = _coordinates(ended.checkpoints[0][1], problem.inputs)
    rows = []
    for step, (_, network) in enumerate(ended.checkpoints):
        for layer, now in _coordinates(network, problem.inputs).items():
            rows.append(
                {**named, "step": step, "layer": layer, "size": _mean(now), "change": _mean(now - start[layer])}
            )
    return rows


@torch.no_grad()
def _coordinates(network: finite.FiniteCNN, inputs: Tensor) -> dict[str, Tensor]:
    responses = network.particles().responses(inputs)
    return {**{str(layer + 1): maps for layer, maps in enumerate(responses.preactivations)}, "output": responses.output}


def _mean(x: Tensor) -> float:
    return float(x.abs().mean())
