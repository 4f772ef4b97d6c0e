"""`python -m benchmarks`: a command for every benchmark, found in its folder."""

from __future__ import annotations

from collections.abc import Sequence

import benchmarks
from meanfield.bench.command import launch

TEXT = "Benchmarks of meanfield against plain torch, known optima and other solvers."


def main(arguments: Sequence[str] | None = None) -> None:
    launch(benchmarks.PROGRAM, TEXT, benchmarks, arguments)


if __name__ == "__main__":
    main()
