"""The pictures of the transfer study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meanfield.bench.sweep import Row, Rows, Tables, groups, select
from meanfield.pages import plotting
from meanfield.pages.plotting import Band, Bar, Curve, Track
from meanfield.pages.words import two
from meanfield.studies.transfer import summary
from meanfield.studies.transfer.widths import ARMS as PARTICLE_ARMS

ARMS = {
    "arms": ("own start", "fresh start", "zero start", "trained, scaled", "literal noise", "predicted"),
    "controls": (
        "fresh start",
        "shuffled",
        "layers shuffled apart",
        "permuted labels",
        "noise as start",
        "noise as displacement",
    ),
    "sums": ("own start", "fresh start", "start added back", "two trained"),
}
FIGURES = {
    "held_out_accuracy": "accuracy, held out",
    "held_out_loss": "loss, held out",
    "train_accuracy": "accuracy, training images",
    "train_loss": "training loss",
}
GAPS = {
    "I": "I: own start - fresh start",
    "R": "R: fresh start - literal noise",
    "P": "P: fresh start - predicted",
}
HEADS = {"task": "a head per task", "one": "one head for all"}
CORNER = (90.0, 100.5)  # of both accuracies, %
AVERAGES = {
    "average": "average",
    "weights": "weight matching",
    "activations": "activation matching",
    "transport": "transport",
}
FROM_TWO = ("ensemble", "reduced union", "random channels")
SCALINGS = {"mean_field": "mean-field scaling", "standard": "standard scaling"}


def alphas(tables: Tables, arms: str, figure: str) -> Any:
    """A figure over alpha, a panel per network."""
    found = [row for row in summary.alphas(tables["alphas"]) if figure in row]
    panels = {
        network: [_band(select(each, arm=arm), arm, figure) for arm in ARMS[arms] if select(each, arm=arm)]
        for (network,), each in groups(found, "network").items()
    }
    log = list(panels) if figure.endswith("loss") else []
    return plotting.bands(panels, "alpha", FIGURES[figure], log=log)


def _band(rows: Rows, arm: str, figure: str) -> Band:
    values = [row[figure] for row in rows]
    places = [f"{row['alpha']:g}" for row in rows]
    return Band(arm, places, *([getattr(each, end) for each in values] for end in ("value", "low", "high")))


def gaps(tables: Tables) -> Any:
    """I, R and P over |theta_0| / |Delta|, a point per cell."""
    panels, rows = {}, tables["regimes"]
    for gap, title in GAPS.items():
        there = [row for row in rows if gap in row]
        if there:
            panels[title] = {
                f"{network}, alpha = {alpha:g}": [(row["ratio"], 100 * row[gap]) for row in each]
                for (network, alpha), each in groups(there, "network", "alpha").items()
            }
    ratio = "|theta_0| / |Delta|"
    return plotting.scatter(panels, dict.fromkeys(panels, ratio), "points of accuracy", log=list(panels))


def predicted(tables: Tables) -> Any:
    """What is said of a fresh start against what it does, a point per cell: predicted, literal noise, own start."""
    rows = [row for row in tables["regimes"] if "predicted" in row]
    if not rows:
        return None
    kinds = {"predicted": "predicted, no start drawn", "literal": "literal noise", "own": "own start"}
    panels = {
        title: {
            network: [(100 * row[name], 100 * row["fresh"]) for row in each]
            for (network,), each in groups(rows, "network").items()
        }
        for name, title in kinds.items()
    }
    axis = dict.fromkeys(panels, "accuracy by this account, %")
    return plotting.scatter(panels, axis, "accuracy on fresh starts, %", diagonal=True)


def widths(tables: Tables) -> Any:
    """Squared distance from the prediction over the width; None for one width alone."""
    rows = tables["widths"]
    if len({row["width"] for row in rows}) < 2:
        return None
    panels = {
        f"{SCALINGS[scaling]}, L = {depth}": [_curve(select(each, arm=arm), arm) for arm in PARTICLE_ARMS]
        for (scaling, depth), each in groups(rows, "scaling", "depth").items()
    }
    return plotting.rates(panels, "squared distance", guide=-1)


def _curve(rows: Rows, arm: str) -> Curve:
    samples: dict[int, Sequence[float]] = {
        width: [row["error"] for row in each] for (width,), each in groups(rows, "width").items()
    }
    return Curve(arm, samples, "mean")


def fusion(tables: Tables) -> Any:
    """Accuracy by way, a panel per network, errors against the ensemble beside it; two parents."""
    found = [row for row in summary.fusion(tables["fusion"]) if row["parents"] == 2 and row["way"] != "union"]
    panels = {network: [_bar(row) for row in each] for (network,), each in groups(found, "network").items()}
    return plotting.bars(panels, "accuracy, held out, %", columns=2)


def _bar(row: Row) -> Bar:
    """Grey parents, averages in one colour and repaired ones in another, what comes of two networks in blue."""
    look = 5 if row["way"].startswith("parent") else 0 if row["way"] in FROM_TWO else 2 if row["repaired"] else 3
    value, low, high = (100 * getattr(row["accuracy"], end) for end in ("value", "low", "high"))
    return Bar(way(row), value, low, high, two(row["error"].value) if row["way"] != "ensemble" else "", look)


def way(row: Row) -> str:
    """How a network was made of others, in words."""
    name: str = row["way"]
    return AVERAGES.get(name, name) + (", repaired" if row["repaired"] else "")


def reduction(tables: Tables) -> Any:
    """Error and accuracy of a reduced mixture over the share of one parent's widths, by the way to choose."""
    found = [row for row in summary.reduction(tables["reduction"]) if row["factor"] != "chosen"]
    panels = {}
    for figure, title, unit in (("error", "error against the ensemble", 1), ("accuracy", "accuracy, held out, %", 100)):
        panels[title] = [_over_shares(each, figure, unit) for each in groups(found, "way", "factor").values()]
    return plotting.bands(panels, "share of one parent's widths", log=["error against the ensemble"])


