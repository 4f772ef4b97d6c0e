"""The page of the width study: what its tables say, in pictures, small tables and sentences that carry their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from meanfield import plotting, width_study
from meanfield.plotting import Curve
from meanfield.rates import Slope
from meanfield.report import assemble, figure, inline, plain_table, publish
from meanfield.studies.trajectories import QUANTILES
from meanfield.sweep import Rows, groups, select
from meanfield.width_study import samples

DISTANCES = {"mmd": "MMD", "sliced_wasserstein": "sliced Wasserstein"}
SAMPLING = {"masses": "by mass", "uniform": "masses ignored (control)"}
ARMS = {
    "mean_field": "mean-field scaling", "ntk": "control: 1/sqrt(m) scaling", "permuted_labels": "control: second network on permuted labels",
    "shuffled_batches": "minibatches, reshuffled", "fixed_batches": "minibatches in fixed order", "noise": "with noise",
}  # fmt: skip


def write(tables: Mapping[str, Rows], directory: str | Path, command: str) -> Path:
    """Write widths.html, summary.json and the pictures; returns the page."""
    found = width_study.summary(tables)
    return publish(directory, "widths.html", pictures(tables), found, lambda figures: page(tables, found, figures, command))


def pictures(tables: Mapping[str, Rows]) -> dict[str, Any]:
    """Name -> Figure, for the tables there are."""
    makers = {
        "sampled": ("sampled", _sampled_picture), "trained": ("trained", _trained_picture), "trajectories": ("trajectories", _trajectory_picture),
        "times": ("trajectories", _times_picture), "seeds": ("gallery", _seeds_picture), "distributions": ("statistics", _distribution_picture),
        "coordinates": ("coordinates", _coordinate_picture), "kernel": ("kernel", _kernel_picture),
    }  # fmt: skip
    context = dict(tables)
    return {name: make(context[part], context) for name, (part, make) in makers.items() if context.get(part)}


def _sampled_picture(rows: Rows, _: Mapping[str, Rows]) -> Any:
    panels = {}
    for (depth,), each in groups(rows, "depth").items():
        panels[f"L = {depth}"] = [
            Curve(_with(f"{activation}, {SAMPLING[sampling]}", width_study.rate(drawn, "squared_error")), samples(drawn, "squared_error"), "mean")
            for (activation, sampling), drawn in groups(each, "activation", "sampling").items()
        ]
    return plotting.rates(panels, "E |F_m - F|^2", guide=-1)


def _trained_picture(rows: Rows, tables: Mapping[str, Rows]) -> Any:
    best = width_study.trained_shares(rows, tables.get("limit", ()))["best"]
    curves = []
    for (masses,), each in groups(rows, "masses").items():
        excess = {m: [max(value / best - 1, 1e-4) for value in values] for m, values in samples(each, "value").items()}
        curves.append(Curve(f"masses {masses}", excess))
    return plotting.rates({"trained from random starts": curves}, "(J - best) / best")


def _trajectory_picture(rows: Rows, _: Mapping[str, Rows]) -> Any:
    deepest, last = max(row["layer"] for row in rows), max(row["time"] for row in rows)
    panels = {}
    for (arm,), each in groups(select(rows, layer=deepest), "arm").items():
        moved = _time_of_change(each)
        kinds = {"seeds": ("two seeds", last), "doubled": ("widths m and 2m", last), "times": (f"times {moved / 2:g} and {moved:g}", moved)}
        curves = []
        for kind, (label, time) in kinds.items():
            there = select(each, kind=kind, time=time)
            if there:
                curves.append(Curve(_with(label, width_study.rate(there, "mmd")), samples(there, "mmd")))
        panels[ARMS[arm]] = curves
    return plotting.rates(panels, f"MMD of the features of layer {deepest}")


def _time_of_change(rows: Rows) -> float:
    """The time at which the widest network has moved most since half that time."""
    widest = max(row["width"] for row in rows)
    return width_study.most_changed(select(rows, width=widest), "mmd")


def _times_picture(rows: Rows, _: Mapping[str, Rows]) -> Any:
    crossed = select(rows, kind="cross", arm="mean_field")
    times = sorted({row["time"] for row in crossed})
    maps = {f"width {width}": _matrix(each, "time", "other_time", times) for (width,), each in groups(crossed, "width").items()}
    chosen = dict(list(maps.items())[:: max(1, (len(maps) - 1) // 2)])
    return plotting.heat_maps(chosen, [f"{t:g}" for t in times], "flow time of the second network", "flow time of the first", "MMD, last layer")


def _seeds_picture(rows: Rows, _: Mapping[str, Rows]) -> Any:
    seeds = sorted({row["seed"] for row in rows})
    maps = {f"width {width}": _matrix(each, "seed", "other_seed", seeds) for (width,), each in groups(rows, "width").items()}
    return plotting.heat_maps(maps, [str(seed) for seed in seeds], "seed", "seed", "MMD, last layer, last time")


def _matrix(rows: Rows, first: str, second: str, places: Sequence[Any]) -> np.ndarray:
    found = np.full((len(places), len(places)), np.nan)
    for row in rows:
        found[places.index(row[first]), places.index(row[second])] = row["mmd"]
    return found


def _distribution_picture(rows: Rows, _: Mapping[str, Rows]) -> Any:
    last = max(row["time"] for row in rows)
    panels = {}
    for (what, layer), each in groups(select(rows, time=last), "of", "layer").items():
        panels[f"{what} of layer {layer}"] = {
            f"width {width}": [[row[f"q{q:02d}"] for q in QUANTILES] for row in same] for (width,), same in groups(each, "width").items()
        }
    ordered = dict(sorted(panels.items(), key=lambda item: (item[0].startswith("features"), item[0])))
    return plotting.distributions(ordered, [q / 100 for q in QUANTILES])


def _coordinate_picture(rows: Rows, _: Mapping[str, Rows]) -> Any:
    last = max(row["step"] for row in rows)
    panels = {}
    for (scaling, optimiser), each in groups(select(rows, step=last), "scaling", "optimiser").items():
        panels[f"{scaling}, {optimiser}"] = [
            Curve(_with(layer if layer == "output" else f"layer {layer}", width_study.rate(same, "change")), samples(same, "change"), "mean")
            for (layer,), same in groups(each, "layer").items()
        ]
    return plotting.rates(panels, f"mean change, {last} steps")


def _kernel_picture(rows: Rows, _: Mapping[str, Rows]) -> Any:
    fitted = width_study.rate(rows, "relative_error", "median")
    return plotting.rates(
        {"one ReLU layer": [Curve(_with("empirical kernel", fitted), samples(rows, "relative_error"))]}, "relative Frobenius error", -0.5
    )


def _with(label: str, slope: Slope | None) -> str:
    return label if slope is None else f"{label}, slope {slope}"


def page(tables: Mapping[str, Rows], found: Mapping[str, Any], figures: Mapping[str, bytes], command: str) -> str:
    images = {name: inline(content) for name, content in figures.items()}
    makers = {
        "sampled": _sampled_section, "trained": _trained_section, "trajectories": _trajectory_section, "statistics": _statistics_section,
        "coordinates": _coordinate_section, "kernel": _kernel_section,
    }  # fmt: skip
    sections = [make(found.get(part), tables, images) for part, make in makers.items() if part in tables]
    footer = f"Made by <code>{escape(command)}</code>; the tables are the CSV files beside this page."
    return assemble("Finite networks against the continuous one", escape(_claim(found)), sections, footer)


def _claim(found: Mapping[str, Any]) -> str:
    slopes = [row["slope"] for row in found.get("sampled", ()) if row["sampling"] == "masses" and row["slope"]]
    if not slopes:
        return "How networks of finite width approach the continuous network."
    low, high = min(slope.value for slope in slopes), max(slope.value for slope in slopes)
    return (
        f"Networks sampled from the continuous one approach it with slopes between {low:.2f} and {high:.2f} of the squared error in the width; "
        "theory says -1."
    )


def _sampled_section(found: Any, _: Mapping[str, Rows], images: dict[str, str]) -> str:
    rows = [
        [row["depth"], row["activation"], SAMPLING[row["sampling"]], row["slope"], row["feature_slope"], f"{row['first']:.2g}", f"{row['last']:.2g}"]
        for row in found
    ]  # fmt: skip
    head = ["L", "activation", "channels drawn", "slope of E|F_m - F|² (95%)", "slope of the feature error, last layer", "narrowest", "widest"]
    text = (
        "Channels are drawn with replacement from a solved measure with both bounds. The intervals are bootstrapped over draws. The control draws "
        "all particles alike, whatever their mass, and must not converge. Without bounds the measures concentrate on few particles with large "
        "weights; second-order terms then bend the curve at these widths."
    )
    picture = figure(images, "sampled", "Squared error against the width", wide=True)
    return f"<h2>Sampled from the continuous network</h2><p>{text}</p>{picture}{plain_table(head, rows)}"


def _trained_section(found: Any, _: Mapping[str, Rows], images: dict[str, str]) -> str:
    rows = [
        [row["masses"], row["width"], row["seeds"], f"{row['least']:.2%}", f"{row['median']:.2%}", f"{row['most']:.2%}", f"{row['within_1%']:.0%}",
         f"{row['within_5%']:.0%}"] for row in found["widths"]
    ]  # fmt: skip
    bound = "no bound was searched for" if found["bound"] is None else f"the bound over all measures, best of its starts, is {found['bound']:.5f}"
    refuted = f"; {found['refuted_bounds']} bounds were refuted by a network below them" if found["refuted_bounds"] else ""
    text = f"The lowest J of any run, with growth or without, is {found['best']:.5f}; {bound}{refuted}. Excesses are relative to the former."
    head = ["masses", "width", "seeds", "least excess", "median", "most", "within 1%", "within 5%"]
    return f"<h2>Trained from random starts</h2><p>{text}</p>{figure(images, 'trained', 'Excess against the width')}{plain_table(head, rows)}"


def _trajectory_section(found: Any, tables: Mapping[str, Rows], images: dict[str, str]) -> str:
    rates = [
        [ARMS[r["arm"]], "two seeds" if r["kind"] == "seeds" else "m and 2m", DISTANCES[r["distance"]], r["slope"]]
        for r in found["rates"]
        if r["slope"]
    ]
    widest = {arm: max(row["width"] for row in same) for (arm,), same in groups(found["ratios"], "arm").items()}
    ratios = [
        [ARMS[r["arm"]], r["width"], DISTANCES[r["distance"]], f"{r['time']:g}", f"{r['seeds']:.3f}", f"{r['times']:.3f}", f"{r['ratio']:.2f}"]
        for r in found["ratios"] if r["width"] == widest[r["arm"]]
    ]  # fmt: skip
    text = (
        f"Distances between feature measures on held-out images, layer {found['layer']}, at equal flow time; slopes at time {found['time']:g}. Two "
        "seeds share a trajectory if they are much closer to each other than one network is to itself at half the time."
    )
    parts = [
        f"<h2>Trajectories of features</h2><p>{text}</p>", figure(images, "trajectories", "Distances against the width", wide=True),
        plain_table(["training", "between", "distance", "slope in m (95%)"], rates),
        plain_table(["training", "width", "distance", "time 2t", "two seeds at 2t", "times t and 2t", "ratio"], ratios),
    ]  # fmt: skip
    parts += [figure(images, "times", "First network at one time, second at another: a ridge of small distances lies on the diagonal", wide=True)]
    if "seeds" in images:
        parts.append(figure(images, "seeds", "All pairs of seeds", wide=True))
    return "".join(parts)


def _statistics_section(_: Any, tables: Mapping[str, Rows], images: dict[str, str]) -> str:
    last = max(row["time"] for row in tables["statistics"])
    rows = []
    for (what, layer, width), same in sorted(groups(select(tables["statistics"], time=last), "of", "layer", "width").items()):
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
        [row["scaling"], row["optimiser"], row["layer"], row["slope"], ", ".join(f"{m}: {size:.2g}" for m, size in row["sizes"].items())]
        for row in found
    ]
    text = (
        "Mean change of pre-activations and output since the start, penalties off. Slope 0 is flat: learning does not depend on the width. In the "
        "very first steps of SGD in the mean-field scaling only the last layer learns; what moves below it are fluctuations of order "
        "1/sqrt(m), and the check is flat only afterwards (coordinates.csv has every step)."
    )
    head = ["scaling", "optimiser", "layer", "slope in m (95%)", "change at each width"]
    return f"<h2>Coordinate check</h2><p>{text}</p>{figure(images, 'coordinates', 'Change of coordinates', wide=True)}{plain_table(head, rows)}"


def _kernel_section(found: Any, tables: Mapping[str, Rows], images: dict[str, str]) -> str:
    medians = ", ".join(f"{np.median(errors):.3f} at m = {m}" for m, errors in samples(tables["kernel"], "relative_error").items())
    text = (
        "The tangent kernel of one ReLU layer in the 1/sqrt(m) scaling against its closed form: median relative Frobenius error "
        f"{medians}; slope {found['slope']}."
    )
    return f"<h2>Tangent kernel</h2><p>{escape(text)}</p>{figure(images, 'kernel', 'Error of the empirical kernel')}"
