"""What a point of a loss surface costs: the exact evaluation, a loop of functional_call, the package loss-landscapes.

Every network has a process of its own, one thread, all 1,437 training images of the digits; the contenders compute
loss by loss a square of points in alternating blocks, medians of CPU seconds.  loss-landscapes passes all images at
once, the loop 256 at a time.  The exact evaluation gives the accuracy besides; what it prepares once for all points is
stated apart.  loss-landscapes draws directions "model"-normalised: its filter normalisation divides by the length of a
bias, which is zero at the start of a VGG.  Largest relative difference: of the losses of the first two.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import isolated
from benchmarks.blocks import Step, alternating, medians
from benchmarks.options import BenchmarkOptions, InProcess, Quick
from meanfield import data
from meanfield.bench.options import WORK, at_least, option
from meanfield.finite import Recipe, fit, vgg
from meanfield.landscape import plane, surface
from meanfield.landscape.evaluation import Evaluation
from meanfield.landscape.objective import Objective
from meanfield.subject import Subject

PEER = "loss_landscapes"
TARGETS = {"early pooling": 0.35, "late pooling": 0.35, "VGG-11": 0.25}  # of the peer's time, at most
GRID, TOLERANCE = 51, 0.01  # of the surface
SIDES = {"default": 6, "quick": 2}  # points along a side of a block's square


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    samples: Annotated[int, option("Training images.", WORK), at_least(2)] = 1437
    repetitions: Annotated[int, option("Timed blocks of every contender.", WORK), at_least(1)] = 7
    quick: Quick = False
    in_process: InProcess = False


def network(name: str) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    if name == "VGG-11":
        return vgg(11, (1, 8, 8), 10, width=8, generator=generator)
    first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    layers: list[nn.Module] = {
        "early pooling": [first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU()],
        "pooling twice": [first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2)],
        "late pooling": [first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2)],
    }[name]
    features = nn.Sequential(*layers, nn.Flatten())(torch.zeros(1, 1, 8, 8)).shape[1]
    found = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 10))
    for module in found:  # torch draws from the global random numbers
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, generator=generator)
            nn.init.constant_(module.bias, 0.01)  # type: ignore[arg-type]
    return found


NETWORKS = ("early pooling", "pooling twice", "late pooling", "VGG-11")


def one(order: dict[str, Any]) -> dict[str, Any]:
    """A network of the order; for `isolated`."""
    digits = data.load("digits")
    images, labels = digits.inputs[: order["samples"]].float(), digits.targets("softmax")[: order["samples"]]
    trained = fit(network(order["network"]), images, labels, Recipe(epochs=order["epochs"])).network
    steps, checks = _contenders(trained, images, labels, order["side"])
    seconds = medians(alternating(steps, 1, order["repetitions"], 1))
    figures = {name: 1e3 * each / order["side"] ** 2 for name, each in seconds.items()}
    began = time.process_time()
    drawn = surface(trained, plane(trained, seed=0), images, labels, tolerance=TOLERANCE, extent=1.0)
    drawn.grid(GRID)
    return {
        "network": order["network"],
        "parameters": sum(each.numel() for each in trained.parameters()),
        "milliseconds": figures,
        "ratio": figures["exact"] / figures[PEER] if PEER in figures else None,
        **checks,
        "surface_seconds": time.process_time() - began,
        "surface_evaluations": drawn.evaluations,
        "surface_status": drawn.status,
    }


def _contenders(
    trained: nn.Module, images: Tensor, labels: Tensor, side: int
) -> tuple[dict[str, Step], dict[str, float]]:
    """A step of each computes the losses of side x side points; what the exact one prepared, and how right it is."""
    where, objective = plane(trained, seed=0), Objective(Subject(trained), images, labels)
    ticks = torch.linspace(-1, 1, side, dtype=torch.float64)
    points = torch.cartesian_prod(ticks, ticks)
    began = time.process_time()
    evaluation = Evaluation(where, {"train": objective})
    prepared = time.process_time() - began

    def loop() -> list[float]:
        return [objective.score(where.at(a, b)).loss for a, b in points.tolist()]

    wanted = torch.tensor(loop(), dtype=torch.float64)
    difference = float((evaluation(points)[:, 0] / wanted - 1).abs().max())
    steps: dict[str, Step] = {"exact": _step(evaluation, points), "functional_call": _step(loop)}
    if importlib.util.find_spec(PEER):
        steps[PEER] = _peer(trained, images, labels, side)
    return steps, {"prepared_seconds": prepared, "largest_relative_difference": difference}


def _peer(trained: nn.Module, images: Tensor, labels: Tensor, side: int) -> Step:
    from loss_landscapes import random_plane  # type: ignore[import-not-found]
    from loss_landscapes.metrics import Loss  # type: ignore[import-not-found]

    metric = Loss(functional.cross_entropy, images, labels)
    return _step(random_plane, trained, metric, 1, side, "model", True)


def _step(function: Callable[..., object], *arguments: object) -> Step:
    def step() -> None:
        function(*arguments)

    return step


def run(options: Options, report: Callable[[str], None]) -> dict[str, Any]:
    """Every figure of the benchmark, ready for JSON."""
    size = {"side": SIDES["quick" if options.quick else "default"], "epochs": 1 if options.quick else 10}
    order = {**size, "samples": options.samples, "repetitions": options.repetitions}
    rows = []
    for name in NETWORKS[:1] if options.quick else NETWORKS:
        row = isolated.call(
            "benchmarks.landscape.measure:one", {**order, "network": name}, fresh=not options.in_process
        )
        target = TARGETS.get(name)
        kept = None if target is None or row["ratio"] is None else row["ratio"] <= target
        rows.append({**row, "target": target, "fast_enough": kept})
        report(f"{name}: {row['milliseconds']['exact']:.2f} ms a point")
    installed = importlib.util.find_spec(PEER) is not None
    missing = None if installed else f"{PEER} is not installed; pip install 'meanfield[peers]'"
    return {"images": options.samples, "grid": GRID, "tolerance": TOLERANCE, "rows": rows, "missing": missing}
