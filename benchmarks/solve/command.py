"""`python -m benchmarks solve`."""

from __future__ import annotations

from benchmarks import pictures, tables
from benchmarks.command import run_benchmark
from benchmarks.solve.measure import Options, run


def command(options: Options) -> None:
    """Compare the splitting with cvxpy's CLARABEL and SCS on the same convex programs.

    Every contender is run at a sweep of its own tolerances, in a process and on a thread of its own, and judged from
    outside: times are those to a proven relative gap. For one layer pyscnn takes part where it is installed. About 10
    minutes.
    """
    run_benchmark("solve", options, run, tables.solve, pictures.solve)
