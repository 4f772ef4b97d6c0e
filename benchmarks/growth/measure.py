"""How the splitting's cost grows with particles, images and positions, each swept alone.

Time per iteration, in CPU seconds on one thread: the difference of two runs of different length through the public
`splitting.solve`, so that the start and the certificates cancel; medians over repetitions.  Beside it, in
the same process, the two matrix products that an iteration contains, (M_2 x M_1 S) (M_1 S x rank) and back, and the
float64 rate of one large square product.  Sizes are one program each, in a process of its own.  Exponents are slopes of
log time against log size with their standard errors.  `streamed` has the growth of a whole solve with images.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch

from benchmarks import isolated, problems
from benchmarks.contenders import WARM_UP
from benchmarks.machine import fresh_peak, peak_bytes
from benchmarks.options import BenchmarkOptions, InProcess, Quick, not_both
from benchmarks.problems import LARGE, Case
from meanfield.bench.options import WORK, flag, option
from meanfield.convex.program import ConvexProgram
from meanfield.solvers import splitting
from meanfield.validation import one_of

SHORT, LONG = 22, 38  # between them no block is rescaled and the acceleration's memory is full
FAST = 0.01  # seconds per iteration under which `long_if_fast` iterations are needed for a stable figure
NEVER = 1e-15  # a tolerance that no run meets
ITERATION_ALLOWED, RATE_REQUIRED = 1.3, 0.6
LARGE_FLOPS = 5e8  # per iteration: from here on the targets apply


@dataclass(frozen=True)
class Sizes:
    """The sweeps, each a list of cases and the size that grows; repetitions of each pair of runs; how products are
    timed.
    """

    particles: tuple[Case, ...] = tuple(Case(16, 4, (width, width // 2)) for width in (64, 128, 256, 512))
    images: tuple[Case, ...] = tuple(Case(images, 4, (256, 64)) for images in (16, 32, 64, 128))
    positions: tuple[Case, ...] = tuple(Case(16, side, (256, 64)) for side in (4, 6, 8, 11))
    streamed: tuple[dict[str, Any], ...] = tuple(
        {"data": "mnist", "images": images, "width": 64} for images in (500, 1000, 2000, 4000)
    )
    repetitions: int = 3
    square: int = 1024
    timed_seconds: float = 0.2
    long_if_fast: int = 158


DEFAULT = Sizes()
QUICK = Sizes(
    particles=(Case(4, 4, (8, 4)), Case(4, 4, (16, 8))),
    images=(Case(4, 4, (8, 4)), Case(8, 4, (8, 4))),
    positions=(Case(4, 4, (8, 4)), Case(4, 6, (8, 4))),
    streamed=tuple({"data": "digits", "images": images, "width": 4} for images in (12, 24)),
    repetitions=1,
    square=128,
    timed_seconds=0.01,
    long_if_fast=38,
)
EXTENDED = replace(DEFAULT, particles=(*DEFAULT.particles, LARGE))
GROWING: dict[str, Callable[[Case], float]] = {
    "particles": lambda case: case.widths[0],
    "images": lambda case: case.images,
    "positions": lambda case: case.side**2,
}
SWEPT = ("iteration_seconds", "products_seconds", "freeze_seconds")
STREAMED = ("freeze_seconds", "program_seconds", "peak_bytes")
SWEEPS = (*GROWING, "streamed")


def swept(value: Any, argument: str) -> tuple[str, ...]:
    return tuple(one_of(each, argument, SWEEPS) for each in value)


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    quick: Quick = False
    large: Annotated[bool, flag(f"End the sweep of particles with {LARGE.name} (several minutes, 2 GiB).", WORK)] = (
        False
    )
    sweep: Annotated[
        tuple[str, ...] | None,
        option(f"Only this one of {', '.join(SWEEPS)}; may be given again. Without it: all.", WORK, show_default=False),
        swept,
    ] = None
    in_process: InProcess = False

    def __post_init__(self) -> None:
        super().__post_init__()
        not_both(self.quick, self.large)

    @property
    def sizes(self) -> Sizes:
        return QUICK if self.quick else EXTENDED if self.large else DEFAULT


def run(options: Options, report: Callable[[str], None]) -> dict[str, Any]:
    """Every figure of the benchmark, ready for JSON."""
    sizes, sweeps, asked = options.sizes, {}, options.sweep or SWEEPS
    for name in filter(asked.__contains__, GROWING):
        rows = [row(name, case, sizes, not options.in_process, report) for case in getattr(sizes, name)]
        swept = [each for each in rows if each["case"] != LARGE.name and "failed" not in each]
        sweeps[name] = {"rows": rows, "exponents": exponents(swept)}
    found = {"sweeps": sweeps, "targets": targets(sweeps)}
    return found | ({"streamed": streamed(sizes, not options.in_process, report)} if "streamed" in asked else {})


def streamed(sizes: Sizes, fresh: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Freezing and solving at full size, per number of images, and exponents in it."""
    rows = []
    for order in sizes.streamed:
        size, name = {"size": order["images"]}, f"{order['images']} images of {order['data']}"
        try:
            rows.append({**size, **isolated.call("benchmarks.growth.streamed:measure", order, fresh=fresh)})
        except isolated.Failure as failure:
            rows.append({**size, "failed": str(failure)})
            report(f"{name}: failed: {failure}")
            continue
        report(f"{name}: frozen in {rows[-1]['freeze_seconds']:.1f} s, solved in {rows[-1]['program_seconds']:.1f} s")
    return {"rows": rows, "exponents": exponents([row for row in rows if "failed" not in row], STREAMED)}


