"""The pictures of the width study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meanfield.bench.sweep import Rows, Tables, groups, select
from meanfield.pages import plotting
from meanfield.pages.plotting import Curve
from meanfield.rates import Slope
from meanfield.studies.widths import summary
from meanfield.studies.widths.summary import samples
from meanfield.studies.widths.trajectories import QUANTILES

DISTANCES = {"mmd": "MMD", "sliced_wasserstein": "sliced Wasserstein"}
SAMPLING = {"masses": "by mass", "uniform": "masses ignored (control)"}
ARMS = {
    "mean_field": "mean-field scaling",
    "ntk": "control: 1/sqrt(m) scaling",
    "permuted_labels": "control: second network on permuted labels",
    "shuffled_batches": "minibatches, reshuffled",
    "fixed_batches": "minibatches in fixed order",
    "noise": "with noise",
}


def sampled(tables: Tables) -> Any:
    rows = tables["sampled"]
    panels = {}
    for (depth,), each in groups(rows, "depth").items():
        panels[f"L = {depth}"] = [
            Curve(
                labelled(f"{activation}, {SAMPLING[sampling]}", summary.rate(drawn, "squared_error")),
                samples(drawn, "squared_error"),
                "mean",
            )
            for (activation, sampling), drawn in groups(each, "activation", "sampling").items()
        ]
    return plotting.rates(panels, "E |F_m - F|^2", guide=-1)


def trained(tables: Tables) -> Any:
    rows = tables["trained"]
    best = summary.trained_shares(rows, tables.get("limit", ()))["best"]
    curves = []
    for (masses,), each in groups(rows, "masses").items():
        excess = {m: [max(value / best - 1, 1e-4) for value in values] for m, values in samples(each, "value").items()}
        curves.append(Curve(f"masses {masses}", excess))
    return plotting.rates({"trained from random starts": curves}, "(J - best) / best")


def trajectories(tables: Tables) -> Any:
    rows = tables["trajectories"]
    deepest, last = max(row["layer"] for row in rows), max(row["time"] for row in rows)
    panels = {}
    for (arm,), each in groups(select(rows, layer=deepest), "arm").items():
        moved = _time_of_change(each)
        kinds = {
            "seeds": ("two seeds", last),
            "doubled": ("widths m and 2m", last),
            "times": (f"times {moved / 2:g} and {moved:g}", moved),
        }
        curves = []
        for kind, (label, time) in kinds.items():
            there = select(each, kind=kind, time=time)
            if there:
                curves.append(Curve(labelled(label, summary.rate(there, "mmd")), samples(there, "mmd")))
        panels[ARMS.get(arm, arm)] = curves
    return plotting.rates(panels, f"MMD of the features of layer {deepest}")


def _time_of_change(rows: Rows) -> float:
    """The time at which the widest network has moved most since half that time."""
    widest = max(row["width"] for row in rows)
    return summary.most_changed(select(rows, width=widest), "mmd")


def times(tables: Tables) -> Any:
    rows = tables["trajectories"]
    crossed = select(rows, kind="cross", arm="mean_field")
    times = sorted({row["time"] for row in crossed})
    maps = {
        f"width {width}": _matrix(each, "time", "other_time", times)
        for (width,), each in groups(crossed, "width").items()
    }
    chosen = dict(list(maps.items())[:: max(1, (len(maps) - 1) // 2)])
    return plotting.heat_maps(
        chosen,
        [f"{t:g}" for t in times],
        "flow time of the second network",
        "flow time of the first",
        "MMD, last layer",
    )


def seeds(tables: Tables) -> Any:
    rows = tables["gallery"]
    seeds = sorted({row["seed"] for row in rows})
    maps = {
        f"width {width}": _matrix(each, "seed", "other_seed", seeds) for (width,), each in groups(rows, "width").items()
    }
    return plotting.heat_maps(maps, [str(seed) for seed in seeds], "seed", "seed", "MMD, last layer, last time")


def _matrix(rows: Rows, first: str, second: str, places: Sequence[Any]) -> np.ndarray:
    found = np.full((len(places), len(places)), np.nan)
    for row in rows:
        found[places.index(row[first]), places.index(row[second])] = row["mmd"]
    return found


def distributions(tables: Tables) -> Any:
    rows = tables["statistics"]
    last = max(row["time"] for row in rows)
    panels = {}
    for (what, layer), each in groups(select(rows, time=last), "of", "layer").items():
        panels[f"{what} of layer {layer}"] = {
            f"width {width}": [[row[f"q{q:02d}"] for q in QUANTILES] for row in same]
            for (width,), same in groups(each, "width").items()
        }
    ordered = dict(sorted(panels.items(), key=lambda item: (item[0].startswith("features"), item[0])))
    return plotting.distributions(ordered, [q / 100 for q in QUANTILES])


def coordinates(tables: Tables) -> Any:
    rows = tables["coordinates"]
    last = max(row["step"] for row in rows)
    panels = {}
    for (scaling, optimiser), each in groups(select(rows, step=last), "scaling", "optimiser").items():
        panels[f"{scaling}, {optimiser}"] = [
            Curve(
                labelled(layer if layer == "output" else f"layer {layer}", summary.rate(same, "change")),
                samples(same, "change"),
                "mean",
            )
            for (layer,), same in groups(each, "layer").items()
        ]
    return plotting.rates(panels, f"mean change, {last} steps")


def kernel(tables: Tables) -> Any:
    rows = tables["kernel"]
    fitted = summary.rate(rows, "relative_error", "median")
    return plotting.rates(
        {"one ReLU layer": [Curve(labelled("empirical kernel", fitted), samples(rows, "relative_error"))]},
        "relative Frobenius error",
        -0.5,
    )


def labelled(label: str, slope: Slope | None) -> str:
    return label if slope is None else f"{label}, slope {slope}"
