"""The page of the width study: what its tables say, in pictures, small tables and sentences that
carry their figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from meanfield.bench.sweep import Rows, groups, select
from meanfield.pages.html import assemble, figure, inline, plain_table, publish
from meanfield.studies.widths import summary
from meanfield.studies.widths.pictures import ARMS, DISTANCES, SAMPLING, pictures
from meanfield.studies.widths.summary import samples


def write(tables: Mapping[str, Rows], directory: str | Path, command: str) -> Path:
    """Write widths.html, summary.json and the pictures; returns the page."""
    found = summary.summary(tables)
    return publish(
        directory, "widths.html", pictures(tables), found, lambda figures: page(tables, found, figures, command)
    )


def page(tables: Mapping[str, Rows], found: Mapping[str, Any], figures: Mapping[str, bytes], command: str) -> str:
    images = {name: inline(content) for name, content in figures.items()}
    makers = {
        "sampled": _sampled_section,
        "trained": _trained_section,
        "trajectories": _trajectory_section,
        "statistics": _statistics_section,
        "coordinates": _coordinate_section,
        "kernel": _kernel_section,
    }
    sections = [make(found.get(part), tables, images) for part, make in makers.items() if part in tables]
    footer = f"Made by <code>{escape(command)}</code>; the tables are the CSV files beside this page."
    return assemble("Finite networks against the continuous one", escape(_claim(found)), sections, footer)


def _claim(found: Mapping[str, Any]) -> str:
    slopes = [row["slope"] for row in found.get("sampled", ()) if row["sampling"] == "masses" and row["slope"]]
    if not slopes:
        return "How networks of finite width approach the continuous network."
    low, high = min(slope.value for slope in slopes), max(slope.value for slope in slopes)
    return (
        f"Networks sampled from the continuous one approach it with slopes between {low:.2f} and {high:.2f} of the "
        f"squared error in the width; "
        "theory says -1."
    )


def _sampled_section(found: Any, _: Mapping[str, Rows], images: dict[str, str]) -> str:
    rows = [
        [
            row["depth"],
            row["activation"],
            SAMPLING[row["sampling"]],
            row["slope"],
            row["feature_slope"],
            f"{row['first']:.2g}",
            f"{row['last']:.2g}",
        ]
        for row in found
    ]
    head = [
        "L",
        "activation",
        "channels drawn",
        "slope of E|F_m - F|² (95%)",
        "slope of the feature error, last layer",
        "narrowest",
        "widest",
    ]
    text = (
        "Channels are drawn with replacement from a solved measure with both bounds. The intervals are bootstrapped "
        "over draws. The control draws "
        "all particles alike, whatever their mass, and must not converge. Without bounds the measures concentrate on "
        "few particles with large "
        "weights; second-order terms then bend the curve at these widths."
    )
    picture = figure(images, "sampled", "Squared error against the width", wide=True)
    return f"<h2>Sampled from the continuous network</h2><p>{text}</p>{picture}{plain_table(head, rows)}"


def _trained_section(found: Any, _: Mapping[str, Rows], images: dict[str, str]) -> str:
    rows = [
        [
            row["masses"],
            row["width"],
            row["seeds"],
            f"{row['least']:.2%}",
            f"{row['median']:.2%}",
            f"{row['most']:.2%}",
            f"{row['within_1%']:.0%}",
            f"{row['within_5%']:.0%}",
        ]
        for row in found["widths"]
    ]
    bound = (
        "no bound was searched for"
        if found["bound"] is None
        else f"the bound over all measures, best of its starts, is {found['bound']:.5f}"
    )
    refuted = (
        f"; {found['refuted_bounds']} bounds were refuted by a network below them" if found["refuted_bounds"] else ""
    )
    text = (
        f"The lowest J of any run, with growth or without, is {found['best']:.5f}; {bound}{refuted}. Excesses are "
        f"relative to the former."
    )
    head = ["masses", "width", "seeds", "least excess", "median", "most", "within 1%", "within 5%"]
    return (
        f"<h2>Trained from random "
        f"starts</h2><p>{text}</p>{figure(images, 'trained', 'Excess against the width')}{plain_table(head, rows)}"
    )


def _trajectory_section(found: Any, tables: Mapping[str, Rows], images: dict[str, str]) -> str:
    rates = [
        [ARMS[r["arm"]], "two seeds" if r["kind"] == "seeds" else "m and 2m", DISTANCES[r["distance"]], r["slope"]]
        for r in found["rates"]
        if r["slope"]
    ]
    widest = {arm: max(row["width"] for row in same) for (arm,), same in groups(found["ratios"], "arm").items()}
    ratios = [
        [
            ARMS[r["arm"]],
            r["width"],
            DISTANCES[r["distance"]],
            f"{r['time']:g}",
            f"{r['seeds']:.3f}",
            f"{r['times']:.3f}",
            f"{r['ratio']:.2f}",
        ]
        for r in found["ratios"]
        if r["width"] == widest[r["arm"]]
    ]
    text = (
        f"Distances between feature measures on held-out images, layer {found['layer']}, at equal flow time; slopes "
        f"at time {found['time']:g}. Two "
        "seeds share a trajectory if they are much closer to each other than one network is to itself at half the time."
    )
    parts = [
        f"<h2>Trajectories of features</h2><p>{text}</p>",
        figure(images, "trajectories", "Distances against the width", wide=True),
        plain_table(["training", "between", "distance", "slope in m (95%)"], rates),
        plain_table(["training", "width", "distance", "time 2t", "two seeds at 2t", "times t and 2t", "ratio"], ratios),
    ]
    parts += [
        figure(
            images,
            "times",
            "First network at one time, second at another: a ridge of small distances lies on the diagonal",
            wide=True,
        )
    ]
    if "seeds" in images:
        parts.append(figure(images, "seeds", "All pairs of seeds", wide=True))
    return "".join(parts)


def _statistics_section(_: Any, tables: Mapping[str, Rows], images: dict[str, str]) -> str:
    last = max(row["time"] for row in tables["statistics"])
    rows = []
    for (what, layer, width), same in sorted(
        groups(select(tables["statistics"], time=last), "of", "layer", "width").items()
    ):
        cells = [_spread([row[name] for row in same]) for name in ("mean", "variance", "kurtosis")]
        rows.append([what, layer, width, *cells])
    head = ["of", "layer", "width", "mean", "variance", "excess kurtosis"]
    text = f"Over particles and held-out images jointly, at flow time {last:g}; mean ± standard deviation over seeds."
    overlay = figure(images, "distributions", "Quantile functions of all seeds, by width", wide=True)
    return f"<h2>Moments and distributions</h2><p>{text}</p>{overlay}{plain_table(head, rows)}"


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3g} ± {np.std(values):.2g}"


def _coordinate_section(found: Any, _: Mapping[str, Rows], images: dict[str, str]) -> str:
    rows = [
        [
            row["scaling"],
            row["optimiser"],
            row["layer"],
            row["slope"],
            ", ".join(f"{m}: {size:.2g}" for m, size in row["sizes"].items()),
        ]
        for row in found
    ]
    text = (
        "Mean change of pre-activations and output since the start, penalties off. Slope 0 is flat: learning does not "
        "depend on the width. In the "
        "very first steps of SGD in the mean-field scaling only the last layer learns; what moves below it are "
        "fluctuations of order "
        "1/sqrt(m), and the check is flat only afterwards (coordinates.csv has every step)."
    )
    head = ["scaling", "optimiser", "layer", "slope in m (95%)", "change at each width"]
    return (
        f"<h2>Coordinate "
        f"check</h2><p>{text}</p>{figure(images, 'coordinates', 'Change of coordinates', wide=True)}{plain_table(head, rows)}"
    )


def _kernel_section(found: Any, tables: Mapping[str, Rows], images: dict[str, str]) -> str:
    medians = ", ".join(
        f"{np.median(errors):.3f} at m = {m}" for m, errors in samples(tables["kernel"], "relative_error").items()
    )
    text = (
        "The tangent kernel of one ReLU layer in the 1/sqrt(m) scaling against its closed form: median relative "
        "Frobenius error "
        f"{medians}; slope {found['slope']}."
    )
    return f"<h2>Tangent kernel</h2><p>{escape(text)}</p>{figure(images, 'kernel', 'Error of the empirical kernel')}"
