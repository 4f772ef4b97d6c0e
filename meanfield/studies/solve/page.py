"""The report: numbers into pictures, pictures and text into one self-contained page, all of it into a directory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from meanfield import storage
from meanfield.pages import plotting
from meanfield.pages.html import Results, assemble, figure, inline, table, to_json
from meanfield.studies.solve.measure import Run, gather


def write(run: Run, directory: str | Path, announce: Callable[[str], None] = lambda text: None) -> Results:
    """Measure everything and write report.html, results.json, PNG files and the network; returns the results."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_network(run, directory)
    results = gather(run, announce)
    announce("pictures and page")
    images = {name: plotting.png(drawn) for name, drawn in pictures(results).items()}
    text = page(results, images)
    for name, content in images.items():
        storage.write_atomically(directory / f"{name}.png", content)
    storage.write_atomically(directory / "results.json", to_json(results))
    storage.write_atomically(directory / "report.html", text)
    return results


def save_network(run: Run, directory: str | Path) -> Path:
    return storage.save_network(run.solution.network, Path(directory) / "network.safetensors")


def pictures(results: Results) -> dict[str, Any]:
    """Name -> Figure, for everything that the results allow."""
    rows, finite, segment, populations = (results[name] for name in ("rounds", "finite", "segment", "populations"))
    found: dict[str, Any] = {}
    if rows:
        found["values"] = plotting.values(rows)
        found["gaps"] = plotting.gaps(rows, results["settings"]["tolerance"])
    found["populations"] = plotting.populations(populations["before"], populations["after"])
    found["kernels"] = plotting.kernels(np.array(results["kernels"]["entries"]), results["kernels"]["masses"])
    found["images"] = _image_strip(results["predictions"])
    found["predictions"] = _prediction_scatter(results["predictions"])
    by_width = lambda drawn: {int(m): values for m, values in drawn.items()}  # noqa: E731
    found["finite"] = plotting.finite_networks(
        by_width(finite["sampled"]), by_width(finite["trained"]), finite["limit"]
    )
    found["segment"] = plotting.segment(segment, segment["midpoint_violation"])
    return found


def _image_strip(predictions: Results) -> Any:
    classes, judged = predictions["classes"], predictions["training"]
    what = "F" if len(classes) == 2 else "margin"
    rows = list(zip(judged["images"], judged["class_index"], judged["predicted"], judged["shown"]))
    captions = [f"a {classes[true]}, read as {classes[guess]}\n{what} = {shown:+.2f}" for _, true, guess, shown in rows]
    return plotting.image_strip(np.array(judged["images"]), captions, [true == guess for _, true, guess, _ in rows])


def _prediction_scatter(predictions: Results) -> Any:
    judged = {"training": predictions["training"], "held out": predictions["held_out"]}
    groups = {name: list(zip(found["class_index"], found["shown"])) for name, found in judged.items() if found}
    label = _output_label(predictions["classes"])
    return plotting.predictions(groups, predictions["classes"], label)


def _output_label(classes: Sequence[int]) -> str:
    return f"output F (above 0: a {classes[0]})" if len(classes) == 2 else "margin: true class minus best other"


def page(results: Results, images: dict[str, bytes]) -> str:
    """The page, with every picture inside it."""
    inside = {name: inline(content) for name, content in images.items()}
    parts = [_settings, _rounds, _reference, _populations, _predictions, _finite, _segment, _meaning]
    return assemble(
        escape(_title(results)), _claim(results), [part(results, inside) for part in parts], _footer(results)
    )


def _title(results: Results) -> str:
    classes = (
        " against ".join(map(str, results["predictions"]["classes"]))
        if len(results["predictions"]["classes"]) == 2
        else (f"{len(results['predictions']['classes'])} classes")
    )
    return f"A continuous CNN on {results['settings']['data']}: {classes}"


def _claim(results: Results) -> str:
    """One sentence with its figures."""
    answer, rows, reference = results["solution"], results["rounds"], results["reference"]
    layers = len(answer["widths"])
    images = results["predictions"]["training"]["count"]
    text = f"On {images} real images, the particle form of an infinitely wide CNN with {_count(layers, 'layer')} "
    if not rows:
        return (
            text
            + f"reached J = {_number(answer['value'])} before its first convex program was solved; nothing is proven "
            f"yet."
        )
    text += (
        f"reached J = <b>{_number(answer['value'])}</b>, and the convex program over the populations of its features "
        f"proves that no other "
        f"population of these features lies more than <b>{_short(answer['gap'])}</b> lower "
        f"({answer['relative_gap']:.1e} of J)"
    )
    if "difference" in reference:
        text += (
            f"; cvxpy solves the same program to {_number(reference['cvxpy_value'])}, "
            f"{_short(abs(reference['difference']))} from ours"
        )
    return text + "."