def _over_shares(rows: Rows, figure: str, unit: float) -> Band:
    places = [f"{row['share']:g}" for row in rows]
    ends = ([unit * getattr(row[figure], end) for row in rows] for end in ("value", "low", "high"))
    return Band(choice(rows[0]), places, *ends)


def choice(row: Row) -> str:
    """By what particles were chosen, in words."""
    if row["way"] != "masses":
        return {"elimination": "elimination", "random": "random channels"}[row["way"]]
    factor = row["factor"]
    return "masses, penalty chosen" if factor == "chosen" else f"masses, {factor:g} x default penalty"


def tasks(tables: Tables) -> Any:
    """Accuracy on the second task over that on the first, on the line from the network after the first one to the last
    one, means over seeds: the whole plane and, with a head per task, the corner where most ends lie; None without two
    tasks.
    """
    rows = [row for row in tables["tasks"] if "accuracy_2" in row and "accuracy_3" not in row]
    if not rows:
        return None
    panels, near = {}, {}
    for (network, heads), each in groups(rows, "network", "heads").items():
        title = f"{network}, {HEADS[heads]}"
        tracks = [_track(method, same) for (method,), same in groups(each, "method").items()]
        panels[title] = tracks
        if heads == "task":
            near[f"{title}, near 100%"] = CORNER
            panels[f"{title}, near 100%"] = tracks
    return plotting.tracks(panels, "accuracy on the first task, %", "accuracy on the second, %", near)


def _track(method: str, rows: Rows) -> Track:
    """Ends at the accuracies after both tasks, which without a line is all there is."""
    places = [
        100 * np.array([[*row[f"line_{task}"], row[f"accuracy_{task}"]] for row in rows]).mean(0) for task in (1, 2)
    ]
    return Track(method, *(each.tolist() for each in places))
