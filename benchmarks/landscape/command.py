"""`python -m benchmarks landscape`."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.command import run_benchmark
from benchmarks.landscape.measure import Options, run


def command(options: Options) -> None:
    """Measure what a point of a loss surface costs beside functional_call and the package loss-landscapes.

    Digits, one thread, CPU milliseconds a point, and CPU seconds of a surface within a tolerance. loss-landscapes takes
    part where it is installed. A few minutes.
    """
    run_benchmark("landscape", options, run, tables.landscape)
