"""The width study: which cells it has, how they are run, and what the tables say; `meanfield widths` writes its page.

Parts: "sampled" and "trained" networks against the continuous one, "trajectories" of feature measures with their
"statistics", "coordinates" of the parameterisations side by side, and the tangent "kernel" of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from meanfield import sweep
from meanfield.rates import Slope, slope
from meanfield.studies import coordinates, trajectories, widths
from meanfield.sweep import Cell, Row, Rows, Tables, groups, product_of, select
from meanfield.task import Task

TIMES = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
RATE = 0.5
WIDE = 256
COORDINATE_STEPS = 16  # mean-field layers below the last one start to learn once the last one has: not in the first few steps
CONVERGED = {"1%": 0.01, "5%": 0.05}


@dataclass(frozen=True)
class Sizes:
    """How much of everything: "quick" shows that it runs, "default" takes under ten minutes on two cores, "full" hours."""

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
        (1, 2, 3), (64, 128, 256, 512, 1024), 1000, 100, (8, 16, 32, 64, 128), 6, 800, 2, 3, (16, 32, 64, 128, 256, 768), 5, (32, 128),
        (32, 128, 512), 3, (16, 64, 256, 1024), 12,
    ),
    "full": Sizes(
        (1, 2, 3), (64, 128, 256, 512, 1024), 4000, 400, (8, 16, 32, 64, 128, 256), 20, 3000, 4, 6, (16, 32, 64, 128, 256, 512, 1024, 1536), 12,
        (32, 128, 512), (32, 128, 512, 2048), 8, (16, 64, 256, 1024, 4096), 40,
    ),
}  # fmt: skip
PARTS = ("sampled", "limit", "trained", "trajectories", "statistics", "gallery", "coordinates", "kernel")
MEASURES: dict[str, sweep.Measure] = {
    "sampled": widths.sampled, "limit": widths.limit, "trained": widths.trained, "trajectories": trajectories.pair,
    "statistics": trajectories.statistics, "gallery": trajectories.gallery, "coordinates": coordinates.check, "kernel": widths.kernel,
}  # fmt: skip


def plan(task: Task, sizes: Sizes, seed: int = 0) -> dict[str, list[Cell]]:
    """The cells of every part.  `task` says which images in which type; each part takes the size that it can afford."""
    small = task.variant(depth=2, source_penalty=3e-3, readout_penalty=5e-3, input_penalty=2e-3, **_smaller(task))
    deep = task.variant(depth=3, dtype="float32", **_smaller(task))  # a third of the time; distances are taken in float64
    bare = deep.variant(source_penalty=0.0, readout_penalty=0.0, input_penalty=0.0)  # whose gradients would mask the loss's
    return {
        "sampled": _sampled(task, sizes, seed),
        "limit": _cells(small, seed=_seeds(seed, sizes.limit_seeds), width=[16], rounds=[sizes.limit_rounds], steps=[sizes.trained_steps]),
        "trained": _cells(
            small, masses=["fixed", "free"], width=sizes.trained_widths, seed=_seeds(seed, sizes.trained_seeds), steps=[sizes.trained_steps]
        ),
        "trajectories": list(_pairs(deep, sizes)),
        "statistics": _trained_along(deep, arm=["mean_field"], width=sizes.trajectory_widths[:-1:2], seed=range(min(4, sizes.pairs))),
        "gallery": _trained_along(deep, arm=["mean_field"], width=sizes.trajectory_widths[1:-1:2], seeds=[sizes.pairs]),
        "coordinates": _cells(
            bare, scaling=["mean_field", "mup", "ntk", "standard"], optimiser=["sgd", "adam"], width=sizes.coordinate_widths,
            seed=_seeds(seed, sizes.coordinate_seeds), steps=[COORDINATE_STEPS],
        ),
        "kernel": _cells(task.variant(pool=1, samples=20), width=sizes.kernel_widths, seed=_seeds(seed, sizes.kernel_seeds)),
    }  # fmt: skip


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
    chosen = {part: [{**cell, "images": digest} for cell in cells] for part, cells in plan(task, sizes, seed).items() if part in parts}
    return sweep.study(chosen, MEASURES, directory, jobs=jobs, backend=backend, announce=announce)


def samples(rows: Rows, figure: str) -> dict[int, list[float]]:
    """Width -> values."""
    return {width: [row[figure] for row in each] for (width,), each in sorted(groups(rows, "width").items())}


def rate(rows: Rows, figure: str, statistic: str = "mean") -> Slope | None:
    """Fitted over all widths of the rows; None for one width."""
    by_width = samples(rows, figure)
    return slope(list(by_width), list(by_width.values()), statistic=statistic) if len(by_width) > 1 else None


def summary(tables: Mapping[str, Rows]) -> dict[str, Any]:
    """The figures that the study is for, from whichever tables there are."""
    makers = {
        "sampled": sampled_rates, "trained": lambda rows: trained_shares(rows, tables.get("limit", ())), "trajectories": trajectory_rates,
        "coordinates": coordinate_slopes, "kernel": lambda rows: {"slope": rate(rows, "relative_error", "median")},
    }  # fmt: skip
    return {part: make(tables[part]) for part, make in makers.items() if part in tables}


def sampled_rates(rows: Rows) -> list[Row]:
    """Slopes of the squared error, of the excess and of the last layer's feature error, per depth, activation and sampling."""
    found = []
    for (depth, activation, sampling), each in groups(rows, "depth", "activation", "sampling").items():
        errors = samples(each, "squared_error")
        feature = rate(each, f"feature_error_{depth}") if depth > 1 else None
        found.append(
            {
                "depth": depth, "activation": activation, "sampling": sampling, "slope": rate(each, "squared_error"), "feature_slope": feature,
                "first": fmean(errors[min(errors)]), "last": fmean(errors[max(errors)]),
            }
        )  # fmt: skip
    return found


