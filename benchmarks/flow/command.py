"""`python -m benchmarks flow`."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.command import run_benchmark
from benchmarks.flow.measure import Options, run


def command(options: Options) -> None:
    """Compare a step of the particle flow with a training step of nn.Conv2d layers.

    Digits, two layers of 3x3 kernels, one thread: CPU seconds a step in alternating blocks, peak memory in a process
    each, and the accuracy of both after as many steps.
    """
    run_benchmark("flow", options, run, tables.flow)
