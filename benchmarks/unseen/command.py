"""`python -m benchmarks unseen`."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.command import run_benchmark
from benchmarks.unseen.measure import Options, run


def command(options: Options) -> None:
    """Ask how often twice the starts lower a best-of-K bound by more than it said.

    Searches for unseen features on small problems of two tanh layers, each made a second time with other draws. About
    10 CPU seconds a problem.
    """
    run_benchmark("unseen", options, run, tables.unseen)
