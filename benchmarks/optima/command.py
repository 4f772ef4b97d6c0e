"""`python -m benchmarks optima`."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.command import run_benchmark
from benchmarks.optima.measure import Options, run


def command(options: Options) -> None:
    """Compare the main job with known optima, over several seeds.

    One layer against the exact optimum over all measures, two layers against the convex programs on the way and
    CLARABEL on the last one. About 4 minutes.
    """
    run_benchmark("optima", options, run, tables.optima)
