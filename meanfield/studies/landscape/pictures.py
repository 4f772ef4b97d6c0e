"""The pictures of the landscape study."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from meanfield.bench.sweep import Row, Rows, Tables, groups, select
from meanfield.pages import plotting
from meanfield.pages.plotting import Contour, Curve, Line
from meanfield.studies.landscape.summary import compared, share

NAMES = {
    "top": "largest eigenvalue",
    "smallest": "smallest eigenvalue",
    "trace": "trace",
    "gauss_newton": "trace, Gauss-Newton part",
    "element_trace": "trace, weighted by squared weights",
    "rise": "rise along filter-normalised directions, mean",
    "largest_rise": "the same, largest",
    "adaptive": "worst adaptive rise",
    "fisher_rao": "Fisher-Rao norm",
    "train_loss": "training loss itself",
}
SHOWN = ("top", "trace", "element_trace", "rise", "adaptive", "fisher_rao")
WAYS = {
    "weights": "raw weights",
    "matched": "matched weights",
    "displacement": "displacement of features",
    "mixture": "mixture of measures",
}
METRICS = {"flow": "in the metric of the flow", "weights": "in the weights"}
CURVATURES = {
    "top": "largest eigenvalue",
    "gauss_newton": "trace, Gauss-Newton part",
    "rest": "trace, the rest of it",
}
LOSS = "train loss"
NONE = 1e-12  # a barrier below it is none


def surfaces(tables: Tables) -> Any:
    return drawn({row["arm"]: row for row in tables["surfaces"]})


def drawn(rows: dict[str, Row], columns: int = 3) -> Any:
    """The training loss of surfaces by title, with what is said of their error."""
    panels = {title: contour(row) for title, row in rows.items()}
    return plotting.contours(panels, "along the first direction", "along the second", "training loss", columns=columns)


def contour(row: Row) -> Contour:
    values = np.asarray(row["values"][LOSS], dtype=float)
    marks = {name: (place[0], place[1]) for name, place in row["marks"].items() if _inside(place, row["axis"])}
    return Contour(row["axis"], row["axis"], values, note(row).replace(", ", "\n", 1), marks, row["error"])


def note(row: Row) -> str:
    """What is said of the error of a surface."""
    if row["status"] == "exact":
        return f"exact, {row['evaluations']:g} evaluations"
    kept = {"met": "tolerance met", "not met": "tolerance not met"}.get(row["status"], row["status"])
    return f"estimated error {share(row):.2%} of the range, {row['evaluations']:g} evaluations, {kept}"


def _inside(place: Iterable[float], axis: list[float]) -> bool:
    return all(axis[0] <= each <= axis[-1] for each in place)


def sharpness(tables: Tables) -> Any:
    return _against_held_out(compared(tables, "sharpness"))


def matched(tables: Tables) -> Any:
    return _against_held_out(compared(tables, "matched"))


def _against_held_out(kept: Rows) -> Any:
    """Measures that are positive, one panel each; None where there are too few networks."""
    if len(kept) < 2:
        return None
    panels = {
        NAMES[name]: {
            arm: [(row[name], row["held_out_loss"]) for row in each] for (arm,), each in groups(kept, "arm").items()
        }
        for name in SHOWN
        if all(row[name] > 0 for row in kept)
    }
    return plotting.scatter(panels, dict.fromkeys(panels, "value"), "held-out loss", log=list(panels))


def toy(tables: Tables) -> Any:
    rows = select(tables["toy"], seed=tables["toy"][0]["seed"])
    return drawn({f"{row['activation']}, {row['writing']}": row for row in rows}, columns=4)


def slices(tables: Tables) -> Any:
    rows = tables["slices"]
    looks = {"random": 0, "largest eigenvalue": 1, "smallest eigenvalue": 2}
    curves = [Line(kind(row), row["axis"], row["values"], looks[row["kind"]]) for row in rows]
    near = [
        Line(kind(row), row["axis"], _rise(row), looks[row["kind"]])
        for row in rows
        if row["kind"] != "largest eigenvalue"
    ]
    panels = {"training loss": curves, "its rise, without the largest eigenvalue": near}
    return plotting.lines(panels, "distance from the network", "", columns=2)


def kind(row: Row) -> str:
    return "random directions" if row["kind"] == "random" else f"eigenvector, {row['kind']}"


def _rise(row: Row) -> list[float]:
    middle = row["values"][len(row["values"]) // 2]
    return [value - middle for value in row["values"]]


def joins(tables: Tables) -> Any:
    """J along each path of the first pair, at the largest width, and its loss."""
    rows = tables["joins"]
    width, pair = max(row["width"] for row in rows), rows[0]["pair"]
    panels = {}
    for figure in dict.fromkeys(row["figure"] for row in rows):
        shown = select(rows, width=width, pair=pair, figure=figure)
        panels[figure] = [
            Line(WAYS[row["how"]], row["times"], row["values"], list(WAYS).index(row["how"]), markers=True)
            for row in shown
        ]
    return plotting.lines(
        panels, "t, from one network to the other", f"value, widths {width}/{width}", log=list(panels)
    )


def barriers(tables: Tables) -> Any:
    """Barriers over the width, of the ways that have one everywhere; None for one width alone."""
    rows, panels = tables["joins"], {}
    if len({row["width"] for row in rows}) < 2:
        return None
    for (figure,), each in groups(rows, "figure").items():
        panels[figure] = [
            Curve(WAYS[how], {m: [row["barrier"] for row in at] for (m,), at in groups(same, "width").items()}, "mean")
            for (how,), same in groups(each, "how").items()
            if min(row["barrier"] for row in same) > NONE
        ]
    return plotting.rates(panels, "largest rise above the chord")


def metric(tables: Tables) -> Any:
    """Curvatures of sampled networks over the width; None for one width alone."""
    rows = [row for row in tables["metric"] if row["width"] is not None]
    if len({row["width"] for row in rows}) < 2:
        return None
    panels = {
        METRICS[name]: [
            Curve(text, {m: [abs(row[figure]) for row in at] for (m,), at in groups(each, "width").items()}, "mean")
            for figure, text in CURVATURES.items()
        ]
        for (name,), each in groups(rows, "metric").items()
    }
    return plotting.rates(panels, "curvature of the training loss")


def trajectory(tables: Tables) -> Any:
    panels = {}
    for (arm,), each in groups(tables["trajectory"], "arm").items():
        epochs = [row["epoch"] for row in each]
        panels[arm] = [
            Line("of the checkpoint", epochs, [row["loss"] for row in each], 0, markers=True),
            Line("at its place on the plane", epochs, [row["loss_on_plane"] for row in each], 1, markers=True),
        ]
    return plotting.lines(panels, "epoch", "training loss", log=list(panels), columns=2)
