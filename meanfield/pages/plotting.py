"""The pictures of reports: functions from plain numbers to a matplotlib Figure, without pyplot's global state."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    ScalarFormatter,
)

# Okabe & Ito 2008: told apart with any colour vision; markers and dashes differ as well
BLUE, RED, GREEN, ORANGE, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#666666"
COLORS = (BLUE, RED, GREEN, ORANGE, PURPLE, GREY)
FONT, SMALL, DPI = 14, 12, 110
Row = Mapping[str, Any]


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def values(rows: Sequence[Row]) -> Figure:
    """Value per round of flow and convex program, and the dual bound under them."""
    figure, axes = _single()
    x = [row["round"] + 1 for row in rows]
    axes.plot(x, [row["flow_value"] for row in rows], "o-", color=BLUE, ms=8, lw=2, label="J at the end of the flow")
    axes.plot(
        x,
        [row["value"] for row in rows],
        "s--",
        color=RED,
        ms=11,
        mfc="none",
        mew=2,
        label="J after the convex program",
    )
    axes.plot(
        x, [row["dual_value"] for row in rows], "v:", color=GREEN, ms=7, lw=2, label="dual bound (on this support)"
    )
    axes.ticklabel_format(axis="y", useOffset=False)
    return _finish(figure, axes, "round of the alternation", "objective J (mean loss + penalties)", rounds=True)


def gaps(rows: Sequence[Row], tolerance: float) -> Figure:
    """Gap per round on a logarithmic axis; tolerance is relative to J."""
    figure, axes = _single()
    x = [row["round"] + 1 for row in rows]
    axes.semilogy(
        x, _positive([row["flow_gap"] for row in rows]), "o-", color=BLUE, label="end of the flow minus dual bound"
    )
    axes.semilogy(
        x, _positive([row["gap"] for row in rows]), "s--", color=RED, label="convex program: value minus dual bound"
    )
    axes.semilogy(
        x,
        [tolerance * abs(row["flow_value"]) for row in rows],
        ":",
        color=GREY,
        label=f"stopping rule, {tolerance:g} J",
    )
    axes.margins(y=0.25)  # room for the legend
    return _finish(figure, axes, "round of the alternation", "duality gap, in units of J", rounds=True)


def proof(seconds: Sequence[float], shares: Sequence[float]) -> Figure:
    """The share of J that is proven by so many seconds, a staircase below the line at 1."""
    figure, axes = _single()
    axes.step(seconds, shares, "o-", where="post", color=GREEN, label="proven lower bound over all measures")
    axes.axhline(1.0, color=GREY, ls=":", label="J of the network")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.05)
    return _finish(figure, axes, "seconds of the proof", "share of J")


def populations(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Figure:
    """Masses per layer, heaviest first: of the start, and of the answer (missing particles have died)."""
    figure, grid = _panels(len(after), 5.2)
    for index, (axes, old, new) in enumerate(zip(grid, before, after)):
        ordered = sorted(new, reverse=True)
        axes.bar(range(1, len(ordered) + 1), ordered, color=RED, label=f"after: {len(ordered)} particles")
        old = sorted(old, reverse=True)
        axes.step(
            [0.5, *np.arange(1, len(old) + 1) + 0.5],
            [old[0], *old],
            where="pre",
            color=BLUE,
            lw=2.5,
            label=f"before: {len(old)} particles",
        )
        axes.set_title(f"layer {index + 1}", fontsize=FONT)
        _dress(axes, "particle, heaviest first", "population p (share of mass)" if index == 0 else "")
        axes.legend(fontsize=SMALL)
    return figure


def kernels(images: np.ndarray, masses: Sequence[float], most: int = 12) -> Figure:
    """First-layer kernels (M, C, h, w) of the heaviest particles, the mean over channels, on one colour scale."""
    order = np.argsort(masses)[::-1][:most]
    columns = min(6, len(order))
    lines = math.ceil(len(order) / columns)
    figure = _figure(1.55 * columns + 1.2, 1.95 * lines + 0.5)
    grid = figure.subplots(lines, columns, squeeze=False)
    shown = np.asarray(images)[order].mean(1)
    top = float(np.abs(shown).max()) or 1.0
    colours = ScalarMappable(Normalize(-top, top), "PuOr")
    for axes in grid.flat:
        axes.axis("off")
    for axes, kernel, index in zip(grid.flat, shown, order):
        axes.imshow(kernel, cmap=colours.cmap, norm=colours.norm)
        axes.set_title(f"p = {masses[index]:.3f}", fontsize=FONT)
    bar = figure.colorbar(colours, ax=grid.ravel().tolist(), shrink=0.9)
    bar.set_label("kernel entry z", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def plain(text: str) -> str:
    """Names that users gave are no formulas."""
    return text.replace("$", r"\$")


def image_strip(images: np.ndarray, captions: Sequence[str], right: Sequence[bool]) -> Figure:
    """Images (n, h, w) with a caption each; wrong ones are framed."""
    columns = min(6, len(images))
    lines = math.ceil(len(images) / columns)
    figure = _figure(1.6 * columns, 2.15 * lines)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, caption, fine in zip(grid.flat, images, captions, right):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axes.set_axis_on()
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set(color=GREY if fine else RED, linewidth=0.8 if fine else 4)
        axes.set_title(plain(caption), fontsize=SMALL + 0.5)
    return figure


def confusion(counts: np.ndarray, classes: Sequence[str], most: int = 30) -> Figure:
    """How many images of every true class (row) are read as which (column); beyond `most` classes without numbers.

    Right ones in blue, by their share of the class; mistakes in orange, by their share of the commonest mistake.
    """
    size, right = len(classes), np.eye(len(classes), dtype=bool)
    side = min(12.0, max(4.8, 0.5 * size + 1.2))
    figure = _figure(side, 0.95 * side)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    mistakes = np.where(right, 0, counts)
    tints = np.where(right, shares, 0.15 + 0.55 * mistakes / max(mistakes.max(), 1))
    for cells, colours in ((right, "Blues"), (~right & (counts > 0), "Oranges")):
        axes.imshow(np.where(cells, tints, np.nan), cmap=colours, vmin=0, vmax=1.25)
    for (row, column), number in np.ndenumerate(counts):
        if number and size <= most:
            color = "white" if tints[row, column] > 0.75 else "black"
            font = FONT + 2 if size <= 12 else SMALL - 3
            axes.text(column, row, str(number), ha="center", va="center", color=color, fontsize=font)
    if size <= most:
        _name(axes.set_xticks, list(map(plain, classes)), most=40)
        axes.set_yticks(range(size), list(map(plain, classes)), fontsize=SMALL)
    axes.set_xlabel("read as", fontsize=FONT)
    axes.set_ylabel("true class", fontsize=FONT)
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=GREY, alpha=0.25, lw=0.8)
    axes.tick_params(which="minor", length=0)
    return figure


def predictions(groups: Mapping[str, Sequence[tuple[int, float]]], classes: Sequence[str], label: str) -> Figure:
    """Output (or margin) of every image by class; groups: name -> (index of the class, output)."""
    figure, axes = _single()
    looks = [("o", BLUE, 60, 1.0), ("x", ORANGE, 28, 0.7)]
    for shift, (name, pairs) in enumerate(groups.items()):
        marker, color, size, alpha = looks[shift % 2]
        if len(pairs) > 60 * len(classes):
            size, alpha = size / 4, alpha / 2
        spread = np.random.default_rng(0).uniform(-0.12, 0.12, len(pairs))
        x = np.array([index for index, _ in pairs]) + spread + 0.3 * shift - 0.15 * (len(groups) - 1)
        axes.scatter(
            x,
            [output for _, output in pairs],
            marker=marker,
            color=color,
            s=size,
            alpha=alpha,
            label=f"{name} ({len(pairs)} images)",
        )
    axes.axhline(0, color=GREY, lw=1)
    figure = _finish(figure, axes, "true class", plain(label))
    axes.set_xticks(range(len(classes)), list(map(plain, classes)))
    axes.set_xlim(-0.6, len(classes) - 0.4)
    return figure


def finite_networks(
    sampled: Mapping[int, Sequence[float]], trained: Mapping[int, Sequence[float]], limit: float
) -> Figure:
    """J_m of finite networks against their width m per layer; all draws as points, medians joined."""
    figure, axes = _single()
    looks = (
        (sampled, "o", BLUE, "-", "sampled from the limit"),
        (trained, "D", RED, "--", "trained from random starts"),
    )
    for found, marker, color, line, label in looks:
        for m, drawn in found.items():
            axes.scatter([m] * len(drawn), drawn, marker=marker, color=color, s=18, alpha=0.35, linewidths=0)
        if found:
            medians = [float(np.median(drawn)) for drawn in found.values()]
            axes.plot(list(found), medians, marker=marker, color=color, ls=line, lw=2, label=f"{label}, median")
    axes.axhline(limit, color=GREEN, lw=2, ls="-.", label=f"J of the continuous network, {limit:.4g}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({*sampled, *trained})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    return _finish(figure, axes, "width m of every layer (channels)", "objective J of the finite network")


def segment(line: Mapping[str, Sequence[float]], violations: Mapping[str, float]) -> Figure:
    """J on the straight lines between two solutions; line: t, program, weights."""
    figure, grid = _panels(2, 5.2)
    looks = (("program", RED, "s", "in program variables"), ("weights", BLUE, "o", "in weights"))
    for axes, (name, color, marker, title) in zip(grid, looks):
        t, found = line["t"], line[name]
        axes.plot(t, found, marker=marker, ms=5, color=color, label=f"J, midpoint violation {violations[name]:.3g}")
        axes.plot([0, 1], [found[0], found[-1]], ":", color=GREY, lw=2, label="chord between the ends")
        axes.set_title(f"straight line {title}", fontsize=FONT)
        _dress(axes, "t (0: solution A, 1: solution B)", "objective J" if name == "program" else "")
        low, high = min(found), max(found)
        axes.set_ylim(low - 0.1 * (high - low + 1e-12), high + 0.45 * (high - low + 1e-12))
        axes.legend(fontsize=SMALL, loc="upper center")
    return figure


@dataclass(frozen=True)
class Curve:
    """Samples by width, as points, and their `statistic` ("mean", "median") joined; `label` may
    name the fitted slope.
    """

    label: str
    samples: Mapping[int, Sequence[float]]
    statistic: str = "median"


def rates(panels: Mapping[str, Sequence[Curve]], y: str, guide: float | None = None) -> Figure:
    """Samples over the width on logarithmic axes, a panel per title; `guide` is the slope of a
    dotted line of theory.
    """
    figure, grid = _panels(len(panels), 5.6)
    looks = list(zip(COLORS, "os^Dv*", ("-", "--", "-.", ":", "-", "--")))
    for index, (axes, (title, curves)) in enumerate(zip(grid, panels.items())):
        for (color, marker, line), curve in zip(looks, curves):
            _samples(axes, curve, color, marker, line)
        if guide is not None and curves and len(curves[0].samples) > 1:
            first, last = min(curves[0].samples), max(curves[0].samples)
            top = _summary(curves[0])[first]
            axes.plot(
                [first, last],
                [top, top * (last / first) ** guide],
                ":",
                color="black",
                lw=1.5,
                label=f"slope {guide:g} (theory)",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=FONT)
        _dress(axes, "width m of every layer", y if index % 3 == 0 else "")
        axes.xaxis.set_major_locator(FixedLocator(sorted({m for curve in curves for m in curve.samples})))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend(fontsize=SMALL - 2, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=1)
    return figure


def _summary(curve: Curve) -> dict[int, float]:
    function = {"mean": np.mean, "median": np.median}[curve.statistic]
    return {m: float(function(drawn)) for m, drawn in sorted(curve.samples.items())}


def _samples(axes: Axes, curve: Curve, color: str, marker: str, line: str) -> None:
    for m, drawn in curve.samples.items():
        axes.scatter([m] * len(drawn), _positive(drawn), marker=marker, color=color, s=16, alpha=0.3, linewidths=0)
    joined = _summary(curve)
    axes.plot(
        list(joined),
        _positive(list(joined.values())),
        marker=marker,
        color=color,
        ls=line,
        lw=2,
        label=f"{curve.label}, {curve.statistic}",
    )


@dataclass(frozen=True)
class Band:
    """A curve over named places and the ends of its intervals; infinite intervals are not drawn."""

    label: str
    places: Sequence[str]
    value: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def bands(
    panels: Mapping[str, Sequence[Band]], x: str, y: str = "", *, log: Collection[str] = (), shared: bool = False
) -> Figure:
    """Curves with bands over places in their order of first appearance, a panel per title; one legend under all.

    log: titles of panels with a logarithmic axis.  shared: one range of y for all panels.
    """
    figure, grid = _panels(len(panels), 6.4)
    every = [band for curves in panels.values() for band in curves]
    places = list(dict.fromkeys(place for band in every for place in band.places))
    looks = _looks([band.label for band in every])
    for index, (axes, (title, curves)) in enumerate(zip(grid, panels.items())):
        for band in curves:
            _band(axes, band, [places.index(place) for place in band.places], looks[band.label])
        if title in log:
            axes.set_yscale("log")
        axes.set_ylim(*_range(every if shared else curves, log=title in log))
        _dress(axes, x, y if index == 0 else "")
        axes.set_title(title, fontsize=FONT)
        _name(axes.set_xticks, places, most=40)
        if title in log:
            _plain_logarithms(axes.yaxis)
    return _legend_below(figure, grid, 4, frameon=False)


def _looks(labels: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and dashes of every label."""
    return dict(
        zip(
            dict.fromkeys(labels),
            zip(COLORS, "os^Dv*", ("-", "--", "-.", ":", "-", "--")),
        )
    )


