"""`python -m benchmarks growth`."""

from __future__ import annotations

from benchmarks import pictures, tables
from benchmarks.command import run_benchmark
from benchmarks.growth.measure import Options, run


def command(options: Options) -> None:
    """Measure how the splitting's time per iteration grows with particles, images and positions.

    Each is swept alone, in CPU seconds on one thread, beside the matrix products that an iteration contains, with
    fitted exponents. Then memory and time of freezing and solving with 500 to 4,000 images of MNIST (meanfield[data]).
    About 8 minutes.
    """
    run_benchmark("growth", options, run, tables.growth, pictures.growth)
