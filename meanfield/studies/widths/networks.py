"""How finite networks approach the continuous one: sampled from a solved measure, and trained from their own starts.

Each measurement is a function of a cell (see `meanfield.bench.sweep`): the fields of a Task and those that its
docstring names.  Theory: channels drawn i.i.d. from the masses give E|F_m - F|^2 = O(1/m), plain Monte Carlo through
all layers (docs/theory.md, section 10).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meanfield import finite, solvers, starts
from meanfield.bench.sweep import Cell, Row
from meanfield.bench.task import Task
from meanfield.data import Dataset
from meanfield.losses import Loss
from meanfield.network import ParticleNetwork
from meanfield.problem import Problem
from meanfield.solvers import main_job
from meanfield.solvers.solution import Solution

PARTICLES, LIMIT_STEPS = 48, 400  # of the measure that is sampled
BATCH = 20  # networks drawn for one row: their mean errors are what intervals are made from
HELD_OUT = 16  # images for accuracies


def sampled(cell: Cell) -> list[Row]:
    """Networks of `width` particles per layer drawn from a solved measure: errors over `draws` draws at each of
    `widths`.

    sampling: "masses" draws by mass; "uniform", the control, draws all particles alike and so ignores the masses.  A
    row holds means over BATCH draws: squared_error (of F over the training images), excess (J - J of the measure,
    penalties as they are, bounds not enforced), accuracy on held-out images, feature_error_l (squared, of the
    measure's own features in layer l when the layers below are sampled, weighted by mass).
    """
    task = Task.from_dict(cell)
    problem, held_out = task.problem(), _held_out(task)
    network = _limit(task, cell["seed"]).network
    exact = network.responses(torch.cat([problem.inputs, held_out.inputs.to(problem.inputs)]))
    value = float(problem.terms(network).total())
    rows = []
    for width in cell["widths"]:
        generator = np.random.default_rng([cell["seed"], width])
        for draw in range(0, cell["draws"], BATCH):
            masses = draw_masses(network, width, BATCH, cell["sampling"], generator)
            found = _against(problem, held_out, network, exact, masses)
            found["excess"] -= value
            rows.append({**_named(task), "sampling": cell["sampling"], "width": width, "draw": draw, **found})
    return rows


@lru_cache(maxsize=4)
def _limit(task: Task, seed: int) -> Solution:
    """The end of a flow with moving masses."""
    return _flowed(task.problem(), PARTICLES, seed, LIMIT_STEPS)


def _flowed(problem: Problem, width: int, seed: int, steps: int) -> Solution:
    """The flow with moving masses from a random start of `width` particles per layer."""
    widths, generator = (width,) * problem.architecture.depth, torch.Generator().manual_seed(seed)
    return solvers.flow.solve(problem, starts.draw(problem, widths, generator), steps=steps)


def _held_out(task: Task) -> Dataset:
    images = task.images()
    return images.split(min(HELD_OUT, 0 if images.rest is None else len(images.rest)))[1]


def _named(task: Task) -> Row:
    return {"data": task.data, "depth": task.depth, "activation": task.activation}


def draw_masses(
    network: ParticleNetwork, width: int, count: int, sampling: str, generator: np.random.Generator
) -> list[Tensor]:
    """Masses (count, M_l) of `count` sampled networks: how often each particle was drawn, over `width`.

    A network of `width` channels drawn with replacement is the measure's own particles at these masses, clones merged:
    it is evaluated on M_l particles instead of `width` channels.
    """
    found = []
    for masses in network.masses:
        p = masses.detach().double().cpu().numpy()
        p = np.full(len(p), 1 / len(p)) if sampling == "uniform" else p / p.sum()
        found.append(torch.from_numpy(generator.multinomial(width, p, size=count) / width).to(masses))
    return found


@torch.no_grad()
def sampled_responses(network: ParticleNetwork, inputs: Tensor, masses: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Features (S, N, M_l, H, W) per layer, S = 1 in the first, and output (S, N, K) at masses (S, M_l)."""
    arch, signal, features = network.architecture, inputs[None] / inputs.shape[1], []
    for layer, kernel, bias, below in zip(arch.layers, network.kernels, network.biases, [None, *masses[:-1]]):
        if below is not None:
            signal = signal * below[:, None, :, None, None]
        maps = layer.activate(layer.convolve(signal.flatten(0, 1), kernel, bias))
        signal = maps.unflatten(0, signal.shape[:2])
        features.append(signal)
    weighted = signal * masses[-1][:, None, :, None, None]
    read = arch.readout_features(weighted.flatten(0, 1)).flatten(1) @ network.readout.flatten(1).T
    return features, read.unflatten(0, weighted.shape[:2])


def _against(problem: Problem, held_out: Dataset, network: ParticleNetwork, exact: Any, masses: list[Tensor]) -> Row:
    """Means over the draws of what sampling does to output, features, J and accuracy."""
    count = len(problem.inputs)
    inputs = torch.cat([problem.inputs, held_out.inputs.to(problem.inputs)])
    features, output = sampled_responses(network, inputs, masses)

    def objective(output: Tensor, *masses: Tensor) -> Tensor:
        drawn = ParticleNetwork.unchecked(
            network.architecture, masses, network.kernels, network.readout, network.biases
        )
        return problem.terms(drawn, output).total()

    found = {
        "squared_error": float((output - exact.output)[:, :count].square().sum(2).mean()),
        "excess": float(torch.vmap(objective)(output[:, :count], *masses).mean()),
        "accuracy": accuracy(problem.loss, output[:, count:].flatten(0, 1), held_out, len(masses[0])),
    }
    for layer, (drawn, true, p) in enumerate(zip(features, exact.features, network.masses)):
        if layer:
            found[f"feature_error_{layer + 1}"] = float((drawn - true)[:, :count].square().mean((0, 1, 3, 4)) @ p)
    return found


def accuracy(loss: Loss, output: Tensor, images: Dataset, repeats: int = 1) -> float:
    """Share of images classified rightly; output (repeats N, K)."""
    return float((loss.predict(output).cpu() == images.indices.repeat(repeats)).double().mean())


def limit(cell: Cell) -> list[Row]:
    """The continuous network: J of the alternation with growth from `width` particles, and its bound over all measures.

    bound: of the frozen program where no search was made.  The bound of a search is the best of its starts; it is
    proven only where `proven_bound` is there.
    """
    task = Task.from_dict(cell)
    solved = main_job.solve(
        task.problem(),
        (cell["width"],) * task.depth,
        cell["seed"],
        rounds=cell["rounds"],
        flow_steps=cell["steps"],
        grow=8,
        tolerance=1e-3,
        program_tolerance=1e-3,
        program_iterations=500,
    )
    said = [row["search_bound"] if row["refuted_bound"] is None else row["refuted_bound"] for row in solved.history]
    bounds = [bound for bound in said if math.isfinite(bound)]
    proven = [row["proven_bound"] for row in solved.history if row["proven_bound"] is not None]
    found = {"value": solved.value, "bound": max(bounds, default=None), "proven_bound": max(proven, default=None)}
    return [
        {
            **_named(task),
            "seed": cell["seed"],
            "widths": "x".join(map(str, solved.network.widths)),
            **found,
            "gap": solved.gap,
        }
    ]


def trained(cell: Cell) -> list[Row]:
    """A network of `width` particles per layer trained from its own random start `seed` for `steps` steps.

    masses: "fixed" trains a finite network in the mean-field scaling (Adam, equal masses); "free" lets the masses move
    with the features (`solvers.flow`).
    """
    task = Task.from_dict(cell)
    problem, held_out = task.problem(), _held_out(task)
    if cell["masses"] == "fixed":
        ended = finite.train(problem, (cell["width"],) * task.depth, cell["seed"], steps=cell["steps"])
        network = ended.network.particles()
    else:
        ended = _flowed(problem, cell["width"], cell["seed"], cell["steps"])
        network = ended.network
    judged = accuracy(problem.loss, network(held_out.inputs.to(problem.inputs)), held_out)
    figures = {"value": ended.value, "accuracy": judged, "status": ended.status}
    return [{**_named(task), "masses": cell["masses"], "width": cell["width"], "seed": cell["seed"], **figures}]


def kernel(cell: Cell) -> list[Row]:
    """Relative Frobenius error of the empirical tangent kernel of a one-layer network of `width` against the infinite
    one.

    ReLU, the "ntk" scaling, the He start `seed`; the task's architecture otherwise.
    """
    task = Task.from_dict(cell).variant(depth=1, activation="relu")
    problem = task.problem()
    network = finite.FiniteCNN.random(
        problem.architecture, (cell["width"],), problem.inputs, torch.Generator().manual_seed(cell["seed"]), "ntk"
    )
    infinite = finite.kernel.infinite(problem.architecture, problem.inputs)
    error = torch.linalg.norm(finite.kernel.empirical(network, problem.inputs) - infinite) / torch.linalg.norm(infinite)
    return [{"data": task.data, "width": cell["width"], "seed": cell["seed"], "relative_error": float(error)}]
