"""The sections of the landscape study's page: sentences that carry their figures, pictures, small tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meanfield.bench.study import Found
from meanfield.bench.sweep import Row, Rows, Tables, groups, select
from meanfield.pages import interactive
from meanfield.pages.html import Details, Figure, Interactive, Note, Section, Table
from meanfield.pages.interactive import Relief
from meanfield.pages.words import capital, count, listed, two
from meanfield.rates import Interval
from meanfield.studies.landscape.measure import SHARPNESS
from meanfield.studies.landscape.pictures import CURVATURES, LOSS, METRICS, NAMES, WAYS, note
from meanfield.studies.landscape.summary import compared, extent, says

LIMITS = Section(
    "What this does not say",
    [
        "A surface is a slice: two directions out of thousands. Random ones show the mean curvature and hide "
        "its ends; eigenvectors show the ends and nothing of the rest. No picture says that a network generalises.",
        "Filter-normalised pictures of different networks may be compared only where rescaling filters leaves the "
        "function as it is: ReLU and its kind, one factor per layer. The warnings of each surface name the layers "
        "where it does not.",
        "The error of a surface is an estimate from check points, no bound. Correlations are over these networks, "
        "these images and this recipe; a digit data set of 8x8 pixels is small and easy.",
    ],
)


def claim(found: Found) -> str:
    rows = [row for row in found.get("correlations", ()) if row["against"] == "held_out_loss"]
    matched = [row for row in rows if row["when"] == "equal training loss"]
    if not matched:
        return "The loss around trained networks, with the error of every surface, and their sharpness with intervals."
    clear = [row for row in matched if says(row["spearman"])]
    firm = [row for row in clear if row["without_any"]]
    over = f"over {count(matched[0]['networks'], 'network')}"
    named, kept = (
        listed([f"{NAMES[row['measure']]} ({_hundredths(row['spearman'])})" for row in each]) if each else ""
        for each in (clear, firm)
    )
    if not clear:
        return (
            f"At equal training loss none of {count(len(matched), 'measure')} of sharpness goes with held-out loss "
            f"{over}: every interval of the rank correlation holds zero."
        )
    if not firm:
        return (
            f"At equal training loss no measure of sharpness goes with held-out loss {over} in a way that does not "
            f"hang on one arm: of {len(matched)} rank correlations, {named} has an interval without zero, and no "
            "longer where one arm is left out."
        )
    go = "goes" if len(firm) == 1 else "go"
    return (
        f"At equal training loss, {over}, {count(len(firm), 'measure')} of {len(matched)} {go} with held-out loss by "
        f"rank correlation, whichever arm is left out: {kept}."
    )


def surfaces(found: Found, tables: Tables) -> Section:
    rows = found["surfaces"]
    reach = extent([row["axis"][-1] for row in tables["surfaces"]])
    text = (
        f"{capital(count(len(rows), 'surface'))} from -{reach} to {reach} along both directions of a plane of kind "
        f"{rows[0]['plane']}. {_made(rows, len(tables['surfaces'][0]['axis']))}"
    )
    head = ["network", "least", "largest", "estimated error", "share of the range", "evaluations", "checks", "status"]
    table = [
        [
            row["arm"],
            f"{row['least']:.3g}",
            f"{row['largest']:.3g}",
            f"{row['error']:.2g}",
            f"{row['share']:.2%}",
            f"{row['evaluations']:g}",
            row["checks"],
            row["status"],
        ]
        for row in rows
    ]
    caption = (
        "Training loss; scales differ from panel to panel and begin at the estimated error. A cross is where the least "
        "value of the grid is, if the error tells it from the network's. The surface above can be turned, and its menu "
        "has every network."
    )
    turned = Interactive("surfaces", caption, reliefs(tables["surfaces"]))
    return Section(
        "Surfaces",
        [text, turned, Table(head, table), *_warnings(tables["surfaces"])],
    )


def _made(rows: Rows, grid: int) -> str:
    """How the values of surfaces, all of one kind, were found."""
    if all(row["status"] == "exact" for row in rows):
        return f"Every value is evaluated, at the {grid * grid:,} points of a grid of {grid}x{grid}."
    met = [row for row in rows if row["status"] == "met"]
    return (
        "A surface is a polynomial through exact values at Chebyshev points; its largest error is estimated from "
        "further exact values, at points where a polynomial of this degree errs most. "
        f"{capital(count(len(met), 'surface'))} of {len(rows)} {'keeps' if len(met) == 1 else 'keep'} the tolerance by "
        f"this estimate, with {extent([row['evaluations'] for row in rows])} evaluations; the grid of {grid}x{grid} "
        f"has {grid * grid:,} points."
    )


def reliefs(rows: Rows) -> str:
    shown = [_relief(row) for row in rows]
    return interactive.reliefs(shown, "first direction", "second direction", "training loss")


def _relief(row: Row) -> Relief:
    axis, values = np.asarray(row["axis"]), np.asarray(row["values"][LOSS], dtype=float)
    marks = [
        (a, b, float(values[np.abs(axis - a).argmin(), np.abs(axis - b).argmin()]))
        for a, b in row["marks"].values()
        if axis[0] <= min(a, b) and max(a, b) <= axis[-1]
    ]
    checks = [(a, b, value) for a, b, value in row["check_points"]]
    return Relief(row["arm"], row["axis"], row["axis"], values, f"{row['arm']}: {note(row)}", marks, checks)


def _warnings(rows: Rows) -> list[Any]:
    said = {text: [row["arm"] for row in rows if text in row["warnings"]] for row in rows for text in row["warnings"]}
    if not said:
        return []
    return [
        Details(
            "Warnings",
            Table(["warning", "networks"], [[text, ", ".join(arms)] for text, arms in said.items()], text=(0, 1)),
        )
    ]


def sharpness(found: Found, tables: Tables) -> Section:
    text = (
        "At the end of training, means over seeds with 95% intervals. Eigenvalues, traces and norms are of the mean "
        "training loss; the rise is that of the loss at a tenth of the filters' lengths away, the adaptive one the "
        "largest found within half of the weights' sizes. Where the loss of an arm is not the cross-entropy it is on a "
        "scale of its own."
    )
    return Section(
        "Sharpness at the end of training",
        [text, *_scatter(tables, "sharpness"), Details("All figures", _measures(found["sharpness"]))],
    )


def matched(found: Found, tables: Tables) -> Section:
    reached = found["reach"]
    targets = listed([f"{value:g} ({name.replace('_', '-')})" for name, value in reached["targets"].items()])
    text = (
        "Training loss differs from arm to arm, and sharpness falls with it. Here every network is taken where its "
        f"training passes the same loss, {targets}, between the two checkpoints on either side of it. "
        f"{capital(count(reached['networks'], 'network'))} {'has' if reached['networks'] == 1 else 'have'} that loss "
        f"to within {reached['largest_deviation']:.1g} of itself."
    )
    left = [f"{arm} ({number})" for arm, number in reached["left_out"].items()]
    notes = [Note("Left out:", f"networks that never reach it, {listed(left)}.")] if left else []
    return Section(
        "Sharpness at equal training loss",
        [text, *notes, *_scatter(tables, "matched"), Details("All figures", _measures(found["matched"]))],
    )


def _scatter(tables: Tables, part: str) -> list[Any]:
    caption = (
        "Measures against held-out loss, a point per network, of those trained with the cross-entropy that reach the "
        "common loss."
    )
    return [Figure(part, caption, wide=True)] if len(compared(tables, part)) > 1 else []


def _measures(rows: Rows) -> Table:
    names = (*SHARPNESS, "train_loss", "held_out_loss")
    head = ["networks", "number", *(NAMES.get(name, name.replace("_", " ")) for name in names)]
    head[head.index(NAMES["train_loss"])] = "training loss"
    return Table(head, [[row["arm"], row["networks"], *(row[name] for name in names)] for row in rows])


def correlations(found: Found, tables: Tables) -> Section:
    rows = found["correlations"]
    text = (
        "Spearman's rank correlation with 95% bootstrap intervals, over the networks that were trained with the "
        "cross-entropy and reach the common loss. With held-out loss whole arms are redrawn, for networks of one arm "
        f"are alike. {_ladder_text(rows)} {_held_out_text(rows)} A star marks intervals without zero, which one "
        "measure in twenty has by chance; a second star those that stay so whichever arm is left out."
    )
    whens = list(dict.fromkeys(row["when"] for row in rows))
    items: list[Any] = [text]
    for against, title in (("held_out_loss", "held-out loss"), ("l2", "strength of the l2 penalty")):
        head = [f"rank correlation with {title}", *whens]
        table = [
            [NAMES[name], *_cells(rows, name, against, whens)] for name in dict.fromkeys(row["measure"] for row in rows)
        ]
        if against == "held_out_loss":
            head.append(f"{whens[-1]}, any one arm left out")
        items.append(Table(head, table))
    return Section("Which measure goes with held-out loss?", items)


def _cells(rows: Rows, name: str, against: str, whens: Sequence[str]) -> list[str | None]:
    found = [select(rows, measure=name, against=against, when=when) for when in whens]
    cells = [_starred(each[0]) if each else None for each in found]
    if against == "held_out_loss":
        cells.append(" to ".join(f"{each:.2f}" for each in found[-1][0]["without_an_arm"]) if found[-1] else None)
    return cells


def _starred(row: Row) -> str:
    stars = "**" if row["without_any"] else "*"
    return f"{_hundredths(row['spearman'])} {stars}" if says(row["spearman"]) else _hundredths(row["spearman"])


def _hundredths(found: Interval) -> str:
    if not np.isfinite(found.value):
        return "undefined"
    value, low, high = (f"{round(each, 2) + 0.0:.2f}" for each in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})" if found.bounded else value


def _ladder_text(rows: Rows) -> str:
    found = {row["measure"]: row["spearman"] for row in select(rows, against="l2", when="end of training")}
    if not found:
        return ""
    trace, rise = found["trace"], found["rise"]
    text = (
        f"With the strength of the l2 penalty the trace has a correlation of {_hundredths(trace)} at the end of "
        f"training, and the rise one of {_hundredths(rise)}"
    )
    opposite = says(trace) and says(rise) and trace.value * rise.value < 0
    return f"{text}{': they order the same networks oppositely' if opposite else ''}."


def _held_out_text(rows: Rows) -> str:
    sentences = []
    for (when,), each in groups(select(rows, against="held_out_loss"), "when").items():
        clear = [NAMES[row["measure"]] for row in each if says(row["spearman"])]
        time = f"At {when}" if when.startswith("equal") else f"At the {when}"
        sentences.append(f"{time} intervals leave out zero for {listed(clear) if clear else 'no measure'}.")
    return " ".join(sentences)


def toy(found: Found, tables: Tables) -> Section:
    rows = found["toy"]
    text = (
        "One function, its first layer written larger and the second one smaller. A factor for the whole layer keeps "
        "the surface of filter-normalised directions. A factor of its own for every channel keeps the function as "
        "well, and makes the surface another one, even with ReLU: a filter above has entries from all channels and "
        "one length. Balancing the channels first makes all of them one. With tanh even one factor makes another "
        "function. "
        f"{_toy_text(rows)}"
    )
    head = [
        "activation",
        "written",
        "networks",
        "largest difference of outputs",
        "mean loss",
        "times that of the first",
    ]
    table = [
        [
            row["activation"],
            row["writing"],
            row["networks"],
            f"{row['difference']:.1g}",
            f"{row['mean_loss']:.4g}",
            row["ratio"],
        ]
        for row in rows
    ]
    caption = "Training loss around one function, written in several ways; directions are drawn from one seed."
    return Section("What a filter is", [text, Figure("toy", caption, wide=True), Table(head, table)])


def _toy_text(rows: Rows) -> str:
    named = {(row["activation"], row["writing"]): row for row in rows}
    layer, channel = (named.get(("relu", f"per {each}")) for each in ("layer", "channel"))
    if layer is None or channel is None:
        return ""
    return (
        f"With ReLU the mean loss over the surface is {layer['ratio'].value:.6g} times the network's own where the "
        f"layer is rescaled, and {two(channel['ratio'].value)} times where channels are."
    )


def slices(found: Found, tables: Tables) -> Section:
    known = found["slices"]
    random, trace = known["random"], known["trace_over_size"]
    kinked = "upward. That curvature is of the smooth piece at hand and is not seen at this distance."
    seen = "downward." if known["smallest_seen"] < 0 else kinked
    text = (
        f"Along {known['directions']} random directions of length one the curvature is {random} in the mean, and trace "
        f"/ D is {trace}: one figure, since the mean of d^T H d over such directions is trace / D, with D = "
        f"{known['parameters']:,}. The largest curvature is {known['top']}, {two(known['top'].value / trace.value)} "
        f"times as much, and the smallest {known['smallest']}. A random slice hides both. Along the eigenvector of the "
        f"smallest, from {known['step']:.2g} on one side of the network to as much on the other, the loss bends by "
        f"{two(known['smallest_seen'])}: {seen}"
    )
    caption = (
        "The loss along random directions and along the two eigenvectors, at equal distances; right, its rise without "
        "the eigenvector of the largest eigenvalue, on a scale of its own."
    )
    return Section("What a random slice hides", [text, Figure("slices", caption, wide=True)])


def joins(found: Found, tables: Tables) -> Section:
    rows = found["barriers"]
    width = max(row["width"] for row in rows)
    sentences = [f"{WAYS[row['how']]} {row['barrier']}" for row in select(rows, width=width, figure=rows[0]["figure"])]
    text = (
        "Two particle networks from different starts, joined in four ways. The barrier is the largest rise above the "
        f"chord between the ends. At widths {width}/{width}, means over {count(rows[0]['pairs'], 'pair')}, of the "
        f"{rows[0]['figure']}: {listed(sentences)}. A mixture has none by proof, since loss and J are convex in "
        "measures. Where kernels are fitted by least squares the penalty may rise while the loss does not: J is shown "
        "apart from the loss."
    )
    head = ["figure", "path", "width", "pairs", "barrier", "in units of the chord below it"]
    table = [
        [row["figure"], WAYS[row["how"]], row["width"], row["pairs"], row["barrier"], row["relative"]] for row in rows
    ]
    fitted = [f"{WAYS[row['how']]}, {row['figure']}: {row['slope']}" for row in found["slopes"]]
    items: list[Any] = [text, Figure("joins", "Values along the paths of the first pair.", wide=True)]
    if len({row["width"] for row in rows}) > 1:
        items.append(
            Figure(
                "barriers", "Barriers over the width, a point per pair, of paths that have one throughout.", wide=True
            )
        )
    if fitted:
        items.append(f"Slopes of the logarithms with 95% bootstrap intervals: {'; '.join(fitted)}.")
    return Section("Two networks, joined in four ways", [*items, Details("All figures", Table(head, table))])


def metric(found: Found, tables: Tables) -> Section:
    """Figures of networks of growing width in either metric."""
    rows = found["metric"]
    widths = sorted({row["width"] for row in tables["metric"] if row["width"] is not None})
    text = (
        "Networks of equal masses, drawn from one trained particle network. In the metric of the flow, which weights "
        "what a particle does by its mass, the largest eigenvalue and the Gauss-Newton trace have limits in the width, "
        "and the rest of the trace grows with it, since every particle adds its own curvature. In the weights "
        "themselves eigenvalues vanish like 1/m: they compare no two widths."
    )
    head = ["metric", "figure", *(f"width {width}" for width in widths), "network drawn from", "slope"]
    table = [
        [
            METRICS[row["metric"]],
            CURVATURES[row["figure"]],
            *(two(row["means"][str(width)]) for width in widths),
            "" if row["source"] is None else two(row["source"]),
            row["slope"] or "",
        ]
        for row in rows
    ]
    items: list[Any] = [text]
    if len(widths) > 1:
        items.append(Figure("metric", "Absolute values over the width, a point per draw.", wide=True))
    return Section("Which curvature has a limit", [*items, Details("Means over draws", Table(head, table))])


def trajectory(found: Found, tables: Tables) -> Section:
    rows = found["trajectory"]
    worst = max(rows, key=lambda row: row["factor"])
    text = (
        "The checkpoints of a training in the plane of their two principal components, which passes through the last "
        "one. The plane explains most of the squared distances, but much of that a random walk with the same step "
        "lengths has as well. And the plane does not show the loss of the path: of the network "
        f"{worst['arm']} the checkpoint of epoch {worst['epoch']} has the loss {worst['loss']:.3g}, and its place on "
        f"the plane {worst['loss_on_plane']:.3g}, where the plane explains {worst['explained']:.1%}."
    )
    head = [
        "network",
        "checkpoints",
        "explained",
        "random walks",
        "epoch of the largest difference",
        "loss",
        "on the plane",
    ]
    table = [
        [
            row["arm"],
            row["checkpoints"],
            f"{row['explained']:.1%}",
            f"{row['null'].value:.1%} ({row['null'].low:.1%} to {row['null'].high:.1%})",
            row["epoch"],
            f"{row['loss']:.3g}",
            f"{row['loss_on_plane']:.3g}",
        ]
        for row in rows
    ]
    caption = "Training loss of the checkpoints, and at their places on the plane of the picture."
    return Section("The path on a plane", [text, Figure("trajectory", caption, wide=True), Table(head, table)])


def train(found: Found, tables: Tables) -> Section:
    rows = []
    names = ("network", "activation", "loss", "labels", "penalty", "strength", "width")
    for named, each in groups(tables["train"], *names).items():
        last = [row for row in each if row["epoch"] == max(other["epoch"] for other in each)]
        shown = [extent([row[figure] for row in last]) for figure in ("train_loss", "held_out_loss")]
        right = extent([row["held_out_accuracy"] for row in last])
        rows.append([*named[:5], f"{named[5]:g}", named[6], last[0]["epoch"], len(last), *shown, right])
    head = [*names, "epochs", "networks", "training loss", "held-out loss", "held-out accuracy"]
    return Section("The networks", ["Losses and accuracies in evaluation mode at the end.", Table(head, rows)])


def claim_of_one(found: Found) -> str:
    (row,) = found["surfaces"]
    ends = f"{row['least']:.4g} and {row['largest']:.4g}"
    known = "exact" if row["status"] == "exact" else f"with an estimated error of {row['error']:.2g} ({row['status']})"
    return f"{row['arm']}: a training loss between {ends} on a plane of kind {row['plane']}, {known}."


def figures(found: Found, tables: Tables) -> Section:
    """Everything that a surface has: losses, accuracies, J and its terms."""
    rows = [
        [row["arm"], name, f"{np.min(values):.5g}", f"{np.max(values):.5g}", f"{row['errors'][name]:.2g}"]
        for row in tables["surfaces"]
        for name, values in row["values"].items()
    ]
    text = (
        "The tolerance is for losses and J; accuracy jumps where a polynomial does not, and has its estimate without a "
        "promise."
    )
    return Section(
        "All figures of the surface",
        [text, Table(["network", "figure", "least of the grid", "largest", "estimated error"], rows)],
    )
