"""`python -m benchmarks widths`."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.command import run_benchmark
from benchmarks.widths.measure import Options, run


def command(options: Options) -> None:
    """Measure what a training step costs beside plain torch, and a sweep beside its cells.

    The step is one of `finite.train` on one thread; a sweep's overhead is that of its workers. About a minute; the
    study itself is `meanfield widths`.
    """
    run_benchmark("widths", options, run, tables.widths)