def row(name: str, case: Case, sizes: Sizes, fresh: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """The figures of one size; a process that fails leaves its reason."""
    order = {
        "case": case.to_dict(),
        "repetitions": sizes.repetitions,
        "square": sizes.square,
        "timed_seconds": sizes.timed_seconds,
        "long_if_fast": sizes.long_if_fast,
    }
    size = {"size": GROWING[name](case), "case": case.name}
    try:
        found = {**size, **isolated.call("benchmarks.growth.measure:measure", order, fresh=fresh)}
    except isolated.Failure as failure:
        report(f"{name}: {case.name}: failed: {failure}")
        return {**size, "failed": str(failure)}
    report(
        f"{name}: {case.name}: {1e3 * found['iteration_seconds']:.2f} ms an iteration, {found['over_products']:.2f} "
        "times its products"
    )
    return found


def measure(order: dict[str, Any]) -> dict[str, Any]:
    """Times, rates and memory of one program; for a process that has done nothing else."""
    setting = problems.setting(Case.from_dict(order["case"]))
    _iterate(problems.program(WARM_UP), 3)
    before, began = fresh_peak(), time.process_time()
    program = ConvexProgram.freeze(*setting)
    freeze_seconds = time.process_time() - began
    fast = _iterate(program, SHORT) < FAST * SHORT
    grown = peak_bytes() - before
    space, products, rates, iterations = program.spaces[0], [], [], []
    long, least = order["long_if_fast"] if fast else LONG, order["timed_seconds"]
    for _ in range(order["repetitions"]):
        products.append(product_seconds(program.widths[1], space.right, least))
        rates.append(square_rate(order["square"], least))
        iterations.append((_iterate(program, long) - _iterate(program, SHORT)) / (long - SHORT))
    flops = 4.0 * program.widths[1] * space.right.numel()
    return _figures(
        space, flops, freeze_seconds, statistics.median(iterations), statistics.median(products), max(rates), grown
    )


def _figures(
    space: Any, flops: float, freeze_seconds: float, iteration: float, products: float, rate: float, grown: int
) -> dict[str, Any]:
    return {
        "rank": space.rank,
        "columns": space.right.shape[0],
        "flops": flops,
        "freeze_seconds": freeze_seconds,
        "peak_bytes": grown,
        "iteration_seconds": iteration,
        "products_seconds": products,
        "over_products": iteration / products,
        "matmul_gflops": rate / 1e9,
        "products_gflops": flops / products / 1e9,
        "iteration_gflops": flops / iteration / 1e9,
        "products_share": flops / products / rate,
        "iteration_share": flops / iteration / rate,
    }


def _iterate(program: ConvexProgram, iterations: int) -> float:
    """CPU seconds of a run of so many iterations, one certificate at its end."""
    began = time.process_time()
    splitting.solve(program, NEVER, max_iterations=iterations, check_every=iterations + 1)
    return time.process_time() - began


def product_seconds(rows: int, right: torch.Tensor, least: float) -> float:
    """CPU seconds of rows @ right and of its result's return through right, added to the rows; repeated for `least`
    seconds.
    """
    vectors = torch.randn(rows, right.shape[0], dtype=right.dtype, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(vectors)

    def both() -> None:
        torch.addmm(vectors, vectors @ right, right.T, alpha=-1, out=out)

    return _repeated(both, least)


def square_rate(side: int, least: float) -> float:
    """Floating-point operations a CPU second of a side x side float64 product."""
    matrix = torch.randn(side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(matrix)
    return 2 * side**3 / _repeated(lambda: torch.mm(matrix, matrix, out=out), least)


def _repeated(action: Callable[[], Any], least: float) -> float:
    action()
    began, count = time.process_time(), 0
    while time.process_time() - began < least:
        action()
        count += 1
    return (time.process_time() - began) / count


def exponents(rows: Sequence[dict[str, Any]], keys: Sequence[str] = SWEPT) -> dict[str, Any]:
    """Slope of the logarithm of each figure against that of the size, with standard errors."""
    return {key: slope([row["size"] for row in rows], [row[key] for row in rows]) for key in keys}


def slope(sizes: Sequence[float], times: Sequence[float]) -> dict[str, float | None]:
    """Least-squares slope in logarithms and its standard error (None below three points); over the upper half too."""
    pairs = [(math.log(size), math.log(value)) for size, value in zip(sizes, times) if value > 0]
    if len(pairs) < 2:
        return {"slope": None, "error": None, "upper": None}
    x, y = np.array(pairs).T
    fitted = np.polyfit(x, y, 1)
    error = None
    if len(pairs) > 2:
        error = float(np.sqrt(((y - np.polyval(fitted, x)) ** 2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum()))
    return {"slope": float(fitted[0]), "error": error, "upper": float((y[-1] - y[-2]) / (x[-1] - x[-2]))}


def targets(sweeps: dict[str, Any]) -> list[dict[str, Any]]:
    """The two targets, at the sizes where the products of an iteration are large."""
    large = [row for sweep in sweeps.values() for row in sweep["rows"] if row.get("flops", 0) >= LARGE_FLOPS]
    if not large:
        return []
    worst, slowest = max(row["over_products"] for row in large), min(row["products_share"] for row in large)
    return [
        {
            "text": f"an iteration takes at most {ITERATION_ALLOWED:g} times its two products",
            "worst": worst,
            "kept": worst <= ITERATION_ALLOWED,
        },
        {
            "text": f"the products run at {RATE_REQUIRED:.0%} or more of the measured float64 rate",
            "worst": slowest,
            "kept": slowest >= RATE_REQUIRED,
        },
    ]
