"""One picture per claim: what was measured on the left, its controls on the right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from meanfield.pages.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, png
from theory_checks.claim import Axes

COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P")
MOST = 8  # lines in one panel
LEGEND_LETTERS = 60


def picture(record: Mapping[str, Any], axes: Axes) -> bytes:
    """PNG of a record."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    measured = record["evidence"]["series"] if record["evidence"] else []
    _draw(left, measured, "measured", axes)
    _draw(right, *_controls(record), axes)
    return png(figure)


def _controls(record: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The controls' series, named after their control where there are several, and the panel's title."""
    found = record["controls"]
    if len(found) == 1:
        ((name, only),) = found.items()
        return only["series"], f"control: {name}"
    label = lambda name, each, count: name if count == 1 else f"{name}: {each['name']}"  # noqa: E731
    series = [
        {**each, "name": label(name, each, len(control["series"]))}
        for name, control in found.items()
        for each in control["series"]
    ]
    return _thinned(series, len(found)), "controls"


def _thinned(series: list[dict[str, Any]], controls: int) -> list[dict[str, Any]]:
    """At most MOST of them, from every control alike."""
    step = max(1, -(-len(series) // max(MOST, controls)))
    return series[::step]


def _draw(panel: Any, series: list[dict[str, Any]], title: str, axes: Axes) -> None:
    for index, each in enumerate(series[:MOST]):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        style = {"line": "-", "dashed": "--"}.get(each["style"], "")
        marker = marker if not style or len(each["x"]) <= 12 else ""
        hollow = {"ms": 11, "mfc": "none", "mew": 2} if each["style"] == "hollow" else {"ms": 5}
        x, y = ([float(value) for value in each[key]] for key in ("x", "y"))
        panel.plot(
            x, y, linestyle=style, marker=marker, lw=1.6, **hollow, color=colour, label=each["name"][:LEGEND_LETTERS]
        )
    if axes.level is not None:
        panel.axhline(axes.level, color="black", lw=1, ls=":", label=axes.level_name)
    panel.set(title=title, xlabel=axes.x, ylabel=axes.y)
    if "x" in axes.log:
        panel.set_xscale("log")
    if "y" in axes.log:
        panel.set_yscale("log")
    elif _wide(series):
        panel.set_yscale("symlog", linthresh=1)
    panel.grid(alpha=0.3)
    if series or axes.level is not None:
        panel.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def _wide(series: list[dict[str, Any]]) -> bool:
    """Whether values of both signs span too much for a linear axis."""
    sizes = [abs(float(y)) for each in series for y in each["y"]]
    return bool(sizes) and max(sizes) > 1e3
