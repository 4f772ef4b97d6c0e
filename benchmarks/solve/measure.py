"""The splitting against cvxpy's CLARABEL and SCS on the same convex programs, judged by one outside scorer.

Every contender is run at a sweep of its own tolerances, which mean different things to different solvers; what is
compared is the relative duality gap that `judge` proves of each answer.  A contender's time at a gap is that of its
loosest tolerance whose answer meets the gap.  A sweep ends early once an answer meets the smallest gap asked for, or
once the time limit stops a run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import isolated, judge, machine, one_layer, problems
from benchmarks.contenders import CONTENDERS
from benchmarks.problems import Case

GAPS = (1e-3, 1e-4, 1e-5, 1e-6)
TARGET = 1e-5
SMALL = Case(16, 4, (64, 32))
STANDARD = Case(32, 4, (128, 64))
NEXT = Case(16, 4, (128, 64))
LARGE = Case(64, 8, (1024, 128))
SPEED_REQUIRED = {SMALL: 10.0, NEXT: 30.0}  # times faster than CLARABEL's solve
SECONDS_ALLOWED = {(STANDARD, TARGET): 10.0, (LARGE, 1e-3): 1200.0}  # of CPU: 10 s; 10 minutes on 2 cores
TINY = Case(6, 4, (6, 4))
TIGHTER = (1e-1, 1e-2)  # times the smallest gap: further tolerances of solvers whose tolerance is not the proven gap
NOT_RUN = "not run at this size, which would take it too long or too much memory"
GRACE = 600.0  # wall seconds beside the time limit: a factorisation cannot be interrupted


@dataclass(frozen=True)
class Settings:
    """Cases with the contenders that can do them; gaps; wall seconds a run may take; iterations between a curve's
    points.
    """

    cases: tuple[tuple[Case, tuple[str, ...]], ...] = ((SMALL, CONTENDERS), (STANDARD, ("splitting",)))
    gaps: tuple[float, ...] = GAPS
    max_seconds: float = 300.0
    curve_every: int = 20
    one_layer: tuple[one_layer.Case, ...] = one_layer.CASES
    fresh: bool = True


QUICK = Settings(cases=((TINY, CONTENDERS),), gaps=(1e-3,), max_seconds=10.0, one_layer=(one_layer.TINY,))
WITH_LARGE = ((SMALL, CONTENDERS), (STANDARD, ("splitting",)), (NEXT, CONTENDERS), (LARGE, ("splitting",)))
LARGE_GAPS = {LARGE: (1e-3,)}
LARGE_SECONDS = 1800.0


def settings(quick: bool = False, large: bool = False, fresh: bool = True, **given: Any) -> Settings:
    """The settings that the command line asks for; names given as None keep their defaults."""
    base = QUICK if quick else Settings()
    if large:
        base = replace(base, cases=WITH_LARGE, max_seconds=LARGE_SECONDS)
    return replace(base, fresh=fresh, **{name: value for name, value in given.items() if value is not None})


def run(chosen: Settings, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Every figure of the benchmark, ready for JSON."""
    return {
        "benchmark": "solve",
        "machine": machine.description(),
        "settings": {
            "gaps": chosen.gaps,
            "max_seconds": chosen.max_seconds,
            "fresh_processes": chosen.fresh,
            "penalty": asdict(problems.PENALTY),
        },
        "cases": [measure(case, contenders, chosen, report) for case, contenders in chosen.cases],
        "one_layer": [one_layer.measure(case, chosen.max_seconds, chosen.fresh, report) for case in chosen.one_layer],
    }


def measure(case: Case, contenders: Sequence[str], chosen: Settings, report: Callable[[str], None]) -> dict[str, Any]:
    """All contenders on one case: their runs, the best bound, and who takes how long to which gap."""
    gaps = LARGE_GAPS.get(case, chosen.gaps)
    runs = [run for name in contenders for run in sweep(name, case, gaps, chosen, report)]
    bound = judge.excess(runs)
    skipped = [{"contender": name, "reason": NOT_RUN} for name in CONTENDERS if name not in contenders]
    return {
        "name": case.name,
        **case.to_dict(),
        "constraints_per_feature": case.constraints,
        "unknowns_per_feature": case.columns,
        "best_bound": bound,
        "runs": runs,
        "skipped": skipped,
        "at_gap": [at_gap(case, runs, gap) for gap in gaps],
    }


