"""`python -m benchmarks device`."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.command import run_benchmark
from benchmarks.device.measure import Options, run


def command(options: Options) -> None:
    """Run the splitting at large sizes on a GPU, in float64 and float32, judged by the same outside scorer.

    Says so and ends where torch sees no GPU.
    """
    run_benchmark("device", options, run, tables.device)
