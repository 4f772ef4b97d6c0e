"""The figures that the transfer study is for, from its tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from meanfield.bench.sweep import Row, Rows, groups, select
from meanfield.fusion.matching import MATCHINGS
from meanfield.rates import Interval, Slope, mean, slope
from meanfield.studies.transfer.tasks import REDUCED

NEAR = 0.02  # of accuracy: an account that is off by no more is right
GAPS = ("I", "R", "P")
TASK_NAMES = ("network", "tasks", "heads")
PAIRED = (REDUCED, "EWC", "replay", "joint training")
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


def fusion(rows: Rows) -> list[Row]:
    """Per network, number of parents and way: means over pairs of accuracy, loss and error, the largest difference of
    outputs to the ensemble's, and of matchings the largest that they make to a parent.
    """
    found = []
    for (network, parents, way, repaired), each in groups(rows, "network", "parents", "way", "repaired").items():
        row: Row = {"network": network, "parents": parents, "way": way, "repaired": repaired, "pairs": len(each)}
        row |= {"accuracy": share([one["held_out_accuracy"] for one in each])}
        row |= {"loss": mean([one["held_out_loss"] for one in each]), "error": size([one["error"] for one in each])}
        row["difference"] = max(one["difference"] for one in each)
        row["kept"] = max((one["kept"] for one in each if "kept" in one), default=None)
        found.append(row)
    return found


def reduced_unions(rows: Rows) -> list[Row]:
    """Per network and number of parents, pair by pair: accuracy of the reduced union less that of the ensemble and of
    the repaired matching that is best on the validation images, and its error over that of random channels.
    """
    found = []
    for (network, parents), each in groups(rows, "network", "parents").items():
        pairs = groups(each, "pair").values()
        reduced, ensemble, any_ = (
            [one for pair in pairs for one in select(pair, way=way)]
            for way in ("reduced union", "ensemble", "random channels")
        )
        best = [
            max((one for one in pair if one["repaired"] and one["way"] in MATCHINGS), key=_validation) for pair in pairs
        ]
        row: Row = {"network": network, "parents": parents, "pairs": len(pairs)}
        row |= {"to_ensemble": _above(reduced, ensemble), "to_matching": _above(reduced, best)}
        row["to_random"] = size([one["error"] / other["error"] for one, other in zip(reduced, any_)])
        found.append(row)
    return found


def reduction(rows: Rows) -> list[Row]:
    """Per share of one parent's widths, way and factor of the penalty: means over pairs of accuracy and error, pair by
    pair the accuracy less the ensemble's, and the error over that of elimination.  factor: "chosen" for the one of
    least error on the validation images, pair by pair.
    """
    found = []
    whole = select(rows, way="ensemble")
    judged = [row for row in rows if row["way"] != "ensemble"]
    for (part,), each in groups(judged, "share").items():
        plain = select(each, way="elimination")
        ways = {**groups(each, "way", "factor"), ("masses", "chosen"): _least(select(each, way="masses"))}
        for (way, factor), same in ways.items():
            row: Row = {"share": part, "way": way, "factor": factor, "pairs": len(same)}
            row |= {"accuracy": share([one["held_out_accuracy"] for one in same]), "to_ensemble": _above(same, whole)}
            row["error"] = size([one["held_out_error"] for one in same])
            ratios = [one["held_out_error"] / other["held_out_error"] for one, other in zip(same, plain)]
            row["to_elimination"] = size(ratios)
            found.append(row)
    return found


def _least(rows: Rows) -> list[Row]:
    return [min(same, key=lambda row: row["validation_error"]) for same in groups(rows, "pair").values()]


def _above(rows: Rows, others: Rows) -> Interval:
    """By how much the accuracy of one is above that of the other, pair by pair."""
    return mean([one["held_out_accuracy"] - other["held_out_accuracy"] for one, other in zip(rows, others)])


def _validation(row: Row) -> float:
    return row["validation_accuracy"]


def size(values: Sequence[float]) -> Interval:
    """Mean of figures that range over decades: geometric, unless one is zero."""
    return mean(values, geometric=min(values) > 0)


def tasks(rows: Rows) -> list[Row]:
    """Per network, division into tasks, kind of heads and method: means over seeds of what is known after all tasks, on
    held-out images; the strengths chosen, seed by seed, and how many of them are at an end of what was tried.
    """
    found = []
    for names, each in groups(rows, *TASK_NAMES, "method").items():
        row: Row = {**dict(zip((*TASK_NAMES, "method"), names)), "seeds": len(each)}
        known = [name for name in each[0] if name.startswith(("accuracy", "loss", "forgetting"))]
        row |= {name: _mean([one[name] for one in each], name) for name in known}
        row["chosen"] = [one["chosen"] for one in each if one["chosen"] is not None]
        row["at_an_end"] = sum(one["chosen"] in (*one["strengths"][:1], *one["strengths"][-1:]) for one in each)
        found.append({**row, "diverged": len(select(each, status="diverged"))})
    return found


def rivals(rows: Rows) -> list[Row]:
    """Per network, division into tasks and kind of heads: the accuracy of the union that was reduced with the last
    task's images alone minus that of another method, paired by seeds; separated: whether the interval leaves out zero,
    None for one seed.
    """
    found = []
    for names, each in groups(rows, *TASK_NAMES).items():
        own, *others = ({row["seed"]: row["accuracy"] for row in select(each, method=name)} for name in PAIRED)
        for rival, theirs in zip(PAIRED[1:], others):
            if own and own.keys() == theirs.keys():
                difference = mean([own[seed] - theirs[seed] for seed in own])
                separated = not difference.low <= 0 <= difference.high if difference.bounded else None
                pair = {"method": rival, "seeds": len(own), "difference": difference, "separated": separated}
                found.append({**dict(zip(TASK_NAMES, names)), **pair})
    return found


def share(values: Sequence[float]) -> Interval:
    """Mean of shares with Student's interval, as far as it lies in [0, 1]."""
    found = mean(values)
    return Interval(found.value, max(found.low, 0.0), min(found.high, 1.0)) if found.bounded else found


def _mean(values: Sequence[float], name: str) -> Interval:
    return share(values) if "accuracy" in name else mean(values)


def points(interval: Interval) -> str:
    """An accuracy, or a difference of two, in points."""
    value, low, high = (f"{100 * each:.1f}" for each in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})" if interval.bounded else value


def at(found: Sequence[Row], **wanted: Any) -> Row | None:
    """The one entry of a summary that is so, if there is one."""
    return next(iter(select(found, **wanted)), None)