def _settings(results: Results, images: dict[str, str]) -> str:
    warned = "".join(f'<p class="warning"><strong>Warning:</strong> {escape(text)}</p>' for text in results["warnings"])
    shown = {name: _setting(value) for name, value in results["settings"].items()}
    rows = [[escape(name.replace("_", " ")), escape(value)] for name, value in shown.items()]
    return (
        "<h2>The problem</h2><p>J is the mean loss over the images plus three penalties: "
        "λ<sub>s</sub> Σ p<sub>i</sub> (Σ |w<sub>ij</sub>| p<sub>j</sub>)² for every pair of layers (source), "
        "λ<sub>u</sub> Σ p<sub>j</sub> |u<sub>j</sub>|² (readout), λ<sub>1</sub> Σ p<sub>i</sub> |z<sub>i</sub>|² "
        "(input). "
        "Masses p, kernels z and w, and the readout u all move.</p>"
        + warned
        + _terms(results)
        + f"<details><summary>All settings</summary>{table(['setting', 'value'], rows, text=True)}</details>"
    )


def _terms(results: Results) -> str:
    answer = results["solution"]
    parts = [
        [f"{name}{'' if name == 'loss' else ' penalty'}", _number(value)] for name, value in answer["terms"].items()
    ]
    total = [
        ["<b>J</b>", f"<b>{_number(answer['value'])}</b>"],
        ["J at the random start", _number(answer["start_value"])],
    ]
    lower = [
        ["dual bound (on this support)", _number(answer["dual_value"])],
        ["largest violated constraint (relative)", _short(answer["violation"])],
    ]
    over_all = "none proven" if answer["lower_bound"] is None else _number(answer["lower_bound"])
    return table(
        ["at the answer", "value (units of J)"], parts + total + lower + [["lower bound over all measures", over_all]]
    )


