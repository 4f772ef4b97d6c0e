"""`python -m benchmarks peers`."""

from __future__ import annotations

from benchmarks import tables
from benchmarks.command import run_benchmark
from benchmarks.peers.measure import Options, run


def command(options: Options) -> None:
    """Compare classifiers of the same images, from linear to continuous, in accuracy and CPU seconds.

    A linear classifier, a finite CNN trained by Adam, the tangent kernel of an infinitely wide convolution, the
    continuous CNN after its flow and after its convex program; one thread. Twenty CPU minutes; needs the extra
    meanfield[data] for mnist.
    """
    run_benchmark("peers", options, run, tables.peers)
