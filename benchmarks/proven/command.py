"""`python -m benchmarks proven`."""

from __future__ import annotations

from benchmarks import pictures, tables
from benchmarks.command import run_benchmark
from benchmarks.proven import page
from benchmarks.proven.measure import Options, run


def command(options: Options) -> None:
    """How much of J is proven over all measures, by size and against time.

    One ReLU layer with kernels of 4 to 9 entries, on digits and on MNIST (with the extra meanfield[data]), then two
    tanh layers with small kernels: each is solved, then proven. About half an hour with a minute for each proof.
    """
    if options.page is not None:
        page.read(options.page)
    found = run_benchmark("proven", options, run, tables.proven, pictures.proven)
    if options.page is not None:
        page.update(options.page, found)