def _rounds(results: Results, images: dict[str, str]) -> str:
    rows, answer = results["rounds"], results["solution"]
    if not rows:
        return "<h2>Value per round</h2><p>No round was completed.</p>"
    last = rows[-1]
    text = (
        "<h2>Flow and convex program meet</h2><p>Each round lets the particles flow, freezes their features, and "
        "solves the convex program over the "
        f"populations of these features. The last flow ended {_short(last['flow_gap'])} above the dual bound of the "
        f"program frozen there. "
        f"{escape(answer['message'][:1].upper() + answer['message'][1:])}.</p>"
    )
    if not answer["last_flow_moved"]:
        text += (
            '<p class="warning"><strong>Read with care:</strong> the last flow found nothing below the point that it '
            "started from, the answer of the "
            "convex program before it; its small gap is then that program's and is no evidence that the flow alone "
            "gets there.</p>"
        )
    head = ["round", "J after flow", "J after program", "dual bound (on this support)"]
    head += ["flow gap", "program gap", "particles", "flow steps", "time, s"]
    body = [
        [
            str(row["round"] + 1),
            *(_number(row[name]) for name in ("flow_value", "value", "dual_value")),
            _short(row["flow_gap"]),
            _short(row["gap"]),
            _by(row["widths"]),
            str(row["flow_steps"]),
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]
    return (
        text
        + figure(images, "values", "Objective per round; the dual bound lies below both, on this support.")
        + figure(
            images,
            "gaps",
            "Duality gap per round. The flow's gap is measured before the convex program has touched its network.",
        )
        + table(head, body)
    )


def _reference(results: Results, images: dict[str, str]) -> str:
    found = results["reference"]
    text = (
        "<h2>cvxpy beside ours</h2><p>The program frozen at the final network, particles of zero mass dropped "
        f"({_by(found['widths'])} particles, {found['constraints']:,} equality constraints)"
    )
    if "skipped" in found:
        return text + f", was not solved with cvxpy: {escape(found['skipped'])}.</p>"
    text += (
        f", solved independently with cvxpy and Clarabel in {found['seconds']:.1f} s. A positive difference means "
        f"that cvxpy is lower.</p>"
    )
    rows = [
        ["J of our network", _number(found["our_value"])],
        ["cvxpy's optimum of its program", _number(found["cvxpy_value"])],
        ["difference, ours minus cvxpy's", _short(found["difference"])],
        ["duality gap of cvxpy's point, recomputed", _short(found["cvxpy_gap"])],
    ]
    return text + table(["", "value (units of J)"], rows)


def _populations(results: Results, images: dict[str, str]) -> str:
    effective = ", ".join(
        f"{value:.1f} in layer {index + 1}" for index, value in enumerate(results["populations"]["effective"])
    )
    return (
        f"<h2>Populations and kernels</h2><p>Repopulation moves mass between features. The answer uses as many "
        f"features as equal masses of number "
        f"1 / Σ p² would: {effective}.</p>"
        + figure(
            images,
            "populations",
            "Masses of the random start (before, equal) and of the answer (after), heaviest first.",
            wide=True,
        )
        + figure(
            images,
            "kernels",
            "First-layer kernels of the heaviest particles; the title is the mass p. One colour scale for all.",
        )
    )


def _predictions(results: Results, images: dict[str, str]) -> str:
    found = results["predictions"]
    rows = [
        [name, str(judged["count"]), f"{100 * judged['accuracy']:.1f} %"]
        for name, judged in (("training", found["training"]), ("held out", found["held_out"]))
        if judged
    ]
    note = "" if found["held_out"] else "<p>Every image was used for training: nothing is held out.</p>"
    return (
        "<h2>Predictions</h2>"
        + table(["images", "number", "accuracy"], rows)
        + note
        + figure(
            images,
            "images",
            "The first training images and what the network makes of them; a thick frame marks a mistake.",
            wide=True,
        )
        + figure(images, "predictions", f"For every image: {_output_label(found['classes'])}.")
    )


def _finite(results: Results, images: dict[str, str]) -> str:
    found = results["finite"]
    head = ["width m", "sampled: median J", "sampled: lowest to highest", "trained: J"]
    rows = []
    for m in sorted({*found["sampled"], *found["trained"]}, key=int):
        drawn, trained = sorted(found["sampled"].get(m, [])), found["trained"].get(m, [])
        spread = f"{_digits4(drawn[0])} to {_digits4(drawn[-1])}" if drawn else "&ndash;"
        rows.append(
            [
                m,
                _digits4(float(np.median(drawn))) if drawn else "&ndash;",
                spread,
                ", ".join(map(_digits4, trained)) or "&ndash;",
            ]
        )
    late = f" {found['trained_skipped']} trainings were skipped for lack of time." if found["trained_skipped"] else ""
    return (
        f"<h2>Finite networks against the limit</h2><p>Sampled: m particles per layer drawn by mass from the answer, "
        f"{found['draws']} draws at each "
        f"m. Trained: ordinary networks of width m from random starts, {found['trained_steps']} Adam steps each with "
        f"equal "
        f"fixed masses; short trainings of few seeds: not the best that a width can reach, and no rate.{late}</p>"
        + figure(
            images,
            "finite",
            "Objective of finite networks against their width; the line is the continuous one. Both axes are "
            "logarithmic.",
        )
        + table(head, rows)
    )


def _segment(results: Results, images: dict[str, str]) -> str:
    found = results["segment"]
    violation, (a, b) = found["midpoint_violation"], found["seeds"]
    verdict = (
        "J is not convex in weights"
        if violation["weights"] > 1e-6
        else "this pair does not show that J is not convex in weights"
    )
    middle, lines = (
        len(found["t"]) // 2,
        {"program": "program variables (mixture of the two measures)", "weights": "weights (particle by particle)"},
    )
    rows = [
        [text, *(_number(found[name][i]) for i in (0, middle, -1)), _short(violation[name])]
        for name, text in lines.items()
    ]
    return (
        f"<h2>Convex in populations, not in weights</h2><p>Two flows of {found['steps']} steps from seeds {a} and {b} "
        f"end at solutions A and B of "
        f"equal widths ({_by(found['widths'])}). J is followed along the straight line between them, once in program "
        f"variables and once in weights. "
        f"Midpoint violation max(0, J(mid) &minus; (J<sub>A</sub> + J<sub>B</sub>) / 2): "
        f"{_short(violation['program'])} in program variables, "
        f"{_short(violation['weights'])} in weights; {verdict}.</p>"
        + figure(images, "segment", "The same two ends. Above the dotted chord means: not convex.", wide=True)
        + table(["line", "J at A", "J at the middle", "J at B", "midpoint violation"], rows)
    )


def _meaning(results: Results, images: dict[str, str]) -> str:
    attained = (
        "For this problem the infimum over all measures may not be attained (see the warning above): the value can "
        "keep falling with more rounds."
        if results["warnings"]
        else "Here the infimum over all measures is attained; an unbounded activation with two layers or more would "
        "need bounds for that."
    )
    return (
        "<h2>What this proves, and what it does not</h2>"
        "<p>The convex program is convex in the populations of frozen features, by a change of variables. That does "
        "not make the loss convex in "
        "weights, as the last figure shows, and it does not say that gradient descent in weights finds the optimum.</p>"
        "<p>The duality gap is a proof in float64, computed outside the solver, but on this support: among all "
        "populations of the features that "
        "these particles carry, none is better by more than the gap. Features that nobody has tried may do better; a "
        "bound over all measures would "
        "have to exclude them, and "
        + ("none is claimed here. " if results["solution"]["lower_bound"] is None else "the one reported above does. ")
        + "Different seeds may therefore end at different values.</p>"
        "<p>Finite networks only approach these values: the sampled and trained ones above lie off the limit by the "
        "amounts in their table, "
        f"and with few seeds that is an illustration, not a rate. {attained}</p>"
    )


def _footer(results: Results) -> str:
    used = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return escape(
        f"Seed {results['seed']}; solved in {results['solution']['seconds']:.1f} s. {used}. Every number is in "
        f"results.json."
    )


def _setting(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _by(widths: Sequence[int]) -> str:
    return " &times; ".join(map(str, widths))


def _number(value: float) -> str:
    return f"{value:.8g}"


def _digits4(value: float) -> str:
    return f"{value:.4g}"


def _short(value: float | None) -> str:
    return "unknown" if value is None or not math.isfinite(value) else "0" if value == 0 else f"{value:.2e}"
