"""What a training step and a sweep cost: a step of `finite.train` against plain torch, and a sweep against its cells'
own time.

The step has the full objective, penalties included, and SGD in the mean-field scaling.  The plain step is forward, the
same loss, backward and torch.optim.SGD over nn.Conv2d layers without biases; "plain with penalties" adds this library's
three penalties, written in torch.  All run in one process on one thread, in alternating blocks, in CPU seconds; the
medians of the blocks are compared.  A sweep's overhead is jobs x wall / (sum of the cells' own seconds) - 1, with its
workers already started; starting them is stated apart.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

import meanfield as mf
from benchmarks import plain
from benchmarks.blocks import Step, alternating, medians, ratios
from benchmarks.machine import one_thread
from benchmarks.options import BenchmarkOptions, Quick
from meanfield.bench import sweep
from meanfield.bench.options import MODEL, Dtype, Jobs, Samples, at_least, option
from meanfield.bench.sweep import Cell, Row
from meanfield.finite import training
from meanfield.finite.scaling import SCALINGS

STEP_ALLOWED, OVERHEAD_ALLOWED = 1.3, 0.05
CONTENDERS: tuple[str, ...] = ("finite.train", "plain", "plain with penalties")


@dataclass(frozen=True)
class Sizes:
    """Timed blocks, steps in one and before them; `cells` cells of `cell_seconds` in the sweep."""

    repetitions: int = 15
    block: int = 4
    warm_up: int = 4
    cells: int = 60
    cell_seconds: float = 0.25


DEFAULT, QUICK = Sizes(), Sizes(2, 1, 1, 4, 0.01)


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    samples: Samples = 64
    width: Annotated[int, option("Channels of both layers.", MODEL), at_least(1)] = 256
    dtype: Dtype = "float32"
    jobs: Jobs = 2
    quick: Quick = False

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.width,) * plain.DEPTH


def library_step(options: Options) -> Step:
    """One step of `finite.train`, without its records."""
    (task, _), generator = plain.problem(options.samples, options.dtype), torch.Generator().manual_seed(0)
    scaling = SCALINGS["mean_field"]
    chosen = training._Settings("sgd", scaling, None, 10**6, "constant")
    network = training._start(task, options.widths, generator, scaling, "random")
    run = training._Run(task, network, chosen, training._Batches(options.samples, None, True, generator), None)
    return lambda: training._step(run)


def plain_step(options: Options, *, penalised: bool) -> Step:
    task, _ = plain.problem(options.samples, options.dtype)
    torch.manual_seed(0)
    network = plain.network(task, options.widths)
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


def step_seconds(options: Options, sizes: Sizes) -> dict[str, Any]:
    """Median CPU seconds per step of every contender, and of the blocks' ratios to "plain"."""
    makers = (library_step, lambda o: plain_step(o, penalised=False), lambda o: plain_step(o, penalised=True))
    steps = dict(zip(CONTENDERS, (make(options) for make in makers)))
    blocks = alternating(steps, sizes.warm_up, sizes.repetitions, sizes.block)
    ratio, fair = (statistics.median(ratios(blocks, "finite.train", other)) for other in CONTENDERS[1:])
    return {
        "seconds_per_step": medians(blocks),
        "ratio": ratio,
        "ratio_with_penalties": fair,
        "fast_enough": ratio <= STEP_ALLOWED,
    }


def work(cell: Cell) -> list[Row]:
    """Sleeps: the machine's other load does not count against the sweep."""
    began = time.perf_counter()
    time.sleep(cell["seconds"])
    return [{"number": cell["number"], "seconds": time.perf_counter() - began}]


def sweep_overhead(jobs: int, sizes: Sizes) -> dict[str, Any]:
    cells = [{"number": number, "seconds": sizes.cell_seconds} for number in range(sizes.cells)]
    began = time.perf_counter()
    sweep.run(work, [{"number": -k, "seconds": 0.0} for k in range(1, 2 * jobs + 1)], jobs=jobs)
    start_up, began = time.perf_counter() - began, time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        rows = sweep.run(work, cells, directory, jobs=jobs)
    wall, own = time.perf_counter() - began, sum(row["seconds"] for row in rows)
    overhead = jobs * wall / own - 1
    return {
        "cells": sizes.cells,
        "start_up_seconds": start_up,
        "wall_seconds": wall,
        "cell_seconds": own,
        "overhead": overhead,
        "small_enough": overhead <= OVERHEAD_ALLOWED,
    }


def run(options: Options, report: Callable[[str], None]) -> dict[str, Any]:
    """Every figure of the benchmark, ready for JSON."""
    sizes = QUICK if options.quick else DEFAULT
    with one_thread():
        step = step_seconds(options, sizes)
        report("a step is measured")
        return {"step": step, "sweep": sweep_overhead(options.jobs, sizes)}
