"""The report: numbers into sentences, small tables and one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from markupsafe import Markup

from meanfield import storage
from meanfield.certificates.unseen import LEVEL, percent
from meanfield.pages import html, plotting
from meanfield.pages.html import Details, Figure, Note, Page, Results, Section, Table
from meanfield.pages.words import by, capital, count, number, scientific
from meanfield.storage import networks
from meanfield.studies.solve.measure import gather
from meanfield.studies.solve.pictures import NAMES, SMALL, output_label, pictures
from meanfield.studies.solve.run import Run

REPORT, RESULTS = "report.html", "results.json"
FILES = (networks.NETWORK, RESULTS, REPORT, *(f"{name}.png" for name in NAMES))  # that there may be

OBJECTIVE = Markup(
    "J is the mean loss over the images plus three penalties: λ<sub>s</sub> Σ p<sub>i</sub> (Σ |w<sub>ij</sub>| "
    "p<sub>j</sub>)² for every pair of layers (source), λ<sub>u</sub> Σ p<sub>j</sub> |u<sub>j</sub>|² (readout), "
    "λ<sub>1</sub> Σ p<sub>i</sub> |z<sub>i</sub>|² (input). Masses p, kernels z and w, and the readout u all move."
)


def files(run: Run, announce: Callable[[str], None] = lambda text: None) -> tuple[Results, dict[str, bytes | str]]:
    """Measure everything; returns the results and name -> content of every file: the page, results.json, PNG files and
    the network.
    """
    results = gather(run, announce)
    announce("pictures and page")
    images = {name: plotting.png(drawn) for name, drawn in pictures(results).items()}
    text = html.render(page(results), {name: html.inline(content) for name, content in images.items()})
    found = {**network_files(run, results), REPORT: text}
    return results, {**found, **{f"{name}.png": content for name, content in images.items()}}


def network_files(run: Run, results: Results) -> dict[str, bytes | str]:
    """The network, and what is known of it so far."""
    return {networks.NETWORK: networks.pack(run.solution.network, run.made), RESULTS: storage.to_json(results)}


def page(results: Results) -> Page:
    answer = [_found, _predictions, _problem, _rounds, _populations]
    sections = [*(section(results) for section in answer), *_proof(results), *_close(results), _meaning(results)]
    remark = f"Solved in {results['solution']['seconds']:.1f} s. Every number is in results.json."
    made: Mapping[str, Any] = results["made"]
    return Page(_title(results), _claim(results), sections, made, remark)


def _title(results: Results) -> str:
    classes = results["predictions"]["classes"]
    named = " against ".join(map(str, classes)) if len(classes) == 2 else f"{len(classes)} classes"
    return f"A continuous CNN on {results['made']['settings']['data']}: {named}"


def _claim(results: Results) -> str | Markup:
    """One sentence with its figures."""
    answer, reference, judged = results["solution"], results.get("reference", {}), results["predictions"]
    layers = count(len(answer["widths"]), "layer")
    text = Markup("On {:,} real images, the particle form of an infinitely wide CNN with {} ").format(
        results["images"], layers
    )
    value = number(answer["value"])
    if not results["rounds"]:
        return text + f"reached J = {value} before its first convex program was solved; nothing is proven yet."
    if judged["held_out"]:
        text += Markup("reads <b>{:.1%}</b> of {:,} held-out images rightly. It ").format(
            judged["held_out"]["accuracy"], judged["held_out"]["count"]
        )
    text += Markup(
        "reached J = <b>{}</b>, and the convex program over the populations of its features proves that no other "
        "population of these features lies more than <b>{}</b> lower ({:.1e} of J)"
    ).format(value, scientific(answer["gap"]), answer["relative_gap"])
    if "difference" in reference:
        apart = scientific(abs(reference["difference"]))
        text += f"; cvxpy solves the same program to {number(reference['cvxpy_value'])}, {apart} from ours"
    return text + "."


def _found(results: Results) -> Section:
    """The answer, and a finite network beside it, in one table."""
    answer, judged, peer = results["solution"], results["predictions"], results["peer"]
    head, rows = ["", "continuous network"], _answered(answer, judged, by(answer["widths"]), answer["seconds"])
    rows.insert(
        1, ["duality gap (on this support)", f"{scientific(answer['gap'])} ({answer['relative_gap']:.1e} of J)"]
    )
    if "skipped" in peer:
        return Section(
            "The answer", [f"No finite network was trained beside it: {peer['skipped']}.", Table(head, rows)]
        )
    other = _answered({**peer, "terms": peer}, peer, by(peer["widths"]), peer["seconds"])
    other.insert(1, ["", "none known"])
    beside = Table([*head, "finite network, Adam"], [[*row, right] for row, (_, right) in zip(rows, other)])
    text = (
        "The finite network has the same layers and begins at the same start, with as many channels as there are "
        "particles. It is trained on the same images and the same J, but with equal masses that stay, by Adam in "
        f"float32: {peer['steps']:,} steps of {peer['batch']} images at a learning rate that is annealed to zero."
    )
    ended = (
        [] if peer["status"] == "completed" else [Note("The finite network's training ended early:", peer["message"])]
    )
    return Section("The answer, and a finite network beside it", [beside, text, *ended])


def _answered(found: Results, judged: Results, widths: str, seconds: float) -> list[list[Any]]:
    named = {"training": judged["training"], "held-out": judged["held_out"]}
    return [
        ["J", f"{found['value']:.6g}"],
        ["mean loss", f"{found['terms']['loss']:.5g}"],
        *(
            [f"accuracy on {each['count']:,} {name} images", f"{each['accuracy']:.2%}"]
            for name, each in named.items()
            if each
        ),
        ["particles, or channels", widths],
        ["time, s", f"{seconds:.0f}"],
    ]


def _problem(results: Results) -> Section:
    warned = [Note("Warning:", text) for text in results["warnings"]]
    rows = [[name.replace("_", " "), _setting(value)] for name, value in results["made"]["settings"].items()]
    settings = Details("All settings", Table(["setting", "value"], rows, text=(0, 1)))
    return Section(
        "The problem", [OBJECTIVE, f"Images: {results['made']['data']}.", *warned, _terms(results), settings]
    )


def _setting(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _terms(results: Results) -> Table:
    answer, bold = results["solution"], Markup("<b>{}</b>").format
    lower = answer["lower_bound"]
    rows = [
        *([name if name == "loss" else f"{name} penalty", number(value)] for name, value in answer["terms"].items()),
        [bold("J"), bold(number(answer["value"]))],
        ["J at the random start", number(answer["start_value"])],
        ["dual bound (on this support)", number(answer["dual_value"])],
        ["largest violated constraint (relative)", scientific(answer["violation"])],
        ["lower bound over all measures", "none proven" if lower is None else number(lower)],
        *_unproven(results["rounds"]),
    ]
    return Table(["at the answer", "value (units of J)"], rows)


def _unproven(rows: list[Results]) -> list[list[str]]:
    """The bound of the last search, and how far it can be trusted."""
    last = rows[-1] if rows else {}
    if not _given(last.get("search_bound")):
        return []
    if last["refuted_bound"] is not None:
        return [["bound of the last search, refuted by J", number(last["refuted_bound"])]]
    named = f"best of {last['search_starts']:,} starts, not proven"
    found = [[named, number(last["search_bound"])]]
    found.append(["chance that as many lower it, estimated", f"at most {percent(last['unseen_chance'])}"])
    if _given(last["unseen_lowering"]):
        found.append([f"with a chance of {LEVEL:.0%} by more than", scientific(last["unseen_lowering"])])
    return found


def _given(figure: float | None) -> bool:
    """Whether there is one: stored, what is infinite is None."""
    return figure is not None and math.isfinite(figure)


def _rounds(results: Results) -> Section:
    rows, answer = results["rounds"], results["solution"]
    if not rows:
        return Section("Value per round", ["No round was completed."])
    text = (
        "Each round lets the particles flow, freezes their features, and solves the convex program over the "
        f"populations of these features. The last flow ended {scientific(rows[-1]['flow_gap'])} above the dual bound "
        f"of the program frozen there. {capital(answer['message'])}."
    )
    care = (
        "the last flow found nothing below the point that it started from, the answer of the convex program before "
        "it; its small gap is then that program's and is no evidence that the flow alone gets there."
    )
    gaps = "Duality gap per round. The flow's gap is measured before the convex program has touched its network."
    head = ["round", "J after flow", "J after program", "dual bound (on this support)"]
    head += ["flow gap", "program gap", "particles", "flow steps", "time, s"]
    return Section(
        "Flow and convex program meet",
        [
            text,
            *([] if answer["last_flow_moved"] else [Note("Read with care:", care)]),
            Figure("values", "Objective per round; the dual bound lies below both, on this support."),
            Figure("gaps", gaps),
            Table(head, list(map(_round, rows))),
        ],
    )


def _proof(results: Results) -> list[Section]:
    """How far the bound over all measures came, where one was asked for."""
    proven = results["solution"]["proven"]
    if proven is None:
        return []
    if proven["reason"]:
        return [Section("Proven over all measures", [f"Nothing: {proven['reason']}."])]
    text = (
        f"No network of any width, with any kernels, has a J below {number(proven['value'])}: {proven['share']:.2%} of "
        f"the J reached is proven, after {proven['seconds']:.0f} s ({proven['kind']})."
    )
    caption = "The share of J that is proven, against the seconds spent on it; at 1 the answer would be the optimum."
    return [Section("Proven over all measures", [text, Figure("proof", caption)])]


def _round(row: Results) -> list[Any]:
    values = [number(row[name]) for name in ("flow_value", "value", "dual_value")]
    gaps = [scientific(row["flow_gap"]), scientific(row["gap"])]
    return [row["round"] + 1, *values, *gaps, by(row["widths"]), row["flow_steps"], f"{row['seconds']:.1f}"]


def _reference(results: Results) -> Section:
    found = results["reference"]
    text = (
        f"The program frozen at the final network, particles of zero mass dropped ({by(found['widths'])} particles, "
        f"{found['constraints']:,} equality constraints), was "
    )
    if "skipped" in found:
        return Section("cvxpy beside ours", [f"{text}not solved with cvxpy: {found['skipped']}."])
    text += f"solved independently with cvxpy and Clarabel in {found['seconds']:.1f} s. "
    rows = [
        ["J of our network", number(found["our_value"])],
        ["cvxpy's optimum of its program", number(found["cvxpy_value"])],
        ["difference, ours minus cvxpy's", scientific(found["difference"])],
        ["duality gap of cvxpy's point, recomputed", scientific(found["cvxpy_gap"])],
    ]
    positive = "A positive difference means that cvxpy is lower."
    return Section("cvxpy beside ours", [text + positive, Table(["", "value (units of J)"], rows)])


def _populations(results: Results, prefix: str = "") -> Section:
    effective = results["populations"]["effective"]
    layers = ", ".join(f"{value:.1f} in layer {index + 1}" for index, value in enumerate(effective))
    text = (
        "Repopulation moves mass between features. The answer uses as many features as equal masses of number 1 / Σ "
        f"p² would: {layers}."
    )
    masses = "Masses of the random start (before, equal) and of the answer (after), heaviest first."
    kernels = "First-layer kernels of the heaviest particles; the title is the mass p. One colour scale for all."
    pictures = [Figure(f"{prefix}populations", masses, wide=True), Figure(f"{prefix}kernels", kernels)]
    return Section("Populations and kernels", [text, *pictures])


def _predictions(results: Results) -> Section:
    found = results["predictions"]
    name = "held-out" if found["held_out"] else "training"
    judged, shown = found["held_out"] or found["training"], found["images"]
    note = [] if found["held_out"] else ["Every image was used for training: nothing is held out."]
    counts = (
        f"All {judged['count']:,} {name} images: true class by row, what the network reads by column. Blue: right, in "
        "shares of their class; orange: mistakes."
    )
    images = (
        f"Of the {name} images: mistakes first, in a thick frame ({shown['mistakes']} in all), then those that were "
        "read rightly with the least margin."
    )
    margins = f"For every image: {output_label(found)}."
    pictures = [Figure("confusion", counts), Figure("images", images, wide=True), Figure("predictions", margins)]
    return Section("What it reads", [*note, *pictures])


def _close(results: Results) -> list[Section]:
    """What only a small program allows: of this one, or of a small one of the same images."""
    if "finite" in results:
        return [section(results) for section in (_reference, _finite, _segment)]
    small = results["small"]
    title = "The second part: a small program"
    why = (
        "The program above is too large for cvxpy, and its images are too many for hundreds of networks. What only a "
        "small program allows is shown of a small one. "
    )
    if "skipped" in small:
        return [Section(title, [f"{why}It was not solved: {small['skipped']}."])]
    sections = [_reference(small), _populations(small, SMALL), _finite(small), _segment(small)]
    return [
        Section(title, [why + _sibling(small)]),
        *(replace(each, title=f"Small program: {_lower(each.title)}") for each in sections),
    ]


def _sibling(small: Results) -> str:
    answer, classes, (_, height, width) = small["solution"], small["classes"], small["shape"]
    chosen = "" if small["chosen"] else ", the two classes that are confused most above"
    return (
        f"Everything from here on is about {small['images']} of the training images, {classes[0]} against "
        f"{classes[1]}{chosen}, averaged down to {height} × {width} pixels, in two layers of 3 × 3 kernels (tanh, no "
        "pooling, average readout) with squared loss and penalties of its own. It ended at J = "
        f"{number(answer['value'])} with a duality gap of {scientific(answer['gap'])} on its support, after "
        f"{count(answer['rounds'], 'round')} in {answer['seconds']:.1f} s."
    )


def _lower(title: str) -> str:
    return title[:1].lower() + title[1:]


def _finite(results: Results) -> Section:
    found = results["finite"]
    text = (
        f"Sampled: m particles per layer drawn by mass from the answer, {found['draws']} draws at each m. Trained: "
        f"ordinary networks of width m from random starts, {found['trained_steps']} Adam steps each with equal fixed "
        "masses; short trainings of few seeds: not the best that a width can reach, and no rate."
    )
    if found["trained_skipped"]:
        text += f" {found['trained_skipped']} trainings were skipped for lack of time."
    drawn = sum(map(len, found["sampled"].values()))
    if drawn < found["draws"] * found["sampled_widths"]:
        text += f" Only {drawn} networks were drawn, for lack of time."
    caption = (
        "Objective of finite networks against their width; the line is the continuous one. Both axes are logarithmic."
    )
    head = ["width m", "sampled: median J", "sampled: lowest to highest", "trained: J"]
    rows = []
    for m in sorted({*found["sampled"], *found["trained"]}, key=int):
        drawn = sorted(found["sampled"].get(m, []))
        middle, spread = (f"{np.median(drawn):.4g}", f"{drawn[0]:.4g} to {drawn[-1]:.4g}") if drawn else ("–", "–")
        rows.append([m, middle, spread, ", ".join(f"{value:.4g}" for value in found["trained"].get(m, [])) or "–"])
    measured = [Figure("finite", caption), Table(head, rows)] if rows else []
    return Section("Finite networks against the limit", [text, *measured])


def _segment(results: Results) -> Section:
    found = results["segment"]
    if "skipped" in found:
        return Section("Convex in populations, not in weights", [f"Not measured: {found['skipped']}."])
    violation, (a, b) = found["midpoint_violation"], found["seeds"]
    shown = "J is not convex" if violation["weights"] > 1e-6 else "this pair does not show that J is not convex"
    text = Markup(
        "Two flows of {} steps from seeds {} and {} end at solutions A and B of equal widths ({}). J is followed "
        "along the straight line between them, once in program variables and once in weights. Midpoint violation "
        "max(0, J(mid) − (J<sub>A</sub> + J<sub>B</sub>) / 2): {} in program variables, {} in weights; {} in weights."
    ).format(
        found["steps"], a, b, by(found["widths"]), *(scientific(violation[x]) for x in ("program", "weights")), shown
    )
    lines = {"program": "program variables (mixture of the two measures)", "weights": "weights (particle by particle)"}
    rows = []
    for name, line in lines.items():
        values = [number(found[name][place]) for place in (0, len(found["t"]) // 2, -1)]
        rows.append([line, *values, scientific(violation[name])])
    picture = Figure("segment", "The same two ends. Above the dotted chord means: not convex.", wide=True)
    head = ["line", "J at A", "J at the middle", "J at B", "midpoint violation"]
    return Section("Convex in populations, not in weights", [text, picture, Table(head, rows)])


def _meaning(results: Results) -> Section:
    bound = "none is claimed here" if results["solution"]["lower_bound"] is None else "the one reported above does"
    attained = (
        "Here the infimum over all measures is attained; an unbounded activation with two layers or more would need "
        "bounds for that."
    )
    if results["warnings"]:
        attained = (
            "For this problem the infimum over all measures may not be attained (see the warning above): the value "
            "can keep falling with more rounds."
        )
    return Section(
        "What this proves, and what it does not",
        [
            "The convex program is convex in the populations of frozen features, by a change of variables. That does "
            "not make the loss convex in weights, and it does not say that gradient descent "
            "in weights finds the optimum.",
            "The duality gap is a proof in float64, computed outside the solver, but on this support: among all "
            "populations of the features that these particles carry, none is better by more than the gap. Features "
            f"that nobody has tried may do better; a bound over all measures would have to exclude them, and {bound}. "
            "Different seeds may therefore end at different values.",
            "Finite networks only approach these values: the sampled and trained ones above lie off the limit by the "
            f"amounts in their table, and with few seeds that is an illustration, not a rate. {attained}",
            "Accuracy on held-out images is measured, not proven: the gap is about J, and the network beside the "
            "answer is one training from one seed.",
        ],
    )
