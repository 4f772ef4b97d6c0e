"""The pictures of the grafting study."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from meanfield.bench.sweep import Row, Rows, Tables, groups, select
from meanfield.pages import plotting
from meanfield.pages.plotting import Band
from meanfield.studies.grafting import summary
from meanfield.studies.grafting.summary import geometric, layers_upwards

NAMES = {
    "trained": "trained",
    "untrained": "untrained",
    "permuted_labels": "trained on permuted labels",
    "rotated": "trained, rotated",
    "self": "the host itself",
}
DONORS = {
    "trained": "trained donors",
    "untrained": "untrained donors",
    "permuted_labels": "donors trained on permuted labels",
    "rotated": "rotated donors",
    "self": "hosts grafted onto themselves",
}
METHODS = {"least_squares": "least squares", "transport": "transport", "adam": "the authors' Adam"}
DISTANCES = {
    "mmd": "MMD",
    "sliced_wasserstein": "sliced Wasserstein",
    "cka": "linear CKA, debiased, a similarity",
    "mean_difference": "difference of means",
    "log_variance_ratio": "ratio of variances",
}
CONTROLS = ("untrained", "permuted_labels")
TRAJECTORY = {
    "error": ("least_squares", "error", "relative error at the layer, least squares"),
    "transport": ("transport", "error", "relative error at the layer, transport"),
    "mmd": ("least_squares", "mmd", "MMD of the features that enter the layer"),
}


def starts(tables: Tables) -> Any:
    return _profiles(tables["starts"])


def l2(tables: Tables) -> Any:
    return _profiles(tables["l2"])


def methods(tables: Tables) -> Any:
    found = summary.starts(tables["starts"])
    kinds = [method for method in METHODS if select(found, method=method)]
    panels = {
        METHODS[method]: _bands(select(found, method=method), "error", ("trained", *CONTROLS, "rotated"))
        for method in kinds
    }
    return plotting.bands(panels, "connecting layer", "relative error at the connection", log=list(panels), shared=True)


def classes(tables: Tables) -> Any:
    known = summary.class_errors(tables["classes"])
    ends = ([getattr(row["error"], end) for row in known] for end in ("value", "low", "high"))
    label = Band("the label alone", [row["layer"] for row in known], *ends)
    squares = summary.starts(select(tables.get("starts", ()), method="least_squares"))
    grafts = _bands(squares, "error", ("trained", "untrained"))
    return plotting.bands(
        {"least squares": [*grafts, label]},
        "connecting layer",
        "relative error at the connection",
        log=["least squares"],
    )


def later(tables: Tables) -> Any:
    rows = tables["starts"]
    layers, maps = layers_upwards(rows, "layer"), {}
    for arm in ("trained", *CONTROLS):
        cells = [
            {"layer": row["layer"], "at": at, "error": row[f"error_{at}"]}
            for row in select(rows, arm=arm, method="least_squares")
            for at in layers
            if math.isfinite(row.get(f"error_{at}", math.nan))
        ]
        if cells:
            maps[NAMES[arm]] = _matrix(cells, "layer", "at", layers, layers, "error")
    return plotting.heat_maps(maps, layers, "layer of the measurement", "connecting layer", "relative error", log=True)


def trajectory(tables: Tables, of: str) -> Any:
    """of: a name in TRAJECTORY."""
    rows, (method, name, label) = tables["trajectory"], TRAJECTORY[of]
    epochs, maps = sorted({row["lower_epoch"] for row in rows}), {}
    for layer, arm in product(layers_upwards(rows, "layer"), ("trained", "permuted_labels", "self")):
        if there := select(rows, method=method, layer=layer, arm=arm):
            maps[f"{layer}, {NAMES[arm]}"] = _matrix(there, "lower_epoch", "upper_epoch", epochs, epochs, name)
    pairs = [each[np.isfinite(each)].min() for title, each in maps.items() if not title.endswith(NAMES["self"])]
    lowest = float(min(pairs, default=0.0))  # a network is at no distance from itself: that would take all colours
    names = [str(epoch) for epoch in epochs]
    return plotting.heat_maps(maps, names, "epoch of the host", "epoch of the donor", label, log=True, lowest=lowest)


def ridge(tables: Tables) -> Any:
    """The contrast, drawn: what the epochs of donor and host each for themselves leave of the distance; None for too
    few epochs.
    """
    epochs, maps = summary.after_start(tables["trajectory"]), {}
    if len(epochs) < 2:
        return None
    rows = [row for row in tables["trajectory"] if row["lower_epoch"] and row["upper_epoch"]]
    deepest = layers_upwards(rows, "layer")[-1]
    for arm, (method, name, _) in product(("trained", "permuted_labels"), TRAJECTORY.values()):
        if there := select(rows, method=method, layer=deepest, arm=arm):
            logs = np.log(_matrix(there, "lower_epoch", "upper_epoch", epochs, epochs, name))
            left = logs - logs.mean(0, keepdims=True) - logs.mean(1, keepdims=True) + logs.mean()
            maps[f"{kind({'figure': name, 'method': method})},\n{NAMES[arm]}"] = np.exp(left)
    names, label = list(map(str, epochs)), f"factor beyond both epochs' own, {deepest}"
    return plotting.heat_maps(maps, names, "epoch of the host", "epoch of the donor", label, log=True)


def epochs(tables: Tables) -> Any:
    rows = tables["epochs"]
    layers, epochs, maps = layers_upwards(rows, "layer"), sorted({row["epoch"] for row in rows}), {}
    for moving, arm in product(("lower", "upper"), ("trained", "permuted_labels")):
        if there := select(rows, moving=moving, arm=arm):
            title = f"donor {NAMES[arm]},\n{'donor' if moving == 'lower' else 'host'} at the epoch"
            maps[title] = _matrix(there, "layer", "epoch", layers, epochs, "output_error")
    names = [str(epoch) for epoch in epochs]
    return plotting.heat_maps(
        maps, names, "epoch", "connecting layer", "relative error at the output", rows=layers, log=True, columns=2
    )


def across(tables: Tables) -> Any:
    rows = tables["across"]
    below, above = layers_upwards(rows, "lower_layer"), layers_upwards(rows, "layer")
    maps = {
        NAMES[arm]: _matrix(each, "lower_layer", "layer", below, above, "output_error")
        for (arm,), each in groups(rows, "arm").items()
    }
    return plotting.heat_maps(
        maps, above, "layer of the host", "layer of the donor", "relative error at the output", rows=below, log=True
    )


def strengths(tables: Tables) -> Any:
    """A panel per method; a start does not know its strength, so that untrained donors are one more line."""
    found = [
        {**row, "below": "untrained" if row["arm"] == "untrained" else row["lower_strength"]}
        for row in summary.matrix(tables["strengths"], "lower_strength", "upper_strength")
    ]
    places = sorted({row["upper_strength"] for row in found})
    lines = [*(["untrained"] if select(found, arm="untrained") else []), *places]
    maps = {
        METHODS[method]: _matrix(each, "below", "upper_strength", lines, places, "output_error")
        for (method,), each in groups(found, "method").items()
    }
    return _crossed("strength", maps, lines, places)


def widths(tables: Tables) -> Any:
    """A panel per method and arm."""
    found = summary.matrix(tables["widths"], "lower_width", "upper_width")
    places = sorted({row["upper_width"] for row in found})
    maps = {
        f"{METHODS[method]}, {arm}": _matrix(each, "lower_width", "upper_width", places, places, "output_error")
        for (method, arm), each in groups(found, "method", "arm").items()
    }
    return _crossed("width", maps, places, places)


def _crossed(name: str, maps: Mapping[str, np.ndarray], lines: Sequence[Any], columns: Sequence[Any]) -> Any:
    """Matrices of a setting of the donor (lines) and of the host (columns)."""
    texts, ticks = ([each if isinstance(each, str) else f"{each:g}" for each in ends] for ends in (lines, columns))
    return plotting.heat_maps(
        maps,
        ticks,
        f"{name} of the host",
        f"{name} of the donor",
        "mean relative error at the output",
        rows=texts,
        log=True,
        numbers=True,
        columns=2,
    )


def _profiles(rows: Rows) -> Any:
    found = summary.starts(select(rows, method="least_squares"))
    shown = {"relative_accuracy": "accuracy of the graft / of its host", "output_error": "relative error at the output"}
    panels = {title: _bands(found, name, ("trained", *CONTROLS)) for name, title in shown.items()}
    return plotting.bands(panels, "connecting layer", log=[shown["output_error"]])


def _bands(found: Rows, name: str, arms: Iterable[str]) -> list[Band]:
    shown = {arm: sorted(select(found, arm=arm), key=lambda row: row["position"]) for arm in arms}
    return [
        Band(
            NAMES[arm],
            [row["layer"] for row in each],
            *([getattr(row[name], end) for row in each] for end in ("value", "low", "high")),
        )
        for arm, each in shown.items()
        if each
    ]


def _matrix(rows: Rows, down: str, across: str, lines: Sequence[Any], columns: Sequence[Any], name: str) -> np.ndarray:
    """Geometric means, NaN where there is nothing."""
    found = np.full((len(lines), len(columns)), np.nan)
    for (line, column), each in groups(rows, down, across).items():
        found[lines.index(line), columns.index(column)] = geometric(row[name] for row in each)
    return found


def kind(row: Row) -> str:
    return "MMD of features" if row["figure"] == "mmd" else f"error of {METHODS[row['method']]}"
