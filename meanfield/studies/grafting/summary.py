"""The figures that the grafting study is for, from its tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations, product
from statistics import fmean
from typing import Any

from scipy.stats import spearmanr

from meanfield.bench.sweep import Row, Rows, groups, select
from meanfield.rates import Interval, mean

ROUNDING = 1e-30  # relative squared errors below it, of grafts on themselves, are drawn there
FIGURES = ("mmd", "sliced_wasserstein", "cka", "mean_difference", "log_variance_ratio")


def relative_accuracy(row: Row) -> float:
    """Accuracy of the graft over that of the host."""
    return row["accuracy"] / row["upper_accuracy"] if row["upper_accuracy"] > 0 else math.nan


def starts(rows: Rows) -> list[Row]:
    """Intervals over pairs, per arm, method and layer, and whether the arm is separated from the trained donors."""
    found = []
    for (arm, method, layer, position), each in groups(rows, "arm", "method", "layer", "position").items():
        accuracy = mean([relative_accuracy(row) for row in each])
        error, output = (_mean_error([row[name] for row in each]) for name in ("error", "output_error"))
        found.append(
            {
                "arm": arm,
                "method": method,
                "layer": layer,
                "position": position,
                "pairs": len(each),
                "relative_accuracy": accuracy,
                "error": error,
                "output_error": output,
            }
        )
    for row in found:
        trained = next(iter(select(found, arm="trained", method=row["method"], layer=row["layer"])), None)
        row["accuracy_separated"] = trained is not None and trained["relative_accuracy"].above(row["relative_accuracy"])
        row["error_separated"] = trained is not None and row["output_error"].above(trained["output_error"])
    return found


def _mean_error(errors: Sequence[float]) -> Interval:
    """Geometric; hosts that are constant at the layer have no relative error and are left out."""
    known = [max(error, ROUNDING) for error in errors if math.isfinite(error)]
    return mean(known, geometric=True) if known else Interval(math.nan, math.nan, math.nan)


def class_errors(rows: Rows) -> list[Row]:
    """Per layer, geometric means over hosts."""
    return [
        {"layer": layer, "position": position, "error": _mean_error([row["class_error"] for row in each])}
        for (layer, position), each in groups(rows, "layer", "position").items()
    ]


def matrix(rows: Rows, lower: str, upper: str) -> list[Row]:
    """Means over pairs and layers from the middle up, per arm, method and the two settings."""
    last = max(row["position"] for row in rows)
    found = []
    for (arm, method, below, above), each in groups(
        [row for row in rows if row["position"] > last / 2], "arm", "method", lower, upper
    ).items():
        figures = {
            "relative_accuracy": fmean(map(relative_accuracy, each)),
            "output_error": fmean(row["output_error"] for row in each),
        }
        found.append({"arm": arm, "method": method, lower: below, upper: above, **figures})
    return found


def after_start(rows: Rows) -> list[int]:
    """The epochs at which both ends are taken, the start left out; a ridge needs two."""
    return sorted({row["lower_epoch"] for row in rows if row["lower_epoch"] and row["upper_epoch"]})


def contrasts(rows: Rows) -> list[Row]:
    """How much closer two networks are at equal epochs than at different ones, once both epochs' own effects are gone.

    For epochs s < t and D = log distance: (D(s,t) + D(t,s) - D(s,s) - D(t,t)) / 2, a mean over s < t, epoch 0 left out,
    with an interval over pairs.  What depends on the donor's epoch alone, or the host's alone, cancels: 0 is no ridge.
    """
    kinds = [(method, "error") for method in ("least_squares", "transport")] + [("least_squares", "mmd")]
    found = []
    for (arm, layer), each in groups(rows, "arm", "layer").items():
        for method, figure in kinds:
            values = [_contrast(select(same, method=method), figure) for same in groups(each, "pair").values()]
            if arm != "self" and values and all(map(math.isfinite, values)):
                found.append(
                    {
                        "arm": arm,
                        "layer": layer,
                        "method": method,
                        "figure": figure,
                        "pairs": len(values),
                        "contrast": mean(values),
                    }
                )
    return found


def _contrast(rows: Rows, figure: str) -> float:
    logs = {(row["lower_epoch"], row["upper_epoch"]): math.log(max(row[figure], ROUNDING)) for row in rows}
    epochs = sorted({epoch for epoch, _ in logs} - {0})
    terms = [(logs[s, t] + logs[t, s] - logs[s, s] - logs[t, t]) / 2 for s, t in combinations(epochs, 2)]
    return fmean(terms) if terms else math.nan


def correlations(rows: Rows) -> list[Row]:
    """Spearman's rank correlation of distances with graft errors across pairs and arms, layer by layer; mean over
    layers.

    Rotated donors are a case of their own (a rotation changes every distance but CKA and no least squares) and donors
    equal to the host trivial: both are left out.
    """
    kept = [
        {**row, **_moment_distances(row)} for row in rows if row["arm"] in ("trained", "untrained", "permuted_labels")
    ]
    found = []
    for method, figure in product(dict.fromkeys(row["method"] for row in kept), FIGURES):
        by_layer = [_rank_correlation(each, figure) for each in groups(select(kept, method=method), "layer").values()]
        finite = [value for value in by_layer if math.isfinite(value)]
        if finite:
            spread = {"mean": fmean(finite), "least": min(finite), "most": max(finite)}
            found.append({"method": method, "distance": figure, "layers": len(finite), **spread})
    return found


def _moment_distances(row: Row) -> Row:
    """Of means in units of the host's standard deviation, of variances as a ratio."""
    ours, theirs = (max(row[f"features_{end}_variance"], 1e-300) for end in ("lower", "upper"))
    difference = abs(row["features_lower_mean"] - row["features_upper_mean"]) / math.sqrt(theirs)
    return {"mean_difference": difference, "log_variance_ratio": abs(math.log(ours / theirs))}


