"""The figures that the landscape study is for, from its tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from statistics import fmean
from typing import Any

from meanfield.bench.sweep import Row, Rows, Tables, groups, select
from meanfield.rates import Interval, Slope, mean, rank_correlation, slope
from meanfield.studies.landscape.measure import SHARPNESS

CURVATURES = ("top", "gauss_newton", "rest")  # of the part `metric`
COMPARED = "cross_entropy"  # networks of another training loss are not on the same scale


def surfaces(rows: Rows) -> list[Row]:
    """Of every surface its figures, without the values."""
    kept = ("arm", "seed", "plane", "normalise", "error", "status", "evaluations", "checks", "least", "largest")
    return [{name: row[name] for name in kept if name in row} | {"share": share(row)} for row in rows]


def share(row: Row) -> float:
    """The largest estimated error of a loss, or of J, in units of its range on the grid, as the tolerance is."""
    found = []
    for figure, values in row["values"].items():
        if figure.endswith((" loss", " J")):
            spread = max(map(max, values)) - min(map(min, values))
            found.append(row["errors"][figure] / spread if spread > 0 else math.nan)
    return max(found, default=math.nan)


def measures(rows: Rows) -> list[Row]:
    """Per arm, means over seeds of every measure and of the losses, with Student's intervals."""
    found = []
    for (arm,), each in groups([row for row in rows if row.get("reached", True)], "arm").items():
        figures = {name: mean([row[name] for row in each]) for name in (*SHARPNESS, "train_loss", "held_out_loss")}
        found.append({"arm": arm, "networks": len(each), **figures})
    return found


def reach(rows: Rows) -> dict[str, Any]:
    """The networks at equal training loss: how equal it is, and who never has it."""
    passed = select(rows, reached=True)
    spread = max((abs(row["train_loss"] / row["target"] - 1) for row in passed), default=math.nan)
    left_out = groups(select(rows, reached=False), "arm")
    return {
        "targets": dict(sorted({row["trained_with"]: row["target"] for row in rows}.items())),
        "networks": len(passed),
        "largest_deviation": spread,
        "left_out": {arm: len(each) for (arm,), each in left_out.items()},
    }


def correlations(tables: Tables) -> list[Row]:
    """Spearman's rank correlation of every measure with held-out loss and with the strength of the l2 penalty, at the
    end of training and at equal training loss, over the same networks.

    Networks of one arm are not independent: with held-out loss whole arms are redrawn for the interval; on the l2
    ladder networks are.
    """
    found = []
    for when, part in (("end of training", "sharpness"), ("equal training loss", "matched")):
        rows = compared(tables, part)
        ladder = [row for row in rows if row["l2"] is not None]
        names = SHARPNESS if part == "matched" else (*SHARPNESS, "train_loss")
        for name, (against, which) in product(names, (("held_out_loss", rows), ("l2", ladder))):
            values, others = [row[name] for row in which], [row[against] for row in which]
            clusters = [row["arm"] for row in which] if against == "held_out_loss" else None
            interval = rank_correlation(values, others, clusters)
            kept = {"when": when, "measure": name, "against": against, "networks": len(which), "spearman": interval}
            found.append({**kept, **_without(which, name, against)})
    return found


def _without(rows: Rows, name: str, against: str) -> Row:
    """How much hangs on one arm: the ends of the correlations where any one is left out, and whether all of their
    intervals have a sign.
    """
    found = []
    for arm in {row["arm"] for row in rows}:
        rest = [row for row in rows if row["arm"] != arm]
        clusters = [row["arm"] for row in rest]
        found.append(rank_correlation([row[name] for row in rest], [row[against] for row in rest], clusters))
    values = [each.value for each in found]
    ends = [min(values, default=math.nan), max(values, default=math.nan)]
    return {"without_an_arm": ends, "without_any": bool(found) and all(map(says, found))}


def compared(tables: Tables, part: str) -> list[Row]:
    """The rows of a part that can be held against each other: of networks that were trained with one loss and, where
    that was measured, reach the common value of it.
    """
    passed = {(row["arm"], row["seed"]) for row in select(tables.get("matched", ()), reached=True)}
    return [
        row
        for row in tables.get(part, ())
        if row["trained_with"] == COMPARED
        and row["arm"] != "untrained"
        and ((row["arm"], row["seed"]) in passed or "matched" not in tables)
    ]


def says(interval: Interval) -> bool:
    """Whether the interval has a sign."""
    return interval.bounded and (interval.low > 0 or interval.high < 0)


