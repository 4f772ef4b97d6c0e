"""The benchmarks' pictures: proven gap against CPU time, and time per iteration against size."""

from __future__ import annotations

import io
from typing import Any

SMALLEST_GAP = 1e-9  # smaller ones are drawn here
COLOURS = {"splitting": "#1b6ca8", "CLARABEL": "#c8553d", "SCS": "#6a994e"}
MARKERS = {"splitting": "o", "CLARABEL": "s", "SCS": "^"}
GAP_LABEL = "proven relative gap"


def solve_picture(found: dict[str, Any]) -> bytes:
    """One panel per case: the splitting's gap along its run, cvxpy's over its tolerances, hollow with compile time
    added. PNG.
    """
    cases = found["cases"]
    figure, axes = _panels(len(cases))
    for axis, case in zip(axes, cases):
        _gap_panel(axis, case)
    axes[0].set_ylabel(GAP_LABEL)
    named = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(
        named.values(),
        named,
        loc="outside lower center",
        ncols=min(len(named), 2 * len(axes)),
        frameon=False,
        fontsize=8,
    )
    return _png(figure)


def _gap_panel(axis: Any, case: dict[str, Any]) -> None:
    for name in dict.fromkeys(run["contender"] for run in case["runs"]):
        runs = [
            run
            for run in case["runs"]
            if run["contender"] == name and run.get("relative_gap") is not None and run["feasible"]
        ]
        if name == "splitting":
            _draw_history(axis, runs)
        elif runs:
            _draw_sweep(axis, name, runs)
    axis.set(xscale="log", yscale="log", xlabel="CPU seconds, one thread", title=case["name"])
    axis.set_ylim(bottom=SMALLEST_GAP / 3)
    _label_axes(axis)
    axis.grid(alpha=0.3)


def _label_axes(axis: Any) -> None:
    """Seconds as plain numbers, at 1, 2 and 5 of every decade; the gap that stands for smaller ones marked so."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(
        FuncFormatter(lambda gap, _: ("≤ " if gap < 1.01 * SMALLEST_GAP else "") + f"{gap:.0e}")
    )


def _draw_history(axis: Any, runs: list[dict[str, Any]]) -> None:
    rows = runs[-1]["history"] if runs else []
    times = [row.get("cpu_seconds", row["seconds"]) for row in rows]
    gaps = [max(row["gap"] / abs(row["value"]), SMALLEST_GAP) for row in rows]
    axis.plot(times, gaps, color=COLOURS["splitting"], label="splitting, along one run", linewidth=1.6)
    ends = [max(run["relative_gap"], SMALLEST_GAP) for run in runs]
    axis.plot(
        [run["cpu_seconds"] for run in runs],
        ends,
        MARKERS["splitting"],
        color=COLOURS["splitting"],
        label="splitting, stopped at a tolerance",
    )


def _draw_sweep(axis: Any, name: str, runs: list[dict[str, Any]]) -> None:
    gaps = [max(run["relative_gap"], SMALLEST_GAP) for run in runs]
    axis.plot(
        [run["cpu_seconds"] for run in runs], gaps, MARKERS[name] + "-", color=COLOURS[name], label=f"{name}, solve"
    )
    total = [run["cpu_seconds"] + run["compile_cpu_seconds"] for run in runs]
    axis.plot(
        total,
        gaps,
        MARKERS[name] + ":",
        color=COLOURS[name],
        markerfacecolor="none",
        alpha=0.7,
        label=f"{name}, with cvxpy's compilation",
    )


def growth_picture(found: dict[str, Any]) -> bytes:
    """One panel per sweep: time of an iteration and of its two products against size. PNG."""
    sweeps = found["sweeps"]
    figure, axes = _panels(len(sweeps))
    for axis, (name, sweep) in zip(axes, sweeps.items()):
        _growth_panel(axis, name, sweep)
    axes[0].set_ylabel("CPU milliseconds, one thread")
    return _png(figure)


def _growth_panel(axis: Any, name: str, sweep: dict[str, Any]) -> None:
    rows = [row for row in sweep["rows"] if "failed" not in row]
    for key, text, style in (
        ("iteration_seconds", "an iteration", "o-"),
        ("products_seconds", "its two products", "s--"),
    ):
        fit = sweep["exponents"][key]
        slope = "" if fit["slope"] is None else f", exponent {fit['slope']:.2f}"
        colour = COLOURS["splitting"] if style == "o-" else COLOURS["CLARABEL"]
        axis.plot(
            [row["size"] for row in rows], [1e3 * row[key] for row in rows], style, color=colour, label=text + slope
        )
    axis.set(xscale="log", yscale="log", xlabel=_SIZE_LABELS[name], title=f"growth with {name}")
    ticks = sorted({row["size"] for row in rows})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)


_SIZE_LABELS = {
    "particles": "particles of layer 1 (half as many in layer 2)",
    "images": "images",
    "positions": "positions of an image",
}


def _panels(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * max(count, 1), 4.2), layout="constrained")
    return figure, figure.subplots(1, max(count, 1), squeeze=False, sharey=True)[0]


def _png(figure: Any) -> bytes:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=130)
    return held.getvalue()
