"""The cells of the width study, part by part: plan(task, sizes, seed).

`task` says which images in which type; each part takes the size that it can afford.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from meanfield.bench.sweep import Cell, product_of
from meanfield.bench.task import Task
from meanfield.studies.widths.trajectories import ARMS, TIMES
from meanfield.validation import Misuse

RATE = 0.5
WIDE = 256
# mean-field layers below the last one start to learn once the last one has: not in the first few steps
COORDINATE_STEPS = 16
KERNEL_IMAGES = 20
JUDGED = ("sampled", "trained")  # parts that measure accuracies on images held out


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything: "quick" takes a minute, "default" under ten minutes on two cores, "full" hours."""

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
    "quick": Sizes(
        depths=(1, 2),
        sampled_widths=(64, 256),
        draws=60,
        control_draws=20,
        trained_widths=(8, 16),
        trained_seeds=2,
        trained_steps=60,
        limit_seeds=1,
        limit_rounds=1,
        trajectory_widths=(8, 16),
        pairs=2,
        noisy_widths=(8,),
        coordinate_widths=(16, 64),
        coordinate_seeds=1,
        kernel_widths=(16, 64),
        kernel_seeds=3,
    ),
    "default": Sizes(
        depths=(1, 2, 3),
        sampled_widths=(64, 128, 256, 512, 1024),
        draws=1000,
        control_draws=100,
        trained_widths=(8, 16, 32, 64, 128),
        trained_seeds=6,
        trained_steps=800,
        limit_seeds=2,
        limit_rounds=3,
        trajectory_widths=(16, 32, 64, 128, 256, 768),
        pairs=5,
        noisy_widths=(32, 128),
        coordinate_widths=(32, 128, 512),
        coordinate_seeds=3,
        kernel_widths=(16, 64, 256, 1024),
        kernel_seeds=12,
    ),
    "full": Sizes(
        depths=(1, 2, 3),
        sampled_widths=(64, 128, 256, 512, 1024),
        draws=4000,
        control_draws=400,
        trained_widths=(8, 16, 32, 64, 128, 256),
        trained_seeds=20,
        trained_steps=3000,
        limit_seeds=4,
        limit_rounds=6,
        trajectory_widths=(16, 32, 64, 128, 256, 512, 1024, 1536),
        pairs=12,
        noisy_widths=(32, 128, 512),
        coordinate_widths=(32, 128, 512, 2048),
        coordinate_seeds=8,
        kernel_widths=(16, 64, 256, 1024, 4096),
        kernel_seeds=40,
    ),
}


def sampled(task: Task, sizes: Sizes, seed: int) -> list[Cell]:
    cells = []
    for depth, activation, sampling in product(sizes.depths, ("tanh", "relu"), ("masses", "uniform")):
        draws = sizes.draws if sampling == "masses" else sizes.control_draws
        each = task.variant(depth=depth, activation=activation).bounded()
        cells += _cells(each, seed=[seed], sampling=[sampling], widths=[list(sizes.sampled_widths)], draws=[draws])
    return cells


def limit(task: Task, sizes: Sizes, seed: int) -> list[Cell]:
    seeds = _seeds(seed, sizes.limit_seeds)
    return _cells(_small(task), seed=seeds, width=[16], rounds=[sizes.limit_rounds], steps=[sizes.trained_steps])


def trained(task: Task, sizes: Sizes, seed: int) -> list[Cell]:
    seeds, masses = _seeds(seed, sizes.trained_seeds), ["fixed", "free"]
    return _cells(_small(task), masses=masses, width=sizes.trained_widths, seed=seeds, steps=[sizes.trained_steps])


