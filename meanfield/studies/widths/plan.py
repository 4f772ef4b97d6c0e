"""The width study: which cells it has, how they are run, and what the tables say; `meanfield widths` writes its page.

Parts: "sampled" and "trained" networks against the continuous one, "trajectories" of feature measures with their
"statistics", "coordinates" of the parameterisations side by side, and the tangent "kernel" of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from meanfield.bench import sweep
from meanfield.bench.sweep import Cell, Tables, product_of
from meanfield.bench.task import Task
from meanfield.studies.widths import coordinates, trajectories
from meanfield.studies.widths import networks as widths
from meanfield.studies.widths.trajectories import TIMES

RATE = 0.5
WIDE = 256
# mean-field layers below the last one start to learn once the last one has: not in the first few steps
COORDINATE_STEPS = 16


@dataclass(frozen=True)
class Sizes:
    """How much of everything: "quick" shows that it runs, "default" takes under ten minutes on two
    cores, "full" hours.
    """

    depths: tuple[int, ...]
    sampled_widths: tuple[int, ...]
    draws: int
    control_draws: int
    trained_widths: tuple[int, ...]
    trained_seeds: int
    trained_steps: int
    limit_seeds: int
    limit_rounds: int
    trajectory_widths: tuple[int, ...]
    pairs: int
    noisy_widths: tuple[int, ...]
    coordinate_widths: tuple[int, ...]
    coordinate_seeds: int
    kernel_widths: tuple[int, ...]
    kernel_seeds: int


SIZES = {
    "quick": Sizes((1, 2), (64, 256), 60, 20, (8, 16), 2, 60, 1, 1, (8, 16), 2, (8,), (16, 64), 1, (16, 64), 3),
    "default": Sizes(
        (1, 2, 3),
        (64, 128, 256, 512, 1024),
        1000,
        100,
        (8, 16, 32, 64, 128),
        6,
        800,
        2,
        3,
        (16, 32, 64, 128, 256, 768),
        5,
        (32, 128),
        (32, 128, 512),
        3,
        (16, 64, 256, 1024),
        12,
    ),
    "full": Sizes(
        (1, 2, 3),
        (64, 128, 256, 512, 1024),
        4000,
        400,
        (8, 16, 32, 64, 128, 256),
        20,
        3000,
        4,
        6,
        (16, 32, 64, 128, 256, 512, 1024, 1536),
        12,
        (32, 128, 512),
        (32, 128, 512, 2048),
        8,
        (16, 64, 256, 1024, 4096),
        40,
    ),
}
PARTS = ("sampled", "limit", "trained", "trajectories", "statistics", "gallery", "coordinates", "kernel")
MEASURES: dict[str, sweep.Measure] = {
    "sampled": widths.sampled,
    "limit": widths.limit,
    "trained": widths.trained,
    "trajectories": trajectories.pair,
    "statistics": trajectories.statistics,
    "gallery": trajectories.gallery,
    "coordinates": coordinates.check,
    "kernel": widths.kernel,
}


def plan(task: Task, sizes: Sizes, seed: int = 0) -> dict[str, list[Cell]]:
    """The cells of every part.  `task` says which images in which type; each part takes the size that it can afford."""
    small = task.variant(depth=2, source_penalty=3e-3, readout_penalty=5e-3, input_penalty=2e-3, **_smaller(task))
    # a third of the time; distances are taken in float64
    deep = task.variant(depth=3, dtype="float32", **_smaller(task))
    # whose gradients would mask the loss's
    bare = deep.variant(source_penalty=0.0, readout_penalty=0.0, input_penalty=0.0)
    return {
        "sampled": _sampled(task, sizes, seed),
        "limit": _cells(
            small,
            seed=_seeds(seed, sizes.limit_seeds),
            width=[16],
            rounds=[sizes.limit_rounds],
            steps=[sizes.trained_steps],
        ),
        "trained": _cells(
            small,
            masses=["fixed", "free"],
            width=sizes.trained_widths,
            seed=_seeds(seed, sizes.trained_seeds),
            steps=[sizes.trained_steps],
        ),
        "trajectories": list(_pairs(deep, sizes)),
        "statistics": _trained_along(
            deep, arm=["mean_field"], width=sizes.trajectory_widths[:-1:2], seed=range(min(4, sizes.pairs))
        ),
        "gallery": _trained_along(deep, arm=["mean_field"], width=sizes.trajectory_widths[1:-1:2], seeds=[sizes.pairs]),
        "coordinates": _cells(
            bare,
            scaling=["mean_field", "mup", "ntk", "standard"],
            optimiser=["sgd", "adam"],
            width=sizes.coordinate_widths,
            seed=_seeds(seed, sizes.coordinate_seeds),
            steps=[COORDINATE_STEPS],
        ),
        "kernel": _cells(
            task.variant(pool=1, samples=20), width=sizes.kernel_widths, seed=_seeds(seed, sizes.kernel_seeds)
        ),
    }


def _smaller(task: Task) -> dict[str, int]:
    """Digits at 2x2 pixels: training is what costs."""
    return {"pool": 2 * task.pool, "samples": max(2, task.samples // 2)}


def _sampled(task: Task, sizes: Sizes, seed: int) -> list[Cell]:
    cells = []
    for depth, activation, sampling in product(sizes.depths, ("tanh", "relu"), ("masses", "uniform")):
        draws = sizes.draws if sampling == "masses" else sizes.control_draws
        each = task.variant(depth=depth, activation=activation).bounded()
        cells += _cells(each, seed=[seed], sampling=[sampling], widths=[list(sizes.sampled_widths)], draws=[draws])
    return cells


def _pairs(task: Task, sizes: Sizes) -> Iterable[Cell]:
    """Wide networks in fewer pairs; the widest have none of twice their width."""
    for arm in trajectories.ARMS:
        noisy = arm in ("shuffled_batches", "fixed_batches", "noise")
        for width in sizes.noisy_widths if noisy else sizes.trajectory_widths:
            pairs = sizes.pairs if width <= WIDE else max(2, sizes.pairs // 2)
            doubled = arm == "mean_field" and 2 * width <= max(WIDE, sizes.trajectory_widths[-2])
            yield from _trained_along(task, arm=[arm], width=[width], number=range(pairs), doubled=[doubled])


def _trained_along(task: Task, **lists: Iterable[Any]) -> list[Cell]:
    return _cells(task, **lists, rate=[RATE], times=[TIMES])


def _cells(task: Task, **lists: Iterable[Any]) -> list[Cell]:
    return product_of(task.to_dict(), **lists)


def _seeds(first: int, count: int) -> range:
    return range(first, first + count)


def run(
    task: Task,
    sizes: Sizes,
    directory: str | Path | None = None,
    *,
    parts: Sequence[str] = PARTS,
    seed: int = 0,
    jobs: int = 1,
    backend: str = "loky",
    announce: Callable[[str, Cell, bool], None] = lambda part, cell, kept: None,
) -> Tables:
    """Rows of every part, from cells kept in `directory`/cells, and a CSV table of each part in `directory`.

    Cells name a digest of the images: a file of the same name with other images is another study.
    """
    digest = task.digest()
    chosen = {
        part: [{**cell, "images": digest} for cell in cells]
        for part, cells in plan(task, sizes, seed).items()
        if part in parts
    }
    return sweep.study(chosen, MEASURES, directory, jobs=jobs, backend=backend, announce=announce)
