"""The large sizes on a GPU, in float64 and float32, judged by the same outside scorer; nothing to do without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import judge, machine, solve
from benchmarks.problems import Case

GAPS = {"float64": (1e-3, 1e-5), "float32": (1e-3,)}


@dataclass(frozen=True)
class Settings:
    cases: tuple[Case, ...] = (solve.STANDARD, solve.LARGE, Case(128, 8, (2048, 256)))
    max_seconds: float = 300.0
    fresh: bool = True


def settings(quick: bool = False, fresh: bool = True) -> Settings:
    return Settings((solve.TINY,), 10.0, fresh) if quick else Settings(fresh=fresh)


def run(chosen: Settings, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Every figure of the benchmark, ready for JSON; `skipped` says why there is none."""
    found: dict[str, Any] = {
        "benchmark": "device",
        "machine": machine.description(),
        "device": None,
        "cases": [],
        "skipped": None,
    }
    if not torch.cuda.is_available():
        found["skipped"] = "torch sees no GPU (torch.cuda.is_available() is False)"
        report(f"device benchmark skipped: {found['skipped']}")
        return found
    found["device"] = torch.cuda.get_device_name()
    found["cases"] = [measure(case, chosen, report) for case in chosen.cases]
    return found


def measure(case: Case, chosen: Settings, report: Callable[[str], None]) -> dict[str, Any]:
    """The splitting on the GPU in both dtypes at each gap; seconds are those of the wall clock."""
    limits = solve.Settings(max_seconds=chosen.max_seconds, fresh=chosen.fresh)
    runs = []
    for dtype, gaps in GAPS.items():
        for gap in gaps:
            runs.append({"dtype": dtype, **solve.one_run("splitting", case, gap, limits, device="cuda", dtype=dtype)})
            report(f"{case.name}, {dtype}, gap {gap:.0e}: {runs[-1]['status']}")
    return {"name": case.name, **case.to_dict(), "best_bound": judge.excess(runs), "runs": runs}
