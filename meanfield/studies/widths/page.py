"""The sections of the width study's page: sentences that carry their figures, pictures, small tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meanfield.bench.study import Found
from meanfield.bench.sweep import Tables, groups, select
from meanfield.pages.html import Figure, Section, Table
from meanfield.studies.widths.pictures import ARMS, DISTANCES, SAMPLING
from meanfield.studies.widths.summary import samples


def claim(found: Found) -> str:
    slopes = [row["slope"] for row in found.get("sampled", ()) if row["sampling"] == "masses" and row["slope"]]
    if not slopes:
        return "How networks of finite width approach the continuous network."
    low, high = min(slope.value for slope in slopes), max(slope.value for slope in slopes)
    return (
        f"Networks sampled from the continuous one approach it with slopes between {low:.2f} and {high:.2f} of the "
        "squared error in the width; theory says -1."
    )


def sampled(found: Found, tables: Tables) -> Section:
    text = (
        "Channels are drawn with replacement from a solved measure with both bounds. The intervals are bootstrapped "
        "over draws. The control draws all particles alike, whatever their mass, and must not converge. Without "
        "bounds the measures concentrate on few particles with large weights; second-order terms then bend the curve "
        "at these widths."
    )
    head = ["L", "activation", "channels drawn", "slope of E|F_m - F|² (95%)", "slope of the feature error, last layer"]
    rows = []
    for row in found["sampled"]:
        ends = [f"{row[end]:.2g}" for end in ("first", "last")]
        names = [row["depth"], row["activation"], SAMPLING[row["sampling"]]]
        rows.append([*names, row["slope"], row["feature_slope"], *ends])
    picture = Figure("sampled", "Squared error against the width", wide=True)
    return Section("Sampled from the continuous network", [text, picture, Table([*head, "narrowest", "widest"], rows)])


def trained(found: Found, tables: Tables) -> Section:
    known = found["trained"]
    bound = "no bound was searched for"
    if known["bound"] is not None:
        bound = f"the bound over all measures, best of its starts, is {known['bound']:.5f}"
    if known["refuted_bounds"]:
        bound += f"; {known['refuted_bounds']} bounds were refuted by a network below them"
    text = (
        f"The lowest J of any run, with growth or without, is {known['best']:.5f}; {bound}. Excesses are relative to "
        "the former."
    )
    head = ["masses", "width", "seeds", "least excess", "median", "most", "within 1%", "within 5%"]
    rows = []
    for row in known["widths"]:
        excesses = [f"{row[name]:.2%}" for name in ("least", "median", "most")]
        shares = [f"{row[name]:.0%}" for name in ("within_1%", "within_5%")]
        rows.append([row["masses"], row["width"], row["seeds"], *excesses, *shares])
    picture = Figure("trained", "Excess against the width")
    return Section("Trained from random starts", [text, picture, Table(head, rows)])


def trajectories(found: Found, tables: Tables) -> Section:
    known = found["trajectories"]
    text = (
        f"Distances between feature measures on held-out images, layer {known['layer']}, at equal flow time; slopes at "
        f"time {known['time']:g}. Two seeds share a trajectory if they are much closer to each other than one network "
        "is to itself at half the time."
    )
    rates = [
        [
            ARMS[row["arm"]],
            "two seeds" if row["kind"] == "seeds" else "m and 2m",
            DISTANCES[row["distance"]],
            row["slope"],
        ]
        for row in known["rates"]
        if row["slope"]
    ]
    widest = {arm: max(row["width"] for row in same) for (arm,), same in groups(known["ratios"], "arm").items()}
    ratios = []
    for row in [row for row in known["ratios"] if row["width"] == widest[row["arm"]]]:
        figures = [f"{row['seeds']:.3f}", f"{row['times']:.3f}", f"{row['ratio']:.2f}"]
        ratios.append([ARMS[row["arm"]], row["width"], DISTANCES[row["distance"]], f"{row['time']:g}", *figures])
    head = ["training", "width", "distance", "time 2t", "two seeds at 2t", "times t and 2t", "ratio"]
    ridge = "First network at one time, second at another: a ridge of small distances lies on the diagonal"
    return Section(
        "Trajectories of features",
        [
            text,
            Figure("trajectories", "Distances against the width", wide=True),
            Table(["training", "between", "distance", "slope in m (95%)"], rates),
            Table(head, ratios),
            Figure("times", ridge, wide=True),
        ],
    )


def gallery(found: Found, tables: Tables) -> Section:
    text = "Distances between the features of every two seeds, last layer, last time."
    return Section("Seed against seed", [text, Figure("seeds", "All pairs of seeds", wide=True)])


def statistics(found: Found, tables: Tables) -> Section:
    last = max(row["time"] for row in tables["statistics"])
    text = f"Over particles and held-out images jointly, at flow time {last:g}; mean ± standard deviation over seeds."
    rows = []
    for place, same in sorted(groups(select(tables["statistics"], time=last), "of", "layer", "width").items()):
        rows.append([*place, *(_spread([row[name] for row in same]) for name in ("mean", "variance", "kurtosis"))])
    head = ["of", "layer", "width", "mean", "variance", "excess kurtosis"]
    overlay = Figure("distributions", "Quantile functions of all seeds, by width", wide=True)
    return Section("Moments and distributions", [text, overlay, Table(head, rows)])


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3g} ± {np.std(values):.2g}"


def coordinates(found: Found, tables: Tables) -> Section:
    text = (
        "Mean change of pre-activations and output since the start, penalties off. Slope 0 is flat: learning does not "
        "depend on the width. In the very first steps of SGD in the mean-field scaling only the last layer learns; "
        "what moves below it are fluctuations of order 1/sqrt(m), and the check is flat only afterwards "
        "(coordinates.csv has every step)."
    )
    rows = [
        [row["scaling"], row["optimiser"], row["layer"], row["slope"], _by_width(row["sizes"])]
        for row in found["coordinates"]
    ]
    head = ["scaling", "optimiser", "layer", "slope in m (95%)", "change at each width"]
    picture = Figure("coordinates", "Change of coordinates", wide=True)
    return Section("Coordinate check", [text, picture, Table(head, rows)])


def _by_width(sizes: dict[int, Any]) -> str:
    return ", ".join(f"{m}: {size:.2g}" for m, size in sizes.items())


def kernel(found: Found, tables: Tables) -> Section:
    errors = samples(tables["kernel"], "relative_error").items()
    medians = ", ".join(f"{np.median(values):.3f} at m = {m}" for m, values in errors)
    text = (
        "The tangent kernel of one ReLU layer in the 1/sqrt(m) scaling against its closed form: median relative "
        f"Frobenius error {medians}; slope {found['kernel']['slope']}."
    )
    return Section("Tangent kernel", [text, Figure("kernel", "Error of the empirical kernel")])
