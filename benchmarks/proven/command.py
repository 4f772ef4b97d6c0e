"""`python -m benchmarks proven`."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.command import run_benchmark
from benchmarks.proven.measure import Options, run


def command(options: Options) -> None:
    """How much of J is proven over all measures, by size and against time.

    One ReLU layer with kernels of 4 to 9 entries, then two tanh layers with small kernels: each is solved, then proven.
    About a quarter of an hour with a minute for each proof.
    """
    run_benchmark("proven", options, run, tables.proven)
