"""The figures that the width study is for, from its tables."""

from __future__ import annotations

from itertools import product
from statistics import fmean, median
from typing import Any

from meanfield.bench.sweep import Row, Rows, groups, select
from meanfield.rates import Slope, slope

CONVERGED = {"1%": 0.01, "5%": 0.05}


def samples(rows: Rows, figure: str) -> dict[int, list[float]]:
    """Width -> values."""
    return {width: [row[figure] for row in each] for (width,), each in sorted(groups(rows, "width").items())}


def rate(rows: Rows, figure: str, statistic: str = "mean") -> Slope | None:
    """Fitted over all widths of the rows; None for one width."""
    by_width = samples(rows, figure)
    return slope(list(by_width), list(by_width.values()), statistic=statistic) if len(by_width) > 1 else None


def sampled_rates(rows: Rows) -> list[Row]:
    """Slopes of the squared error, of the excess and of the last layer's feature error, per depth, activation and
    sampling.
    """
    found = []
    for (depth, activation, sampling), each in groups(rows, "depth", "activation", "sampling").items():
        errors = samples(each, "squared_error")
        feature = rate(each, f"feature_error_{depth}") if depth > 1 else None
        found.append(
            {
                "depth": depth,
                "activation": activation,
                "sampling": sampling,
                "slope": rate(each, "squared_error"),
                "feature_slope": feature,
                "first": fmean(errors[min(errors)]),
                "last": fmean(errors[max(errors)]),
            }
        )
    return found


def trained_shares(rows: Rows, limits: Rows) -> dict[str, Any]:
    """Excess over the best known J by width, and the share of seeds within 1% and 5% of it.

    best: the lowest J of any run, with growth or without; bound: the highest lower bound of the searches that is not
    above it (bounds are the best of their starts, and one that a network goes below is refuted).
    """
    best = min(row["value"] for row in (*rows, *limits))
    bounds = [row["bound"] for row in limits if row["bound"] is not None]
    kept = [bound for bound in bounds if bound <= best]
    by_width = []
    for (masses, width), each in groups(rows, "masses", "width").items():
        excess = sorted(row["value"] / best - 1 for row in each)
        shares = {f"within_{name}": fmean([float(e <= level) for e in excess]) for name, level in CONVERGED.items()}
        by_width.append(
            {
                "masses": masses,
                "width": width,
                "seeds": len(each),
                "median": median(excess),
                "least": excess[0],
                "most": excess[-1],
                **shares,
            }
        )
    return {
        "best": best,
        "bound": max(kept, default=None),
        "refuted_bounds": len(bounds) - len(kept),
        "widths": by_width,
    }


def trajectory_rates(rows: Rows) -> dict[str, Any]:
    """Slopes over the width of the distance of two seeds and of widths m and 2m at the last time, last layer, per arm;
    and the ratio of the seeds' distance to that of times t and 2t, at the t where the latter is largest, largest
    width."""
    deepest = max(row["layer"] for row in rows)
    last = max(row["time"] for row in rows)
    rates, ratios = [], []
    for (arm,), each in groups(select(rows, layer=deepest), "arm").items():
        for kind, figure in product(("seeds", "doubled"), ("mmd", "sliced_wasserstein")):
            there = select(each, kind=kind, time=last)
            if there:
                rates.append({"arm": arm, "kind": kind, "distance": figure, "slope": rate(there, figure)})
        for (width,), same in groups(each, "width").items():
            ratios += [
                {"arm": arm, "width": width, "distance": figure, **_ratio(same, figure)}
                for figure in ("mmd", "sliced_wasserstein")
            ]
    return {"rates": rates, "ratios": ratios, "time": last, "layer": deepest}


def _ratio(rows: Rows, figure: str) -> Row:
    time = most_changed(rows, figure)
    moved, apart = (median([row[figure] for row in select(rows, kind=kind, time=time)]) for kind in ("times", "seeds"))
    return {"time": time, "seeds": apart, "times": moved, "ratio": apart / moved}


def most_changed(rows: Rows, figure: str) -> float:
    """The time at which networks have moved most since half that time (the first checkpoint has no half)."""
    moved = {
        time: median([row[figure] for row in each])
        for (time,), each in groups(select(rows, kind="times"), "time").items()
    }
    return max((time for time in moved if time >= 2 * min(moved)), key=lambda time: moved[time])


def coordinate_slopes(rows: Rows) -> list[Row]:
    """Log-log slope over the width of the change of every coordinate after the last step; 0 is flat."""
    last = max(row["step"] for row in rows)
    return [
        {
            "scaling": scaling,
            "optimiser": optimiser,
            "layer": layer,
            "slope": rate(each, "change"),
            "sizes": {width: fmean(values) for width, values in samples(each, "change").items()},
        }
        for (scaling, optimiser, layer), each in groups(
            select(rows, step=last), "scaling", "optimiser", "layer"
        ).items()
    ]