def _band(axes: Axes, band: Band, x: Sequence[int], look: tuple[str, str, str]) -> None:
    color, marker, line = look
    filled = "none" if line != "-" else color  # curves that agree stay visible under each other
    axes.plot(x, band.value, color=color, marker=marker, ls=line, lw=2, ms=7, mfc=filled, mew=1.6, label=band.label)
    known = np.isfinite(band.low) & np.isfinite(band.high)
    axes.fill_between(x, band.low, band.high, where=known.tolist(), color=color, alpha=0.15, lw=0)


def _range(curves: Sequence[Band], *, log: bool) -> tuple[float, float]:
    """Of the values, and of the bands as far as they do not drown them; a little more than that."""
    ends, values = (
        [each for band in curves for each in (*band.low, *band.high)],
        [each for band in curves for each in band.value],
    )
    numbers = [
        np.asarray([each for each in found if np.isfinite(each) and (each > 0 or not log)]) for found in (values, ends)
    ]
    known, reached = (np.log10(found) if log else found for found in numbers)
    if not len(known):
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = float(known.min()), float(known.max())
    room = max(high - low, 0.1)
    low, high = (max(min([low, *reached]), low - room), min(max([high, *reached]), high + room))
    low, high = low - 0.05 * room, high + 0.05 * room
    return (10**low, 10**high) if log else (low, high)


