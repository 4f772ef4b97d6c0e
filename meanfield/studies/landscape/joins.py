"""Two particle networks, joined in four ways, at several widths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import meanfield as mf
from meanfield import landscape, starts
from meanfield.bench.sweep import Cell, Row
from meanfield.bench.task import Task

WAYS = ("weights", "matched", "displacement", "mixture")


def joins(cell: Cell, store: str) -> list[Row]:
    """Train two networks from different starts by the flow, with fixed masses, and join them: a row per way and figure.

    cell: task (fields of a Task), width, seeds (two), steps, times.
    figures: the loss and J on the training images, the loss on those held out.  barrier: the largest rise above the
    chord; chord: its mean height; values at times.
    """
    task = Task.from_dict(cell["task"])
    problem, held_out = task.problem(), task.images().rest
    first, second = (trained(problem, cell["width"], seed, cell["steps"]) for seed in cell["seeds"])
    others = None if held_out is None else _prepared(task.problem(held_out))
    rows = []
    for how in WAYS:
        found = landscape.join(
            first,
            second,
            problem.inputs,
            problem.targets,
            how=how,
            loss=problem.loss.value,
            penalty=problem.penalty,
            held_out=others,
            times=cell["times"],
        )
        for figure in ("train loss", "train J", "held out loss"):
            if figure in found.figures:
                rows.append({**cell["names"], "width": cell["width"], "how": how, **_row(found, figure)})
    return rows


def trained(problem: mf.Problem, width: int, seed: int, steps: int) -> mf.ParticleNetwork:
    """By the flow with fixed masses, every layer of the same width."""
    depth = len(problem.architecture.layers)
    start = starts.draw(problem, (width,) * depth, torch.Generator().manual_seed(seed))
    return mf.solvers.flow.solve(problem, start, steps=steps, masses=False, seed=seed).network


def _prepared(problem: mf.Problem) -> tuple[Tensor, Tensor]:
    return problem.inputs, problem.targets


def _row(found: Any, figure: str) -> Row:
    values = found.figures[figure].tolist()
    return {
        "figure": figure,
        "barrier": found.barrier[figure],
        "chord": (values[0] + values[-1]) / 2,
        "relative": found.relative[figure],
        "times": found.times.tolist(),
        "values": values,
    }
