"""How freezing and solving grow with images at full size: MNIST, two tanh layers of 64 with 2x2 average pooling.

Softmax, the penalties of the other benchmarks, random kernels.  Each size in a process of its own, on one thread: CPU
seconds of freezing and of the program to a relative gap, and the peak of memory over what images and network took.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks import problems
from benchmarks.machine import fresh_peak, peak_bytes
from meanfield.convex.program import ConvexProgram
from meanfield.solvers import splitting

TOLERANCE = 1e-5


def measure(order: dict[str, Any]) -> dict[str, Any]:
    """Of `images` images of `data`, with `width` particles a layer; for a process that has done nothing else."""
    problem, network = problems.all_classes(order["data"], order["images"], order["width"])
    before = fresh_peak()
    began = time.process_time()
    program = ConvexProgram.freeze(problem, network)
    frozen, freeze_peak = time.process_time(), peak_bytes() - before
    solved = splitting.solve(program, TOLERANCE)
    return {
        "rank": program.spaces[0].rank,
        "freeze_seconds": frozen - began,
        "freeze_peak_bytes": freeze_peak,
        "program_seconds": time.process_time() - frozen,
        "peak_bytes": peak_bytes() - before,
        "relative_gap": solved.relative_gap,
        "iterations": solved.history[-1]["iteration"] if solved.history else 0,
    }