def writings(rows: Rows) -> list[Row]:
    """Of the toy, per activation and writing: means over networks, and the mean loss in units of the network's own."""
    own = {(row["activation"], row["seed"]): row["mean_loss"] for row in select(rows, writing="as it is")}
    found = []
    for (activation, writing), each in groups(rows, "activation", "writing").items():
        ratios = [row["mean_loss"] / own[activation, row["seed"]] for row in each]
        found.append(
            {
                "activation": activation,
                "writing": writing,
                "networks": len(each),
                "difference": max(row["difference"] for row in each),
                "mean_loss": fmean(row["mean_loss"] for row in each),
                "ratio": mean(ratios, geometric=True),
                "least_ratio": min(ratios),
                "largest_ratio": max(ratios),
            }
        )
    return found


def curvatures(rows: Rows) -> dict[str, Any]:
    """Along random directions, against the trace over D and the ends of the spectrum."""
    random, first = select(rows, kind="random"), rows[0]
    (last,) = select(rows, kind="smallest eigenvalue")
    size = first["parameters"]
    trace = Interval.of(first, "trace")
    share = Interval(trace.value / size, trace.low / size, trace.high / size)
    return {
        "parameters": size,
        "random": mean([row["curvature"] for row in random]),
        "largest_random": max(row["curvature"] for row in random),
        "directions": len(random),
        "trace_over_size": share,
        "top": Interval.of(first, "top"),
        "smallest": Interval.of(first, "smallest"),
        "smallest_seen": _bend(last["axis"], last["values"]),
        "step": last["axis"][len(last["axis"]) // 2 + 1],
    }


def _bend(axis: Sequence[float], values: Sequence[float]) -> float:
    """The second difference quotient in the middle of a slice: what is seen of its curvature at that distance."""
    middle = len(axis) // 2
    return (values[middle - 1] - 2 * values[middle] + values[middle + 1]) / (axis[middle + 1] - axis[middle]) ** 2


def barriers(rows: Rows) -> list[Row]:
    """Per way, figure and width: means over pairs of the barrier and of the barrier in units of the chord."""
    found = []
    for (figure, how, width), each in groups(rows, "figure", "how", "width").items():
        found.append(
            {
                "figure": figure,
                "how": how,
                "width": width,
                "pairs": len(each),
                "barrier": mean([row["barrier"] for row in each]),
                "relative": mean([row["relative"] for row in each]),
            }
        )
    return found


def slopes(rows: Rows) -> list[Row]:
    """Of log barrier over log width, where every barrier is above zero."""
    found: list[Row] = []
    for (figure, how), each in groups(rows, "figure", "how").items():
        by_width = {width: [row["barrier"] for row in same] for (width,), same in groups(each, "width").items()}
        positive = all(value > 0 for values in by_width.values() for value in values)
        if len(by_width) > 1 and positive:
            fitted: Slope = slope(list(by_width), list(by_width.values()))
            found.append({"figure": figure, "how": how, "slope": fitted})
    return found


def in_metrics(rows: Rows) -> list[Row]:
    """Per metric and figure: means over draws by width, the slope of the logarithm, and that of the network drawn from
    (in the metric of the flow).
    """
    own, found = next(row for row in rows if row["width"] is None), []
    drawn = [row for row in rows if row["width"] is not None]
    for ((name,), each), figure in product(groups(drawn, "metric").items(), CURVATURES):
        by_width = {width: [abs(row[figure]) for row in same] for (width,), same in groups(each, "width").items()}
        values = {f"{width}": fmean(same) for width, same in by_width.items()}
        fitted = slope(list(by_width), list(by_width.values())) if len(by_width) > 1 else None
        limit = own[figure] if name == own["metric"] else None
        found.append({"metric": name, "figure": figure, "means": values, "slope": fitted, "source": limit})
    return found


def paths(rows: Rows) -> list[Row]:
    """Per arm: the share of the squared distance that the plane explains beside its null, and the largest factor
    between the loss of a checkpoint and the loss at its place on the plane.
    """
    found = []
    for (arm,), each in groups(rows, "arm").items():
        worst = max(each, key=lambda row: abs(_log_factor(row)))
        null = Interval.of(each[0], "null")
        figures = {"explained": each[0]["explained"], "null": null, "checkpoints": len(each)}
        place = {"epoch": worst["epoch"], "loss": worst["loss"], "loss_on_plane": worst["loss_on_plane"]}
        found.append({"arm": arm, **figures, **place, "factor": math.exp(abs(_log_factor(worst)))})
    return found


def _log_factor(row: Row) -> float:
    return math.log(row["loss_on_plane"] / row["loss"]) if row["loss"] > 0 and row["loss_on_plane"] > 0 else 0.0


def extent(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
