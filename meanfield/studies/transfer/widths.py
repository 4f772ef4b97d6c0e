"""Distances of transferred particle networks from the function predicted without a start, over the width."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import meanfield as mf
from meanfield import finite
from meanfield.bench.sweep import Cell, Row
from meanfield.transfer import Displacement, StartLaw, predict

# of SGD, at a width m: features move in the first scaling and hardly in the second, whose steps must shrink like 1/m
RATES: dict[str, Callable[[int], float]] = {"mean_field": lambda m: 2.0, "standard": lambda m: 1.6 / m}
STEPS = 60
DRAWS = {"fresh start": 16, "shuffled": 16, "layers shuffled apart": 4, "own start": 1}  # on every trained network

Arm = Callable[[Displacement, StartLaw, finite.FiniteCNN, torch.Generator], finite.FiniteCNN]
ARMS: dict[str, Arm] = {
    "fresh start": lambda moved, law, start, generator: moved.applied(law.draw(start, generator)),
    "shuffled": lambda moved, law, start, generator: moved.shuffled(generator).applied(start),
    "layers shuffled apart": lambda moved, law, start, generator: moved.shuffled(generator, False).applied(start),
    "own start": lambda moved, law, start, generator: moved.applied(start),
}


def widths(cell: Cell, store: str) -> list[Row]:
    """A row per arm: error, the mean squared distance of outputs from the prediction on the training images.

    cell: depth, width, scaling, seed, run.  square: the mean square of the prediction.
    """
    salt = 1_000_003 * (cell["seed"] + 1) + 1009 * cell["run"] + cell["width"] * 16 + cell["depth"]
    found = distances(problem(cell["depth"]), cell["scaling"], cell["width"], torch.Generator().manual_seed(salt))
    kept = {name: cell[name] for name in ("depth", "width", "scaling", "run")} | {"square": found.pop("predicted")}
    return [{**kept, "arm": arm, "error": error} for arm, error in found.items()]


def problem(depth: int) -> mf.Problem:
    """Two classes of the digits, tanh layers of one kind."""
    digits = mf.data.load("digits", classes=(3, 5), samples=8, pool=2)
    architecture = mf.Architecture(digits.input_shape, (mf.Conv(2, activation="tanh"),) * depth, "average", 1)
    penalty = mf.Penalty(source=1e-4, readout=1e-4, input=1e-4)
    return mf.Problem(architecture, digits.inputs, digits.targets("squared"), "squared", penalty)


def distances(
    problem: mf.Problem,
    scaling: str,
    width: int,
    generator: torch.Generator,
    draws: Mapping[str, int] = DRAWS,
) -> dict[str, float]:
    """Arm -> E|F_arm - F_predicted|^2 over images and draws of one training; predicted -> E F_predicted^2."""
    every = (width,) * problem.architecture.depth
    like = finite.FiniteCNN.random(problem.architecture, every, problem.inputs, generator, scaling=scaling)
    law = StartLaw.mean_field(like) if scaling == "mean_field" else StartLaw.he(like)
    start = law.draw(like, generator)
    settings = {"optimiser": "sgd", "schedule": "constant", "learning_rate": RATES[scaling](width), "steps": STEPS}
    trained = finite.train(problem, every, scaling=scaling, start=start, record_every=STEPS, **settings)
    moved = Displacement.between(start, trained.network)
    goal = predict(moved, law, problem.inputs)

    def error(arm: str) -> float:
        networks = (ARMS[arm](moved, law, start, generator) for _ in range(draws[arm]))
        return float(torch.stack([_squared(network(problem.inputs), goal) for network in networks]).mean())

    return {**{arm: error(arm) for arm in ARMS}, "predicted": float(goal.square().mean())}


def _squared(outputs: Tensor, goal: Tensor) -> Tensor:
    return (outputs.detach() - goal).square().mean()
