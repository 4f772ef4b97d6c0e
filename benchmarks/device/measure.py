"""The large sizes on a GPU, in float64 and float32, judged by the same outside scorer; nothing to do without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import judge
from benchmarks.contenders import one_run
from benchmarks.options import BenchmarkOptions, InProcess, Quick
from benchmarks.problems import LARGE, STANDARD, TINY, Case

GAPS = {"float64": (1e-3, 1e-5), "float32": (1e-3,)}


@dataclass(frozen=True)
class Sizes:
    """Cases, and the wall seconds that a run may take."""

    cases: tuple[Case, ...] = (STANDARD, LARGE, Case(128, 8, (2048, 256)))
    max_seconds: float = 300.0


DEFAULT, QUICK = Sizes(), Sizes((TINY,), 10.0)


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    quick: Quick = False
    in_process: InProcess = False


def run(options: Options, report: Callable[[str], None]) -> dict[str, Any]:
    """Every figure of the benchmark, ready for JSON; `skipped` says why there is none."""
    if not torch.cuda.is_available():
        skipped = "torch sees no GPU (torch.cuda.is_available() is False)"
        report(f"device benchmark skipped: {skipped}")
        return {"device": None, "cases": [], "skipped": skipped}
    sizes, fresh = QUICK if options.quick else DEFAULT, not options.in_process
    cases = [measure(case, sizes.max_seconds, fresh, report) for case in sizes.cases]
    return {"device": torch.cuda.get_device_name(), "cases": cases, "skipped": None}


def measure(case: Case, max_seconds: float, fresh: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """The splitting on the GPU in both dtypes at each gap; seconds are those of the wall clock."""
    runs = []
    for dtype, gap in ((dtype, gap) for dtype, gaps in GAPS.items() for gap in gaps):
        found = one_run("splitting", case, gap, max_seconds, fresh, device="cuda", dtype=dtype)
        runs.append({"dtype": dtype, **found})
        report(f"{case.name}, {dtype}, gap {gap:.0e}: {found['status']}")
    bound = judge.best_bound(runs)
    judge.write_excess(runs, bound)
    return {"name": case.name, **case.to_dict(), "best_bound": bound, "runs": runs}
