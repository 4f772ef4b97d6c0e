"""The small program of a report: two classes of the same images, a few of them, averaged down; small enough for cvxpy
and for hundreds of networks, which the program of the report is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional

from meanfield import starts
from meanfield.bench.task import Task
from meanfield.data import Dataset
from meanfield.solvers import alternating
from meanfield.studies.solve.run import Run

IMAGES, SIDE, WIDTHS = 16, 4, (64, 32)
ROUNDS, FLOW_STEPS = 8, 800
TASK = Task(depth=len(WIDTHS))  # two tanh layers 3x3, squared loss; its own images are not used


def solved(run: Run, pair: tuple[int, int]) -> Run:
    """The small program of two classes, by their positions, solved from the same seed: some ten seconds, whatever the
    images; no clock but that of the report, so that it ends alike on a machine that is busy.
    """
    images = reduced(run.training, pair)
    problem = TASK.variant(device=str(run.problem.inputs.device)).problem(images)
    start = starts.draw(problem, WIDTHS, torch.Generator().manual_seed(run.seed), "low_rank")
    solution = alternating.solve(problem, start, seed=run.seed, rounds=ROUNDS, flow_steps=FLOW_STEPS)
    return replace(
        run,
        problem=problem,
        training=images,
        held_out=None,
        start=start,
        solution=solution,
        made={},
        warnings=[],
    )


def reduced(images: Dataset, pair: tuple[int, int]) -> Dataset:
    """The first IMAGES of two classes, averaged over windows that leave at most SIDE x SIDE pixels; of each class half
    of them where one would be missing.
    """
    classes = tuple(images.classes[place] for place in pair)
    of_each = [(images.labels == label).nonzero().flatten() for label in classes]
    rows = torch.cat(of_each).sort().values[:IMAGES]
    if len(images.labels[rows].unique()) < 2:
        rows = torch.cat([each[: IMAGES // 2] for each in of_each]).sort().values
    size = tuple(min(SIDE, side) for side in images.input_shape[1:])
    small = functional.adaptive_avg_pool2d(images.inputs[rows], size)  # type: ignore[arg-type]
    names = tuple(images.names[place] for place in pair) if images.names else ()
    return replace(images, inputs=small, labels=images.labels[rows], classes=classes, rest=None, names=names)


def most_confused(confusion: np.ndarray, present: Sequence[int]) -> tuple[int, int]:
    """The two of the classes `present` that are taken for each other most often, the first two without mistakes."""
    mistaken = np.triu(confusion + confusion.T, 1)[np.ix_(present, present)]
    first, second = np.unravel_index(int(mistaken.argmax()), mistaken.shape) if mistaken.any() else (0, 1)
    return present[int(first)], present[int(second)]
