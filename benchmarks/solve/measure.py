"""The splitting against cvxpy's CLARABEL and SCS on the same convex programs, judged by one outside scorer.

Every contender is run at a sweep of its own tolerances, which mean different things to different solvers; what is
compared is the relative duality gap that `judge` proves of each answer.  A contender's time at a gap is that of its
loosest tolerance whose answer meets the gap.  A sweep ends early once an answer meets the smallest gap asked for, or
once the time limit stops a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from benchmarks import judge, problems
from benchmarks.contenders import CONTENDERS, one_run
from benchmarks.options import BenchmarkOptions, InProcess, Quick, not_both
from benchmarks.problems import BOUNDED, LARGE, NEXT, SMALL, STANDARD, TINY, Case
from benchmarks.solve import one_layer
from meanfield.bench.options import WORK, flag, listing, option, spelled
from meanfield.validation import Misuse, positive

TARGET = 1e-5
SPEED_REQUIRED = {SMALL: 10.0, NEXT: 30.0}  # times faster than CLARABEL's solve
SECONDS_ALLOWED = {(STANDARD, TARGET): 10.0, (LARGE, 1e-3): 1200.0}  # of CPU: 10 s; 10 minutes on 2 cores
LARGE_GAPS = {LARGE: (1e-3,)}
TIGHTER = (1e-1, 1e-2)  # times the smallest gap: further tolerances of solvers whose tolerance is not the proven gap
NOT_RUN = "not run at this size, which would take it too long or too much memory"
CURVE_EVERY = 20  # iterations between the points of the splitting's curve


@dataclass(frozen=True)
class Sizes:
    """Cases with the contenders that can do them; gaps; wall seconds a run may take; cases of one layer."""

    cases: tuple[tuple[Case, tuple[str, ...]], ...] = (
        (SMALL, CONTENDERS),
        (BOUNDED, CONTENDERS),
        (STANDARD, ("splitting",)),
    )
    gaps: tuple[float, ...] = (1e-3, 1e-4, 1e-5, 1e-6)
    max_seconds: float = 300.0
    one_layer: tuple[one_layer.Case, ...] = one_layer.CASES


DEFAULT = Sizes()
QUICK = Sizes(((TINY, CONTENDERS),), (1e-3,), 10.0, (one_layer.TINY,))
EXTENDED = replace(DEFAULT, cases=(*DEFAULT.cases, (NEXT, CONTENDERS), (LARGE, ("splitting",))), max_seconds=1800.0)


def _gaps(value: Any, argument: str) -> tuple[float, ...]:
    """Falling."""
    if not isinstance(value, tuple) or not value or not all(0 < gap < 1 for gap in value):
        raise Misuse(argument, value, "must be numbers between 0 and 1, such as 1e-3,1e-4")
    return tuple(sorted(value, reverse=True))


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    quick: Quick = False
    large: Annotated[
        bool,
        flag(
            "Also the next size that CLARABEL can do (about an hour, mostly its compilation, and 3 GiB) and "
            f"{LARGE.name}.",
            WORK,
        ),
    ] = False
    gaps: Annotated[
        tuple[float, ...] | None,
        listing(
            "Relative gaps to reach, also the solvers' tolerances, separated by commas. Without it: "
            f"{spelled(DEFAULT.gaps)}; with --quick {spelled(QUICK.gaps)}.",
            WORK,
        ),
        _gaps,
    ] = None
    max_seconds: Annotated[
        float | None,
        option(
            f"Wall seconds that a run may take. Without it: {DEFAULT.max_seconds:g}; with --quick "
            f"{QUICK.max_seconds:g}, with --large {EXTENDED.max_seconds:g}.",
            WORK,
        ),
        positive,
    ] = None
    in_process: InProcess = False

    def __post_init__(self) -> None:
        super().__post_init__()
        not_both(self.quick, self.large)

    @property
    def sizes(self) -> Sizes:
        base = QUICK if self.quick else EXTENDED if self.large else DEFAULT
        return replace(base, gaps=self.gaps or base.gaps, max_seconds=self.max_seconds or base.max_seconds)


def run(options: Options, report: Callable[[str], None]) -> dict[str, Any]:
    """Every figure of the benchmark, ready for JSON."""
    sizes, fresh = options.sizes, not options.in_process
    return {
        "gaps": sizes.gaps,
        "max_seconds": sizes.max_seconds,
        "penalty": asdict(problems.PENALTY),
        "cases": [measure(case, contenders, sizes, fresh, report) for case, contenders in sizes.cases],
        "one_layer": [one_layer.measure(case, sizes.max_seconds, fresh, report) for case in sizes.one_layer],
    }


def measure(
    case: Case, contenders: Sequence[str], sizes: Sizes, fresh: bool, report: Callable[[str], None]
) -> dict[str, Any]:
    """All contenders on one case: their runs, the best bound, and who takes how long to which gap."""
    gaps = LARGE_GAPS.get(case, sizes.gaps)
    runs = [run for name in contenders for run in sweep(name, case, gaps, sizes.max_seconds, fresh, report)]
    bound = judge.best_bound(runs)
    judge.write_excess(runs, bound)
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
    name: str, case: Case, gaps: Sequence[float], max_seconds: float, fresh: bool, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One contender at tighter and tighter tolerances; the splitting's last run is repeated for its curve."""
    runs: list[dict[str, Any]] = []
    for tolerance in gaps if name == "splitting" else (*gaps, *(min(gaps) * share for share in TIGHTER)):
        runs.append(one_run(name, case, tolerance, max_seconds, fresh))
        report(_line(case, runs[-1]))
        if judge.meets(runs[-1], min(gaps)) or not _worth_going_on(runs[-1], max_seconds):
            break
    if name == "splitting":
        curve = one_run(name, case, min(gaps), max_seconds, fresh, check_every=CURVE_EVERY)
        runs[-1]["history"] = curve["history"]
    return runs


def _worth_going_on(run: dict[str, Any], max_seconds: float) -> bool:
    return run["answered"] and run["wall_seconds"] < 0.95 * max_seconds


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
