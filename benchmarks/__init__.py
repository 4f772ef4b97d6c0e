"""Benchmarks of the library against plain torch, known optima and other solvers; `python -m benchmarks --help`."""

PROGRAM = "python -m benchmarks"
