"""The benchmarks' pictures: proven gap against CPU time, time per iteration against size, proven share against time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from meanfield.pages.plotting import BLUE, COLORS, GREEN, GREY, RED

SMALLEST_GAP = 1e-9  # smaller ones are drawn here
LOOKS = {"splitting": (BLUE, "o"), "CLARABEL": (RED, "s"), "SCS": (GREEN, "^")}  # colour, marker
GAP_LABEL = "proven relative gap"
DEPTHS = {1: "one ReLU layer", 2: "two tanh layers"}
DASHES = ("-", "--", ":", "-.")
FIRST_SECOND = 1.0  # at which the axis of a proof begins


def solve(found: dict[str, Any]) -> Figure:
    """One panel per case: the splitting's gap along its run, cvxpy's over its tolerances, hollow with compile time
    added.
    """
    cases = found["cases"]
    figure, grid = _panels(len(cases))
    for axes, case in zip(grid, cases):
        _gap_panel(axes, case)
    grid[0].set_ylabel(GAP_LABEL)
    named = {text: handle for axes in grid for handle, text in zip(*axes.get_legend_handles_labels())}
    columns = min(len(named), 2 * len(grid))
    figure.legend(
        list(named.values()), list(named), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    return figure


def _gap_panel(axes: Axes, case: dict[str, Any]) -> None:
    for name in dict.fromkeys(run["contender"] for run in case["runs"]):
        runs = [
            run
            for run in case["runs"]
            if run["contender"] == name and run.get("relative_gap") is not None and run["feasible"]
        ]
        if name == "splitting":
            _draw_history(axes, runs)
        elif runs:
            _draw_sweep(axes, name, runs)
    axes.set(xscale="log", yscale="log", xlabel="CPU seconds, one thread", title=case["name"])
    axes.set_ylim(bottom=SMALLEST_GAP / 3)
    _label_axes(axes)
    axes.grid(alpha=0.3)


def _label_axes(axes: Axes) -> None:
    """Seconds as plain numbers, at 1, 2 and 5 of every decade; the gap that stands for smaller ones marked so."""
    _label_seconds(axes)
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda gap, _: ("≤ " if gap < 1.01 * SMALLEST_GAP else "") + f"{gap:.0e}")
    )


def _label_seconds(axes: Axes) -> None:
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_history(axes: Axes, runs: list[dict[str, Any]]) -> None:
    color, marker = LOOKS["splitting"]
    rows = runs[-1]["history"] if runs else []
    times = [row.get("cpu_seconds", row["seconds"]) for row in rows]
    gaps = [max(row["gap"] / abs(row["value"]), SMALLEST_GAP) for row in rows]
    axes.plot(times, gaps, color=color, label="splitting, along one run", linewidth=1.6)
    times, gaps = _ends(runs)
    axes.plot(times, gaps, marker, color=color, label="splitting, stopped at a tolerance")


def _draw_sweep(axes: Axes, name: str, runs: list[dict[str, Any]]) -> None:
    color, marker = LOOKS[name]
    times, gaps = _ends(runs)
    axes.plot(times, gaps, f"{marker}-", color=color, label=f"{name}, solve")
    total = [run["cpu_seconds"] + run["compile_cpu_seconds"] for run in runs]
    axes.plot(total, gaps, f"{marker}:", color=color, mfc="none", alpha=0.7, label=f"{name}, with cvxpy's compilation")


def _ends(runs: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """CPU seconds of runs, and the gaps that they proved."""
    return [run["cpu_seconds"] for run in runs], [max(run["relative_gap"], SMALLEST_GAP) for run in runs]


def growth(found: dict[str, Any]) -> Figure:
    """One panel per sweep: time of an iteration and of its two products, or of a whole solve, against size."""
    timed = {name: (sweep, _ITERATION) for name, sweep in found["sweeps"].items()}
    if "streamed" in found:
        timed["streamed"] = found["streamed"], _WHOLE
    figure, grid = _panels(len(timed))
    for axes, (name, (sweep, lines)) in zip(grid, timed.items()):
        _growth_panel(axes, name, sweep, lines)
    grid[0].set_ylabel("CPU milliseconds, one thread")
    return figure


def _growth_panel(axes: Axes, name: str, sweep: dict[str, Any], lines: Sequence[tuple[str, str]]) -> None:
    rows = [row for row in sweep["rows"] if "failed" not in row]
    sizes = [row["size"] for row in rows]
    for (key, text), style, color in zip(lines, ("o-", "s--"), (BLUE, RED)):
        fit = sweep["exponents"][key]
        slope = "" if fit["slope"] is None else f", exponent {fit['slope']:.2f}"
        axes.plot(sizes, [1e3 * row[key] for row in rows], style, color=color, label=text + slope)
    axes.set(xscale="log", yscale="log", xlabel=_SIZE_LABELS[name], title=f"growth with {name}")
    ticks = sorted(set(sizes))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


_ITERATION = (("iteration_seconds", "an iteration"), ("products_seconds", "its two products"))
_WHOLE = (("freeze_seconds", "freezing"), ("program_seconds", "the program"))
_SIZE_LABELS = {
    "streamed": "images of full size",
    "particles": "particles of layer 1 (half as many in layer 2)",
    "images": "images",
    "positions": "positions of an image",
}


def proven(found: dict[str, Any]) -> Figure:
    """One panel per number of layers: the share of J that is proven against seconds, a staircase per case."""
    depths = sorted({row["layers"] for row in found["rows"]})
    figure, grid = _panels(len(depths))
    for axes, depth in zip(grid, depths):
        _proven_panel(axes, [row for row in found["rows"] if row["layers"] == depth])
    grid[0].set_ylabel("share of J proven over all measures")
    grid[0].set_ylim(0, 1.05)
    return figure


def _proven_panel(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """What is proven stays proven: lines go on after the dot that ends their proof.

    Colours tell kernels apart, and the images of two layers; dashes data, or the penalties of two layers.
    """
    sizes, kinds = (list(dict.fromkeys(map(each, rows))) for each in (_size, _kind))
    end = max(2 * FIRST_SECOND, *(row["seconds"] for row in rows))
    for row in rows:
        size, kind = _size(row), _kind(row)
        color, dashes = COLORS[sizes.index(size) % len(COLORS)], DASHES[kinds.index(kind) % len(DASHES)]
        seconds, shares = zip(*row["curve"], (end, row["share"]))
        axes.step(seconds, shares, where="post", color=color, ls=dashes, label=f"{size}, {kind}")
        axes.plot(max(row["seconds"], FIRST_SECOND), row["share"], ".", color=color, clip_on=False)
    axes.axhline(1.0, color=GREY, lw=0.8)
    axes.set(xscale="log", xlabel="seconds of the proof", title=DEPTHS[rows[0]["layers"]])
    axes.set_xlim(FIRST_SECOND, end)
    _label_seconds(axes)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False, fontsize=8, columnspacing=1.2)


def _size(row: dict[str, Any]) -> str:
    size = f", {row['images']} of {row['side']}x{row['side']}" if row["layers"] > 1 else ""
    return f"{row['kernel']}{size}"


def _kind(row: dict[str, Any]) -> str:
    if row["layers"] == 1:
        return f"{row['data']} {', '.join(map(str, row['classes']))}"
    return f"at {', '.join(f'{each:g}' for each in row['penalties'])}"


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Side by side, on one axis of times or gaps."""
    figure = Figure(figsize=(4.8 * count, 4.2), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, sharey=True)[0])
