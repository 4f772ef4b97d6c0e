"""Networks of growing width, sampled from one: their curvature in the metric of the flow, and in their weights."""

from __future__ import annotations

from functools import lru_cache

import torch

import meanfield as mf
from meanfield import landscape
from meanfield.bench.sweep import Cell, Row
from meanfield.bench.task import Task
from meanfield.landscape.sharpness import METRICS
from meanfield.studies.landscape.joins import trained

MEASURES = ("top", "gauss_newton", "trace")


def metric(cell: Cell, store: str) -> list[Row]:
    """Sharpness in both metrics of networks drawn from a trained one: a row per draw and metric, its own last.

    cell: task (fields of a Task), source (the width of the trained one), steps, seed; width and draws of the samples;
    products, tolerance of `landscape.sharpness`.  rest: of the trace, without the Gauss-Newton part.
    """
    problem, source = _source(Task.from_dict(cell["task"]), cell["source"], cell["seed"], cell["steps"])
    depth, rows = problem.architecture.depth, []
    for draw in range(cell["draws"]):
        generator = torch.Generator().manual_seed(cell["draws"] * cell["seed"] + draw)
        sampled = mf.finite.sample(source, (cell["width"],) * depth, generator).particles()
        rows += [{"width": cell["width"], "draw": draw, **_figures(problem, sampled, each, cell)} for each in METRICS]
    return [*rows, {"width": None, "draw": None, **_figures(problem, source, "flow", cell)}]


@lru_cache(maxsize=1)
def _source(task: Task, width: int, seed: int, steps: int) -> tuple[mf.Problem, mf.ParticleNetwork]:
    problem = task.problem()
    return problem, trained(problem, width, seed, steps)


def _figures(problem: mf.Problem, network: mf.ParticleNetwork, name: str, cell: Cell) -> Row:
    found = landscape.sharpness(
        network,
        problem.inputs,
        problem.targets,
        loss=problem.loss.value,
        metric=name,
        measures=MEASURES,
        seed=cell["seed"],
        products=cell["products"],
        tolerance=cell["tolerance"],
    )
    values = {each: getattr(found, each).value for each in MEASURES}
    return {"metric": name, **values, "rest": values["trace"] - values["gauss_newton"]}