def heat_maps(
    maps: Mapping[str, np.ndarray],
    ticks: Sequence[str],
    x: str,
    y: str,
    label: str,
    *,
    rows: Sequence[str] | None = None,
    log: bool = False,
    lowest: float = 0.0,
    numbers: bool = False,
    columns: int = 3,
) -> Figure:
    """Matrices on one colour scale; entry [i, j] at row i (tick rows[i], default ticks[i]) and column j, NaN left
    blank.

    log: logarithmic colours, over three decades at most and not below `lowest`; smaller entries have the lowest colour.
    numbers: entries are written into their cells.  columns: panels side by side.
    """
    figure, grid = _panels(len(maps), 4.8 if len(maps) > 1 else 7.5, columns)
    scale, cut = _colour_scale(maps.values(), log, lowest)
    colours, square = ScalarMappable(scale, "viridis"), rows is None or len(rows) == len(ticks)
    for axes, (title, matrix) in zip(grid, maps.items()):
        axes.imshow(matrix, cmap="viridis", norm=scale, origin="lower", aspect="equal" if square else "auto")
        axes.set_title(title, fontsize=FONT)
        _name(axes.set_xticks, ticks, most=24)
        axes.set_yticks(range(len(rows or ticks)), rows or ticks, fontsize=SMALL)
        axes.set_xlabel(x, fontsize=FONT)
        axes.set_ylabel(y, fontsize=FONT)
        if numbers:
            _write_entries(axes, matrix, scale)
    lines = math.ceil(len(maps) / columns)
    bar = figure.colorbar(
        colours, ax=grid, shrink=0.8, aspect=20 * lines, extend="min" if cut else "neither", extendfrac=0.03
    )
    bar.set_label(label, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    if isinstance(scale, LogNorm):
        _plain_logarithms(bar.ax.yaxis)
    figure.draw_without_rendering()  # square panels: the layout takes a second pass, without it titles are cut off
    return figure


def _colour_scale(maps: Iterable[np.ndarray], log: bool, lowest: float) -> tuple[Normalize, bool]:
    """The scale, and whether entries lie below it."""
    known = np.concatenate([each[np.isfinite(each)] for each in maps])
    top = float(known.max()) if len(known) else 1.0
    if not log or top <= 0:
        return Normalize(0, top), False
    low = max(float(known[known > 0].min()), top / 1000, lowest)
    return LogNorm(min(low, top / 1.01), top), bool((known < low).any())


def _write_entries(axes: Axes, matrix: np.ndarray, scale: Normalize) -> None:
    size = SMALL if matrix.shape[1] <= 5 else SMALL - 3
    for (row, column), entry in np.ndenumerate(matrix):
        if np.isfinite(entry):
            color = "black" if scale(float(entry)) > 0.6 else "white"
            axes.text(column, row, f"{entry:#.2g}".rstrip("."), ha="center", va="center", color=color, fontsize=size)


def _name(place: Callable[..., Any], names: Sequence[str], most: int) -> None:
    """Ticks 0, 1, ... with their names, turned where there is no room for more than `most` letters side by side."""
    turned = (
        {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        if max(map(len, names), default=0) * len(names) > most
        else {}
    )
    place(range(len(names)), names, fontsize=SMALL, **turned)


@dataclass(frozen=True)
class Contour:
    """Values (n, m) at x (n,) and y (m,), a note on them, named places (x, y), and how far the values may be off."""

    x: Sequence[float]
    y: Sequence[float]
    values: np.ndarray
    note: str = ""
    marks: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    error: float = 0.0


def contours(panels: Mapping[str, Contour], x: str, y: str, label: str, *, columns: int = 3) -> Figure:
    """Level lines in true coordinates, on a scale of its own in every panel; a cross where the least of the values is,
    unless a named place has one that the error does not tell from it.

    label: what the values are.  Values that are not finite stay blank.
    """
    figure, grid = _panels(len(panels), 5.4, columns, 4.9)
    for axes, (title, each) in zip(grid, panels.items()):
        values = np.asarray(each.values, dtype=float).T  # rows along y
        shown = np.ma.masked_invalid(values)
        if shown.count() and shown.max() > shown.min():
            levels, norm = _levels(shown, each.error)
            seen = np.ma.maximum(shown, levels[0])  # what lies below the error has no logarithm to be drawn
            drawn = axes.contourf(each.x, each.y, seen, levels, cmap="viridis", norm=norm, extend="both")
            lines = axes.contour(each.x, each.y, seen, levels[1::2], colors="white", linewidths=0.7)
            axes.clabel(lines, fmt="%.3g", fontsize=SMALL - 3)
            bar = figure.colorbar(drawn, ax=axes, shrink=0.85, format="%.3g")
            bar.set_label(label, fontsize=SMALL)
            row, column = divmod(int(shown.argmin()), shown.shape[1])
            if not any(_near(each, shown, place) for place in each.marks.values()):
                axes.plot(each.x[column], each.y[row], "x", color=ORANGE, ms=10, mew=2.5, label="least of the grid")
        for place, (name, (a, b)) in enumerate(each.marks.items()):
            marker = "os^D"[place % 4]
            axes.plot(a, b, marker, color="white", mec="black", ms=8, label=plain(name))
        axes.set_title(f"{plain(title)}\n{plain(each.note)}" if each.note else plain(title), fontsize=SMALL)
        axes.set_xlabel(x, fontsize=SMALL)
        axes.set_ylabel(y, fontsize=SMALL)
        axes.set_aspect("equal")
        axes.tick_params(labelsize=SMALL - 2)
    return _legend_below(figure, grid, 4, facecolor="#bbbbbb")


def _near(contour: Contour, shown: Any, place: tuple[float, float]) -> bool:
    """Whether the value at a place is the least one as far as the error tells."""
    column, row = (int(np.abs(np.asarray(axis) - at).argmin()) for axis, at in zip((contour.x, contour.y), place))
    return bool(shown[row, column] <= shown.min() + 2 * contour.error)


def _levels(values: Any, error: float) -> tuple[np.ndarray, Normalize]:
    """Equal steps; or equal ratios where the values, from the error upwards, range over more than a decade."""
    low, high = float(values.min()), float(values.max())
    low = max(low, error)
    if low > 0 and high / low > 10:
        return np.geomspace(low, high, 16), LogNorm(low, high)
    return np.linspace(low, high, 16), Normalize(low, high)


@dataclass(frozen=True)
class Line:
    """y over x; look: the index of its colour, marker and dashes."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    look: int = 0
    markers: bool = False


def lines(
    panels: Mapping[str, Sequence[Line]], x: str, y: str, *, log: Collection[str] = (), columns: int = 3
) -> Figure:
    """Curves, a panel per title; lines of one label are told once.  log: titles of panels with a logarithmic y."""
    figure, grid = _panels(len(panels), 5.8, columns)
    looks = list(_looks(map(str, range(6))).values())
    for index, (axes, (title, curves)) in enumerate(zip(grid, panels.items())):
        named: set[str] = set()
        for curve in curves:
            color, marker, dashes = looks[curve.look % len(looks)]
            label = "_" if curve.label in named else curve.label
            named.add(curve.label)
            shape = {"marker": marker, "ms": 5} if curve.markers else {}
            axes.plot(curve.x, curve.y, color=color, ls=dashes, lw=1.8, label=plain(label), **shape)
        _dress(axes, x, y if index % columns == 0 else "")
        if title in log:
            axes.set_yscale("log")
            _plain_logarithms(axes.yaxis)
        axes.set_title(plain(title), fontsize=FONT)
    return _legend_below(figure, grid, 4, frameon=False)


@dataclass(frozen=True)
class Bar:
    """A value with the ends of its interval, what is written beside it, and the index of its colour."""

    label: str
    value: float
    low: float
    high: float
    note: str = ""
    look: int = 0


def bars(panels: Mapping[str, Sequence[Bar]], x: str, *, columns: int = 3) -> Figure:
    """Values from zero on, the first one on top, a panel per title; intervals as far as they are finite."""
    most = max(map(len, panels.values()), default=1)
    figure, grid = _panels(len(panels), 6.0, columns, 1.4 + 0.34 * most)
    for axes, (title, each) in zip(grid, panels.items()):
        for place, bar in enumerate(each):
            axes.barh(place, bar.value, color=COLORS[bar.look % len(COLORS)], height=0.7)
            if np.isfinite(bar.low) and np.isfinite(bar.high):
                axes.plot([bar.low, bar.high], [place, place], color="black", lw=1.5)
            beside = {"va": "center", "fontsize": SMALL, "transform": axes.get_yaxis_transform()}
            axes.text(1.02, place, plain(bar.note), **beside)
        _dress(axes, x, "")
        axes.set_yticks(range(len(each)), [plain(bar.label) for bar in each], fontsize=SMALL)
        axes.invert_yaxis()
        axes.set_title(plain(title), fontsize=FONT)
    return figure


def scatter(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    x: Mapping[str, str],
    y: str,
    *,
    log: Collection[str] = (),
    columns: int = 3,
    diagonal: bool = False,
) -> Figure:
    """Points (x, y), a panel per title and a look per label, one legend under all.  x: title -> name of its axis; log:
    titles of panels with a logarithmic x; diagonal: y = x, where an account x of y is right.
    """
    figure, grid = _panels(len(panels), 5.0, columns)
    styles = _styles(label for groups in panels.values() for label in groups)
    for index, (axes, (title, groups)) in enumerate(zip(grid, panels.items())):
        for label, points in groups.items():
            axes.scatter(*zip(*points), s=34, alpha=0.8, linewidths=0, label=plain(label), **styles[label])
        if diagonal:
            axes.axline((0, 0), slope=1, color=GREY, ls=":", lw=1.5)
        _dress(axes, x[title], y if index % columns == 0 else "")
        if title in log:
            axes.set_xscale("log")
            _plain_logarithms(axes.xaxis)
        axes.set_title(plain(title), fontsize=FONT)
    return _legend_below(figure, grid, 5, frameon=False)


@dataclass(frozen=True)
class Track:
    """A way through a plane; its end is marked."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


def tracks(panels: Mapping[str, Sequence[Track]], x: str, y: str, limits: Mapping[str, tuple[float, float]]) -> Figure:
    """Ways through a plane, a panel per title and a look per label, one legend under all.  limits: title -> ends of
    both axes, of panels that show a part.
    """
    figure, grid = _panels(len(panels), 5.4, height=5.0)
    styles = _styles(track.label for ways in panels.values() for track in ways)
    dashes = {label: ("-", "--", ":")[place // 6 % 3] for place, label in enumerate(styles)}  # colours come again
    for index, (axes, (title, ways)) in enumerate(zip(grid, panels.items())):
        for track in ways:
            style = styles[track.label]
            axes.plot(track.x, track.y, color=style["color"], ls=dashes[track.label], lw=1.3, alpha=0.7)
            axes.scatter(track.x[-1:], track.y[-1:], s=70, zorder=3, linewidths=0, label=plain(track.label), **style)
        if title in limits:
            axes.set_xlim(*limits[title])
            axes.set_ylim(*limits[title])
        _dress(axes, x, y if index % 3 == 0 else "")
        axes.set_title(plain(title), fontsize=FONT)
    return _legend_below(figure, grid, 4, frameon=False)


def _styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of every label, as many as there are."""
    return {
        label: {"color": COLORS[place % 6], "marker": "os^Dv*PX<>"[place // 6 + place % 6]}
        for place, label in enumerate(dict.fromkeys(labels))
    }


def distributions(panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], levels: Sequence[float]) -> Figure:
    """Quantile functions, overlaid: title -> label -> one row of values per network, at `levels`."""
    figure, grid = _panels(len(panels), 5.2)
    for index, (axes, (title, curves)) in enumerate(zip(grid, panels.items())):
        for color, (label, rows) in zip((GREY, ORANGE, GREEN, RED, BLUE, PURPLE), curves.items()):
            for number, row in enumerate(rows):
                axes.plot(levels, row, color=color, lw=1.2, alpha=0.7, label=label if number == 0 else None)
        axes.set_title(title, fontsize=FONT)
        _dress(axes, "share of particles and probes", "value" if index % 3 == 0 else "")
        axes.legend(fontsize=SMALL)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _single() -> tuple[Figure, Axes]:
    figure = _figure(8, 5)
    return figure, figure.subplots()


def _panels(count: int, width: float, columns: int = 3, height: float = 4.4) -> tuple[Figure, list[Axes]]:
    columns = min(count, columns)
    down = math.ceil(count / columns)
    figure = _figure(width * columns, height * down)
    grid = list(figure.subplots(down, columns, squeeze=False).flat)
    for unused in grid[count:]:
        unused.set_axis_off()
    return figure, grid[:count]


def _legend_below(figure: Figure, grid: Sequence[Axes], columns: int, **frame: Any) -> Figure:
    """One legend under all panels, every label once."""
    handles = {text: line for axes in grid for line, text in zip(*axes.get_legend_handles_labels())}
    place = {"loc": "outside lower center", "ncols": columns, "fontsize": SMALL}
    figure.legend(list(handles.values()), list(handles), **place, **frame)
    return figure


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=FONT)
    axes.set_ylabel(y, fontsize=FONT)
    axes.tick_params(labelsize=SMALL)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _finish(figure: Figure, axes: Axes, x: str, y: str, *, rounds: bool = False) -> Figure:
    _dress(axes, x, y)
    if rounds:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_yscale() == "log" and _decades(axes.yaxis) < 1.5:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=SMALL)
    return figure


def _plain_logarithms(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis, as many per decade as it has room for."""
    decades = _decades(axis)
    subs = (1, 1.5, 2, 3, 4, 6, 8) if decades < 0.7 else (1, 2, 5) if decades < 3 else (1,)
    axis.set_major_locator(MaxNLocator(nbins=5) if decades < 0.4 else LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _decades(axis: Axis) -> float:
    low, high = axis.get_view_interval()
    return math.log10(high / low)


def _positive(numbers: Sequence[float]) -> list[float]:
    """Gaps at rounding level may be zero or below: drawn at 1e-16."""
    return [max(number, 1e-16) for number in numbers]