def sweep(
    name: str, case: Case, gaps: Sequence[float], chosen: Settings, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One contender at tighter and tighter tolerances; the splitting's last run is repeated for its curve."""
    runs: list[dict[str, Any]] = []
    for tolerance in gaps if name == "splitting" else (*gaps, *(min(gaps) * share for share in TIGHTER)):
        runs.append(one_run(name, case, tolerance, chosen))
        report(_line(case, runs[-1]))
        if judge.meets(runs[-1], min(gaps)) or not _worth_going_on(runs[-1], chosen.max_seconds):
            break
    if name == "splitting":
        curve = one_run(name, case, min(gaps), chosen, check_every=chosen.curve_every)
        runs[-1]["history"] = curve["history"]
    return runs


def _worth_going_on(run: dict[str, Any], max_seconds: float) -> bool:
    return run["answered"] and run["wall_seconds"] < 0.95 * max_seconds


def one_run(name: str, case: Case, tolerance: float, chosen: Settings, **more: Any) -> dict[str, Any]:
    """One contender at one tolerance, judged; a process without an answer is a run with its reason as the status."""
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory, "answer.pt")
        order = {
            "contender": name,
            "case": case.to_dict(),
            "tolerance": tolerance,
            "max_seconds": chosen.max_seconds,
            "answer": str(answer),
            **more,
        }
        try:
            found = isolated.call(
                "benchmarks.contenders:run", order, timeout=chosen.max_seconds + GRACE, fresh=chosen.fresh
            )
        except isolated.Failure as failure:
            return {
                "contender": name,
                "tolerance": tolerance,
                "status": f"failed: {failure}",
                "answered": False,
                "feasible": False,
            }
        if not found["answered"]:
            return {**found, "feasible": False}
        return {**found, **judge.figures(judge.judge(problems.program(case), judge.Answer.load(answer)))}


def _line(case: Case, run: dict[str, Any]) -> str:
    if not run["answered"]:
        return f"{case.name}: {run['contender']} at {run['tolerance']:.0e}: {run['status']}"
    gap = "none" if run["relative_gap"] is None else f"{run['relative_gap']:.1e}"
    return (
        f"{case.name}: {run['contender']} at {run['tolerance']:.0e}: gap {gap} in {run['cpu_seconds']:.2f} CPU s "
        f"({run['status']})"
    )


def at_gap(case: Case, runs: Sequence[dict[str, Any]], gap: float) -> dict[str, Any]:
    """CPU seconds of every contender at a true gap, the splitting's speed against each, and the targets that apply."""
    reached: dict[str, dict[str, Any]] = {}
    for each in runs:
        if judge.meets(each, gap) and each["contender"] not in reached:
            reached[each["contender"]] = each
    seconds = {name: each["cpu_seconds"] for name, each in reached.items()}
    own = seconds.get("splitting")
    faster = {} if own is None else {name: took / own for name, took in seconds.items() if name != "splitting"}
    return {"gap": gap, "cpu_seconds": seconds, "times_faster": faster, "targets": _targets(case, gap, own, faster)}


def _targets(case: Case, gap: float, own: float | None, faster: dict[str, float]) -> list[dict[str, Any]]:
    targets: list[dict[str, Any]] = []
    if gap == TARGET and case in SPEED_REQUIRED:
        found, required = faster.get("CLARABEL"), SPEED_REQUIRED[case]
        targets.append(
            {
                "text": f"at least {required:g} times faster than CLARABEL's solve",
                "kept": found is not None and found >= required,
            }
        )
    if (case, gap) in SECONDS_ALLOWED:
        allowed = SECONDS_ALLOWED[case, gap]
        targets.append({"text": f"at most {allowed:g} CPU s", "kept": own is not None and own <= allowed})
    return targets