def trained_shares(rows: Rows, limits: Rows) -> dict[str, Any]:
    """Excess over the best known J by width, and the share of seeds within 1% and 5% of it.

    best: the lowest J of any run, with growth or without; bound: the highest lower bound of the searches that is not
    above it (bounds are the best of their starts, and one that a network goes below is refuted).
    """
    best = min(row["value"] for row in (*rows, *limits))
    bounds = [row["bound"] for row in limits if row["bound"] is not None]
    kept = [bound for bound in bounds if bound <= best]
    by_width = []
    for (masses, width), each in groups(rows, "masses", "width").items():
        excess = sorted(row["value"] / best - 1 for row in each)
        shares = {f"within_{name}": fmean([float(e <= level) for e in excess]) for name, level in CONVERGED.items()}
        by_width.append(
            {"masses": masses, "width": width, "seeds": len(each), "median": median(excess), "least": excess[0], "most": excess[-1], **shares}
        )
    return {"best": best, "bound": max(kept, default=None), "refuted_bounds": len(bounds) - len(kept), "widths": by_width}


def trajectory_rates(rows: Rows) -> dict[str, Any]:
    """Slopes over the width of the distance of two seeds and of widths m and 2m at the last time, last layer, per arm;
    and the ratio of the seeds' distance to that of times t and 2t, at the t where the latter is largest, largest width."""
    deepest = max(row["layer"] for row in rows)
    last = max(row["time"] for row in rows)
    rates, ratios = [], []
    for (arm,), each in groups(select(rows, layer=deepest), "arm").items():
        for kind, figure in product(("seeds", "doubled"), ("mmd", "sliced_wasserstein")):
            there = select(each, kind=kind, time=last)
            if there:
                rates.append({"arm": arm, "kind": kind, "distance": figure, "slope": rate(there, figure)})
        for (width,), same in groups(each, "width").items():
            ratios += [{"arm": arm, "width": width, "distance": figure, **_ratio(same, figure)} for figure in ("mmd", "sliced_wasserstein")]
    return {"rates": rates, "ratios": ratios, "time": last, "layer": deepest}


def _ratio(rows: Rows, figure: str) -> Row:
    time = most_changed(rows, figure)
    moved, apart = (median([row[figure] for row in select(rows, kind=kind, time=time)]) for kind in ("times", "seeds"))
    return {"time": time, "seeds": apart, "times": moved, "ratio": apart / moved}


def most_changed(rows: Rows, figure: str) -> float:
    """The time at which networks have moved most since half that time (the first checkpoint has no half)."""
    moved = {time: median([row[figure] for row in each]) for (time,), each in groups(select(rows, kind="times"), "time").items()}
    return max((time for time in moved if time >= 2 * TIMES[1]), key=lambda time: moved[time])


def coordinate_slopes(rows: Rows) -> list[Row]:
    """Log-log slope over the width of the change of every coordinate after the last step; 0 is flat."""
    last = max(row["step"] for row in rows)
    return [
        {"scaling": scaling, "optimiser": optimiser, "layer": layer, "slope": rate(each, "change"), "sizes": {
            width: fmean(values) for width, values in samples(each, "change").items()}}
        for (scaling, optimiser, layer), each in groups(select(rows, step=last), "scaling", "optimiser", "layer").items()
    ]  # fmt: skip
