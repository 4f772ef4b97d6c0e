"""The share of J that is proven over all measures: digits 0 against 1, squared loss, average readout.

One ReLU layer: 100 digits of 8x8 pixels, penalties 1e-3.  Two tanh layers: images averaged to 4x4, or 8x8, and weak or
strong penalties.  Every network grows by searches; the proof begins with its multipliers.  Beside it stands the first
point of its curve, the bound at those multipliers before others are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch

import meanfield as mf
from benchmarks.options import BenchmarkOptions, Quick
from meanfield import certificates, data
from meanfield.bench.options import WORK, at_least, option

WEAK, STRONG = (1e-3, 1e-2), (3e-3, 3e-2)  # penalties of source and input, and of the readout


@dataclass(frozen=True)
class Case:
    """Layers of a kernel, images of side x side pixels, penalties."""

    layers: int
    kernel: tuple[int, int]
    images: int
    side: int
    penalties: tuple[float, float]


ONE_LAYER = [Case(1, kernel, 100, 8, (1e-3, 1e-3)) for kernel in ((2, 2), (2, 3), (3, 3))]
TWO_LAYERS = [
    Case(2, kernel, images, side, penalties)
    for kernel, images, side, penalties in (
        ((1, 2), 12, 4, STRONG),
        ((1, 2), 12, 4, WEAK),
        ((2, 2), 12, 4, STRONG),
        ((2, 2), 12, 4, WEAK),
        ((2, 2), 48, 4, STRONG),
        ((2, 2), 12, 8, STRONG),
    )
]


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    seconds: Annotated[int, option("Seconds of every proof.", WORK), at_least(1)] = 60
    quick: Quick = False


def problem_of(case: Case) -> mf.Problem:
    chosen = data.load("digits", classes=(0, 1), samples=case.images, pool=8 // case.side)
    conv = mf.Conv(case.kernel, activation="relu" if case.layers == 1 else "tanh")
    arch = mf.Architecture((1, case.side, case.side), (conv,) * case.layers, readout="average")
    source, readout = case.penalties
    penalty = mf.Penalty(source=source if case.layers > 1 else 0.0, readout=readout, input=source)
    return mf.Problem(arch, chosen.inputs.double(), chosen.targets("squared").double(), "squared", penalty)


def proved(case: Case, seconds: float, quick: bool) -> dict[str, Any]:
    """Solve and prove one case."""
    problem = problem_of(case)
    widths = (200,) if case.layers == 1 else (32, 16)
    effort: dict[str, Any] = (
        {"rounds": 1, "flow_steps": 30, "grow": 0} if quick else {"rounds": 6, "flow_steps": 600, "grow": 16}
    )
    solved = mf.solve(problem, widths, tolerance=1e-5, **effort)
    assert solved.multipliers is not None
    proof = certificates.prove(problem, solved.multipliers.output, solved.network, seconds)
    return {
        "layers": case.layers,
        "kernel": "x".join(map(str, case.kernel)),
        "images": case.images,
        "side": case.side,
        "penalties": list(case.penalties),
        "value": solved.value,
        "gap": solved.gap,
        "proof": proof.figures(),
    }


def run(options: Options, report: Callable[[str], None]) -> dict[str, Any]:
    """Every figure of the benchmark, ready for JSON."""
    cases = [ONE_LAYER[0], TWO_LAYERS[0]] if options.quick else [*ONE_LAYER, *TWO_LAYERS]
    rows = []
    for case in cases:
        row = proved(case, options.seconds, options.quick)
        rows.append(row)
        report(f"{row['layers']} layers, {row['kernel']} kernels: {row['proof']['share']:.2%} of J")
    return {"threads": torch.get_num_threads(), "rows": rows}
