"""Do two networks learn the same features at the same time?  Distances between feature measures along training.

Gu et al. 2020, section 5, call it the fixed trajectory: at equal flow time the feature measures of two seeds, and of
widths m and 2m, approach each other as m grows, while one network at times t and 2t stays as far apart as learning
takes it.  Flow time is the sum of learning rates, so that widths and step sizes can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from meanfield import finite, starts
from meanfield.bench.distances import FeatureMeasure, median_distance, mmd, moments, sliced_wasserstein
from meanfield.bench.sweep import Cell, Row
from meanfield.bench.task import Task
from meanfield.problem import Problem

TIMES = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
PROBES = 32  # held-out images
REFERENCE_WIDTH = 256  # particles of the start whose median distance is the bandwidth
PROJECTIONS = 200
QUANTILES = tuple(range(5, 100, 5))  # per cent; masses are equal in a finite network
BATCH = 2
NOISE = 1e-4  # temperature: sqrt(2 NOISE t) is how far noise alone carries a parameter in time t
ARMS: dict[str, dict[str, Any]] = {
    "mean_field": {},
    "ntk": {"scaling": "ntk"},
    "permuted_labels": {},
    "shuffled_batches": {"batch_size": BATCH, "shuffle": True},
    "fixed_batches": {"batch_size": BATCH, "shuffle": False},
    "noise": {"noise": NOISE},
}
Checkpoints = tuple[tuple[float, finite.FiniteCNN], ...]
Trail = list[tuple[float, list[FeatureMeasure]]]  # per checkpoint: flow time, the features of every layer
Setting = tuple[Problem, Tensor, list[float]]  # what is learned, probes, bandwidths of the layers


def pair(cell: Cell) -> list[Row]:
    """Two networks of `width` from different starts, and one of twice the width if `doubled`, by gradient descent.

    arm: "mean_field"; "ntk", the 1/sqrt(m) scaling; "permuted_labels", where the second network learns other labels;
    "shuffled_batches" and "fixed_batches" of BATCH images; "noise".  `rate`, `times` (flow times of the checkpoints,
    0 for the start), `number` (which pair).  Rows: kind "seeds" (the two at one time), "doubled", "times" (the first at
    this and at the previous checkpoint), "cross" (the first at `time`, the second at `other_time`, last layer, pair 0).
    """
    task = Task.from_dict(cell)
    setting = _setting(task)
    other = _permuted(task, setting[0], cell["number"]) if cell["arm"] == "permuted_labels" else setting[0]
    options = {**_options(cell), "doubled": cell["doubled"], "other": other}
    named = {"arm": cell["arm"], "width": cell["width"], "number": cell["number"]}
    return [{**named, **row} for row in compared(setting, cell["width"], cell["number"], **options)]


def compared(
    setting: Setting, width: int, number: int, *, doubled: bool, other: Problem | None = None, **options: Any
) -> list[Row]:
    """The rows of pair `number` at a width; the second network learns `other`, by default the same; options as for
    `networks`.
    """
    problem, probes, bandwidths = setting
    first = trail(problem, width, 3 * number, probes, **options)
    second = trail(other or problem, width, 3 * number + 1, probes, **options)
    pairs = {"seeds": (first, second), "times": (first[1:], first[:-1])}
    if doubled:
        pairs["doubled"] = (first, trail(problem, 2 * width, 3 * number + 2, probes, **options))
    rows = [{"kind": kind, **row} for kind, trails in pairs.items() for row in _distances(*trails, bandwidths)]
    if number == 0:
        rows += [{"kind": "cross", **row} for row in _crossed(first, second, bandwidths)]
    return rows


def statistics(cell: Cell) -> list[Row]:
    """Mean, variance and excess kurtosis of pre-activations and features of one network, per layer and checkpoint.

    Over particles and probes jointly, with the quantiles of QUANTILES in columns q05, ..., q95.  Cell as in `pair`,
    with `seed` in place of `number`.
    """
    problem, probes, _ = _setting(Task.from_dict(cell))
    options = _options(cell)
    rows = []
    for time, network in networks(problem, cell["width"], cell["seed"], **options):
        for layer in range(problem.architecture.depth):
            for what in ("preactivations", "features"):
                measure = FeatureMeasure.of(network, probes, layer, preactivations=what == "preactivations")
                levels = torch.tensor(QUANTILES).to(measure.values) / 100
                quantiles = {
                    f"q{q:02d}": float(v) for q, v in zip(QUANTILES, measure.values.flatten().quantile(levels))
                }
                named = {
                    "arm": cell["arm"],
                    "width": cell["width"],
                    "seed": cell["seed"],
                    "time": time,
                    "layer": layer + 1,
                    "of": what,
                }
                rows.append({**named, **moments(measure)._asdict(), **quantiles})
    return rows


def gallery(cell: Cell) -> list[Row]:
    """All pairs of `seeds` networks of `width` at the last checkpoint, last layer: MMD; the diagonal is 0."""
    problem, probes, bandwidths = _setting(Task.from_dict(cell))
    options = _options(cell)
    ends = [trail(problem, cell["width"], seed, probes, **options)[-1][1][-1] for seed in range(cell["seeds"])]
    return [
        {
            "arm": cell["arm"],
            "width": cell["width"],
            "seed": i,
            "other_seed": j,
            "mmd": mmd(a, b, [bandwidths[-1]]).values[0],
        }
        for i, a in enumerate(ends)
        for j, b in enumerate(ends)
    ]


def _options(cell: Cell) -> dict[str, Any]:
    return {"rate": cell["rate"], "times": cell["times"], **ARMS[cell["arm"]]}


def networks(
    problem: Problem, width: int, seed: int, *, rate: float, times: Sequence[float], **options: Any
) -> Checkpoints:
    """(flow time, network) at every checkpoint of gradient descent at a constant rate; options as for `train`."""
    steps = round(times[-1] / rate)
    widths = (width,) * problem.architecture.depth
    ended = finite.train(
        problem,
        widths,
        seed,
        schedule="constant",
        learning_rate=rate,
        steps=steps,
        checkpoints=times,
        record_every=steps,
        **{"optimiser": "sgd", **options},
    )
    if ended.status != "completed":
        raise RuntimeError(f"width {width}, seed {seed}: {ended.message}")
    return ended.checkpoints


def trail(problem: Problem, width: int, seed: int, probes: Tensor, **options: Any) -> Trail:
    """Feature measures of all layers at every checkpoint."""
    depth = problem.architecture.depth
    return [
        (time, [FeatureMeasure.of(each, probes, layer) for layer in range(depth)])
        for time, each in networks(problem, width, seed, **options)
    ]


@lru_cache(maxsize=4)
def _setting(task: Task) -> Setting:
    images = task.images()
    probes = images.split(min(PROBES, len(images.rest or ())))[1] if images.rest is not None else images
    problem = task.problem(images)
    return setting(problem, probes.inputs.to(problem.inputs))


def setting(problem: Problem, probes: Tensor) -> Setting:
    """With a bandwidth per layer: the median distance between particles of a wide start, the same for all
    comparisons.
    """
    depth = problem.architecture.depth
    start = starts.draw(problem, (REFERENCE_WIDTH,) * depth, torch.Generator().manual_seed(0))
    layers = [FeatureMeasure.of(start, probes, layer) for layer in range(depth)]
    return problem, probes, [median_distance(each, each) for each in layers]


def _permuted(task: Task, problem: Problem, number: int) -> Problem:
    order = torch.randperm(len(problem.targets), generator=torch.Generator().manual_seed(number)).to(
        problem.targets.device
    )
    return Problem(problem.architecture, problem.inputs, problem.targets[order], task.loss, problem.penalty)


def _distances(first: Trail, second: Trail, bandwidths: list[float]) -> list[Row]:
    """Checkpoint by checkpoint, layer by layer."""
    rows = []
    for (time, ours), (_, theirs) in zip(first, second):
        for layer, (a, b, bandwidth) in enumerate(zip(ours, theirs, bandwidths)):
            sliced = sliced_wasserstein(a, b, generator=torch.Generator().manual_seed(0), projections=PROJECTIONS)
            rows.append(
                {
                    "time": time,
                    "layer": layer + 1,
                    "mmd": mmd(a, b, [bandwidth]).values[0],
                    "sliced_wasserstein": sliced.value,
                }
            )
    return rows


def _crossed(first: Trail, second: Trail, bandwidths: list[float]) -> list[Row]:
    return [
        {
            "time": time,
            "other_time": other,
            "layer": len(bandwidths),
            "mmd": mmd(ours[-1], theirs[-1], [bandwidths[-1]]).values[0],
        }
        for time, ours in first
        for other, theirs in second
    ]
