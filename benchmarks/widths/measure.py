"""What a training step and a sweep cost: a step of `finite.train` against plain torch, and a sweep against its cells'
own time.

The step has the full objective, penalties included, and SGD in the mean-field scaling.  The plain step is forward, the
same loss, backward and torch.optim.SGD over nn.Conv2d layers without biases; "plain with penalties" adds this library's
three penalties, written in torch.  All run in one process on one thread, in alternating blocks, in CPU seconds; the
medians of the blocks are compared.  A sweep's overhead is jobs x wall / (sum of the cells' own seconds) - 1, with its
workers already started; starting them is stated apart.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import meanfield as mf
from benchmarks import machine
from benchmarks.blocks import Step, alternating
from meanfield.bench import sweep
from meanfield.bench.sweep import Cell, Row
from meanfield.finite import training

STEP_ALLOWED, OVERHEAD_ALLOWED = 1.3, 0.05
CONTENDERS: tuple[str, ...] = ("finite.train", "plain", "plain with penalties")


@dataclass(frozen=True)
class Settings:
    """Images and widths of the step; `cells` cells of `cell_seconds` in the sweep."""

    samples: int = 64
    width: int = 256
    depth: int = 2
    dtype: str = "float32"
    repetitions: int = 15
    block: int = 4
    warm_up: int = 4
    cells: int = 60
    cell_seconds: float = 0.25
    jobs: int = 2


def problem(settings: Settings) -> mf.Problem:
    """The first ten digits 8x8, softmax."""
    data = mf.data.load("digits", samples=settings.samples)
    layers = (mf.Conv(3, padding=1, activation="tanh"),) * settings.depth
    architecture = mf.Architecture(data.input_shape, layers, outputs=data.outputs_for("softmax"))
    penalty = mf.Penalty(source=3e-5, readout=3e-5, input=3e-5)
    return mf.Problem(architecture, data.inputs, data.targets("softmax"), "softmax", penalty).to(
        dtype=getattr(torch, settings.dtype)
    )


def library_step(settings: Settings) -> Step:
    """One step of `finite.train`, without its records."""
    task, generator = problem(settings), torch.Generator().manual_seed(0)
    chosen = training._Settings("sgd", "mean_field", None, 10**6, "constant")
    network = training._start(task, (settings.width,) * settings.depth, generator, "mean_field", "random")
    run = training._Run(task, network, chosen, training._Batches(settings.samples, None, True, generator), None)
    return lambda: training._step(run)


def plain_step(settings: Settings, *, penalised: bool) -> Step:
    task = problem(settings)
    torch.manual_seed(0)
    channels = (task.architecture.input_shape[0], *(settings.width,) * settings.depth)
    blocks = [
        block
        for pair in itertools.pairwise(channels)
        for block in (nn.Conv2d(*pair, 3, padding=1, bias=False), nn.Tanh())
    ]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(settings.width, task.architecture.outputs, bias=False))
    network = nn.Sequential(*blocks, *head).to(task.inputs.dtype)
    optimiser = torch.optim.SGD(network.parameters(), 1e-2)

    def step() -> None:
        optimiser.zero_grad()
        objective = nn.functional.cross_entropy(network(task.inputs), task.targets)
        if penalised:
            objective = objective + _penalties(network, task.penalty)
        objective.backward()
        optimiser.step()

    return step


def _penalties(network: nn.Sequential, penalty: mf.Penalty) -> Tensor:
    """docs/theory.md, section 2, at equal masses; weights are m times smaller than mean-field ones."""
    first, *others = [block.weight for block in network if isinstance(block, nn.Conv2d)]
    readout = network[-1].weight
    assert isinstance(readout, Tensor)
    source = sum((kernel.flatten(2).norm(dim=2).mean(0) * kernel.shape[1]).square().mean() for kernel in others)
    return (
        penalty.source * source
        + penalty.readout * readout.square().sum() * readout.shape[1]
        + penalty.input * first.square().sum((1, 2, 3)).mean()
    )


def step_seconds(settings: Settings) -> dict[str, Any]:
    """Median CPU seconds per step of every contender, and of the blocks' ratios to "plain"."""
    makers = (library_step, lambda s: plain_step(s, penalised=False), lambda s: plain_step(s, penalised=True))
    steps = dict(zip(CONTENDERS, (make(settings) for make in makers)))
    blocks = alternating(steps, settings.warm_up, settings.repetitions, settings.block)
    medians = {name: statistics.median(seconds) for name, seconds in blocks.items()}
    ratio = statistics.median(own / plain for own, plain in zip(blocks["finite.train"], blocks["plain"]))
    fair = statistics.median(own / plain for own, plain in zip(blocks["finite.train"], blocks["plain with penalties"]))
    return {
        "seconds_per_step": medians,
        "ratio": ratio,
        "ratio_with_penalties": fair,
        "fast_enough": ratio <= STEP_ALLOWED,
    }


def work(cell: Cell) -> list[Row]:
    """Sleeps: the machine's other load does not count against the sweep."""
    began = time.perf_counter()
    time.sleep(cell["seconds"])
    return [{"number": cell["number"], "seconds": time.perf_counter() - began}]


def sweep_overhead(settings: Settings) -> dict[str, Any]:
    cells = [{"number": number, "seconds": settings.cell_seconds} for number in range(settings.cells)]
    began = time.perf_counter()
    sweep.run(work, [{"number": -k, "seconds": 0.0} for k in range(1, 2 * settings.jobs + 1)], jobs=settings.jobs)
    start_up, began = time.perf_counter() - began, time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        rows = sweep.run(work, cells, directory, jobs=settings.jobs)
    wall, own = time.perf_counter() - began, sum(row["seconds"] for row in rows)
    overhead = settings.jobs * wall / own - 1
    return {
        "start_up_seconds": start_up,
        "wall_seconds": wall,
        "cell_seconds": own,
        "overhead": overhead,
        "small_enough": overhead <= OVERHEAD_ALLOWED,
    }


def run(settings: Settings) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        figures = {"step": step_seconds(settings), "sweep": sweep_overhead(settings)}
    finally:
        torch.set_num_threads(threads)
    return {"benchmark": "widths", "settings": asdict(settings), "machine": machine.description(), **figures}