def _rank_correlation(rows: Rows, figure: str) -> float:
    kept = [row for row in rows if math.isfinite(row[figure]) and math.isfinite(row["error"])]
    distances, errors = [row[figure] for row in kept], [row["error"] for row in kept]
    if len(set(distances)) < 2 or len(set(errors)) < 2:
        return math.nan
    found: Any = spearmanr(distances, errors)
    return float(found.statistic)


def procedures(rows: Rows) -> list[Row]:
    """Per layer: accuracies in points, errors relative to each other, CPU seconds."""
    found = []
    for (layer,), each in groups(rows, "layer").items():
        squares, adam = select(each, method="least_squares"), select(each, method="adam")
        seconds = [fmean(row["cpu_seconds"] for row in kind) for kind in (squares, adam)]
        found.append(
            {
                "layer": layer,
                "accuracy_points": 100 * fmean(a["accuracy"] - s["accuracy"] for s, a in zip(squares, adam)),
                "fit_error": fmean(s["fit_error"] for s in squares),
                "adam_fit_error": fmean(a["fit_error"] for a in adam),
                "excess": fmean(a["fit_error"] / s["fit_error"] - 1 for s, a in zip(squares, adam)),
                "cpu_seconds": seconds[0],
                "adam_cpu_seconds": seconds[1],
                "ratio": seconds[1] / seconds[0],
            }
        )
    return found


def layers_upwards(rows: Rows, column: str) -> list[str]:
    """The layers named in a column, lowest first: trained networks number theirs."""
    return sorted({row[column] for row in rows}, key=lambda name: (not name.startswith("conv"), len(name), name))


def geometric(values: Iterable[float]) -> float:
    # constant hosts have no relative error
    logs = [math.log(max(value, ROUNDING)) for value in values if math.isfinite(value)]
    return math.exp(fmean(logs)) if logs else math.nan