def trajectories(task: Task, sizes: Sizes, seed: int) -> list[Cell]:
    """Wide networks in fewer pairs; the widest have none of twice their width."""
    cells = []
    for arm in ARMS:
        noisy = arm in ("shuffled_batches", "fixed_batches", "noise")
        for width in sizes.noisy_widths if noisy else sizes.trajectory_widths:
            pairs = sizes.pairs if width <= WIDE else max(2, sizes.pairs // 2)
            doubled = arm == "mean_field" and 2 * width <= max(WIDE, sizes.trajectory_widths[-2])
            cells += _along(task, arm=[arm], width=[width], number=range(pairs), doubled=[doubled])
    return cells


def statistics(task: Task, sizes: Sizes, seed: int) -> list[Cell]:
    widths, seeds = sizes.trajectory_widths[:-1:2], range(min(4, sizes.pairs))
    return _along(task, arm=["mean_field"], width=widths, seed=seeds)


def gallery(task: Task, sizes: Sizes, seed: int) -> list[Cell]:
    return _along(task, arm=["mean_field"], width=sizes.trajectory_widths[1:-1:2], seeds=[sizes.pairs])


def coordinates(task: Task, sizes: Sizes, seed: int) -> list[Cell]:
    """Without penalties, whose gradients would mask the loss's."""
    return _cells(
        _deep(task).variant(source_penalty=0.0, readout_penalty=0.0, input_penalty=0.0),
        scaling=["mean_field", "mup", "ntk", "standard"],
        optimiser=["sgd", "adam"],
        width=sizes.coordinate_widths,
        seed=_seeds(seed, sizes.coordinate_seeds),
        steps=[COORDINATE_STEPS],
    )


def kernel(task: Task, sizes: Sizes, seed: int) -> list[Cell]:
    """At full size, on as many images as there are up to KERNEL_IMAGES."""
    seeds = _seeds(seed, sizes.kernel_seeds)
    images = task.images()
    samples = min(KERNEL_IMAGES, len(images) + len(images.rest or ()))
    return _cells(task.variant(pool=1, samples=samples), width=sizes.kernel_widths, seed=seeds)


def _small(task: Task) -> Task:
    penalties = {"source_penalty": 3e-3, "readout_penalty": 5e-3, "input_penalty": 2e-3}
    return _smaller(task).variant(depth=2, **penalties)


def _deep(task: Task) -> Task:
    """In float32, which takes a third of the time; distances are taken in float64."""
    return _smaller(task).variant(depth=3, dtype="float32")


def _smaller(task: Task) -> Task:
    """Digits at 2x2 pixels: training is what costs."""
    return task.variant(pool=2 * task.pool, samples=max(2, task.samples // 2))


def _along(task: Task, **lists: Iterable[Any]) -> list[Cell]:
    return _cells(_deep(task), **lists, rate=[RATE], times=[TIMES])


def _cells(task: Task, **lists: Iterable[Any]) -> list[Cell]:
    return product_of(task.to_dict(), **lists)


def _seeds(first: int, count: int) -> range:
    return range(first, first + count)


def check(task: Task, plan: Mapping[str, Sequence[Cell]]) -> None:
    """Refuse images that some cell could not take, in the words of the task; nobody typed those of a cell."""
    images = task.images()
    sides = [task.pool * side for side in images.input_shape[1:]]
    every = len(images) + len(images.rest or ())
    for part, cells in plan.items():
        pool, samples = (max(cell[name] for cell in cells) for name in ("pool", "samples"))
        if part in JUDGED and samples >= every:
            raise Misuse(
                "samples",
                task.samples,
                f"leaves no image of {images.name} held out, which part {part} judges; take fewer",
            )
        if any(side % pool for side in sides):
            fine = [each for each in range(1, min(sides) + 1) if not any(side % (2 * each) for side in sides)]
            raise Misuse(
                "pool",
                task.pool,
                f"does not do for part {part}, which averages images of {' x '.join(map(str, sides))} over twice as "
                f"many, {pool} x {pool} pixels: {f'choose one of {fine}, or' if fine else 'take'} other parts, such as "
                "sampled",
            )
