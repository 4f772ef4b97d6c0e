"""Benchmarks of the library against plain torch; `python -m benchmarks flow`."""
