"""`python -m benchmarks grafting`."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.command import run_benchmark
from benchmarks.grafting.measure import Options, run


def command(options: Options) -> None:
    """Measure what grafts on VGG-16 cost beside the matrix products that they need.

    Seconds of large layers, peak memory against the number of images, and the whole design matrix as a peer. About 12
    minutes; the study itself is `meanfield graft`.
    """
    run_benchmark("grafting", options, run, tables.grafting)
