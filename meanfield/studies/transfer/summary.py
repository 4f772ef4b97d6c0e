"""The figures that the transfer study is for, from its tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from meanfield.bench.sweep import Row, Rows, groups, select
from meanfield.rates import Interval, Slope, mean, slope

NEAR = 0.02  # of accuracy: an account that is off by no more is right
GAPS = ("I", "R", "P")
FIGURES = ("train_accuracy", "train_loss", "held_out_accuracy", "held_out_loss")


def alphas(rows: Rows) -> list[Row]:
    """Per network, arm and alpha: means over trainings of accuracies and losses, with Student's intervals."""
    found = []
    for (network, arm, alpha), each in groups(rows, "network", "arm", "alpha").items():
        figures = {
            name: mean([row[name] for row in each]) for name in (*FIGURES, "memorised_accuracy") if name in each[0]
        }
        found.append({"network": network, "arm": arm, "alpha": alpha, "trainings": len(each), **figures})
    return found


def chosen(rows: Rows) -> list[Row]:
    """Per network and arm: alpha chosen on the validation images, training by training, and the accuracy on held-out
    ones there; beside it that of alpha = 1.
    """
    found = []
    judged = [row for row in rows if "validation_accuracy" in row]
    for (network, arm), each in groups(judged, "network", "arm").items():
        best = [max(same, key=lambda row: row["validation_accuracy"]) for same in groups(each, "seed").values()]
        ones = select(each, alpha=1.0)
        row: Row = {"network": network, "arm": arm, "alphas": [row["alpha"] for row in best]}
        row["accuracy"] = share([row["held_out_accuracy"] for row in best])
        row["at_one"] = share([row["held_out_accuracy"] for row in ones]) if ones else None
        found.append(row)
    return found


def regimes(rows: Rows) -> list[Row]:
    """Per network and gap: its mean absolute value, the interval over trainings; the largest; in how many cells it is
    within NEAR, and in how many zero lies in its own interval; below which ratio |theta_0| / |alpha Delta| all cells
    are within NEAR.
    """
    found = []
    for (network,), each in groups(rows, "network").items():
        for gap in GAPS:
            if gap in each[0]:
                found.append({"network": network, "gap": gap, **_gap(each, gap)})
    return found


def _gap(rows: Rows, gap: str) -> Row:
    trainings = groups(rows, "width", "scale", "epochs", "seed").values()
    near = [row for row in rows if abs(row[gap]) <= NEAR]
    far = [row["ratio"] / row["alpha"] for row in rows if abs(row[gap]) > NEAR]
    return {
        "cells": len(rows),
        "trainings": len(trainings),
        "mean": mean([fmean(abs(row[gap]) for row in each) for each in trainings]),
        "largest": max(abs(row[gap]) for row in rows),
        "near": len(near),
        "zero_inside": sum(row[f"{gap}_low"] <= 0 <= row[f"{gap}_high"] for row in rows),
        "near_below_ratio": min(far) if far else None,
    }


def distances(rows: Rows) -> list[Row]:
    """Per scaling, depth and arm: slope of the mean squared distance over the width, and what it is at the largest."""
    found: list[Row] = []
    for (scaling, depth, arm), each in groups(rows, "scaling", "depth", "arm").items():
        by_width = {width: same for (width,), same in groups(each, "width").items()}
        samples = [[row["error"] for row in same] for same in by_width.values()]
        fitted: Slope | None = slope(list(by_width), samples) if len(by_width) > 1 else None
        last = mean([row["error"] for row in by_width[max(by_width)]])
        found.append({"scaling": scaling, "depth": depth, "arm": arm, "slope": fitted, "error": last})
    return found


def steps(rows: Rows) -> list[Row]:
    """Per network and rule: means over trainings."""
    found = []
    for (network, rule), each in groups(rows, "network", "rule").items():
        row: Row = {"network": network, "rule": rule, "trainings": len(each)}
        row |= {name: share([one[name] for one in each]) for name in ("train_accuracy", "held_out_accuracy")}
        row["agreement"] = mean([one["agreement"] for one in each]) if "agreement" in each[0] else None
        row["apart"] = max(one["apart"] for one in each) if "apart" in each[0] else None
        found.append(row)
    return found


def share(values: Sequence[float]) -> Interval:
    """Mean of shares with Student's interval, as far as it lies in [0, 1]."""
    found = mean(values)
    return Interval(found.value, max(found.low, 0.0), min(found.high, 1.0)) if found.bounded else found


def _mean(values: Sequence[float], name: str) -> Interval:
    return share(values) if name.endswith("accuracy") else mean(values)


def points(interval: Interval) -> str:
    """An accuracy, or a difference of two, in points."""
    value, low, high = (f"{100 * each:.1f}" for each in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})" if interval.bounded else value


def at(found: Sequence[Row], **wanted: Any) -> Row | None:
    """The one entry of a summary that is so, if there is one."""
    return next(iter(select(found, **wanted)), None)
