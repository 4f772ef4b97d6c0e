"""The page of the grafting study: what its tables say, in pictures, small tables and sentences that carry their
figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from meanfield.bench.rates import Interval
from meanfield.bench.sweep import Row, Rows, groups, select
from meanfield.pages.html import assemble, figure, inline, plain_table, publish
from meanfield.pages.words import capital, count, finite, listed, percent_more, two
from meanfield.studies.grafting import summary
from meanfield.studies.grafting.pictures import CONTROLS, DISTANCES, DONORS, METHODS, NAMES, kind, pictures
from meanfield.studies.grafting.summary import geometric, layers_upwards

Images = dict[str, str]
Texts = list[list[Any]]


def write(tables: Mapping[str, Rows], directory: str | Path, command: str) -> Path:
    """Write graft.html, summary.json and the pictures; returns the page."""
    tables = {part: rows for part, rows in tables.items() if rows}
    found = summary.summary(tables)
    return publish(
        directory, "graft.html", pictures(tables), found, lambda figures: page(tables, found, figures, command)
    )


def page(tables: Mapping[str, Rows], found: Mapping[str, Any], figures: Mapping[str, bytes], command: str) -> str:
    images = {name: inline(content) for name, content in figures.items()}
    makers: list[tuple[str, Callable[[Any, Mapping[str, Rows], Images], str]]] = [
        ("starts", _starts_section),
        ("starts", _methods_section),
        ("starts", _later_section),
        ("classes", _classes_section),
        ("l2", _l2_section),
        ("trajectory", _trajectory_section),
        ("epochs", _epochs_section),
        ("across", _across_section),
        ("strengths", _strengths_section),
        ("widths", _widths_section),
        ("procedures", _procedures_section),
        ("correlations", _correlations_section),
        ("train", _train_section),
    ]
    sections = [make(found.get(part), tables, images) for part, make in makers if part in tables or part in found]
    footer = f"Made by <code>{escape(command)}</code>; the tables are the CSV files beside this page."
    return assemble(
        "Do networks from different starts learn the same features?",
        escape(_claim(found)),
        [*sections, _limits()],
        footer,
    )


def _claim(found: Mapping[str, Any]) -> str:
    means = {
        arm: fmean(row["relative_accuracy"].value for row in each)
        for arm, each in _squares(found.get("starts", ())).items()
    }
    if "trained" not in means:
        return (
            "How well the upper layers of one network work on the features of another one, once one layer between "
            "them is fitted."
        )
    others = " and ".join(f"{means[arm]:.1%} with {DONORS[arm]}" for arm in CONTROLS if arm in means)
    text = (
        f"On the features of another trained network a network keeps {means['trained']:.1%} of its accuracy, "
        f"averaged over the layers of the graft"
    )
    return f"{text}; {others}." if others else f"{text}."


def _squares(found: Rows) -> dict[str, list[Row]]:
    """Rows of least squares by arm, layers upwards."""
    kept = sorted(select(found, method="least_squares"), key=lambda row: row["position"])
    return {arm: each for (arm,), each in groups(kept, "arm").items()}


def _starts_section(found: Rows, tables: Mapping[str, Rows], images: Images) -> str:
    text = (
        "A graft takes the layers below the connecting layer from a donor and those above it from a host; only the "
        "connecting layer is fitted, by "
        "least squares on the training images. Everything is measured on held-out images. A relative error is the "
        "squared difference from the host "
        "as a share of the variance of the host: 0 is the host again, 1 is as bad as its mean."
    )
    return f"<h2>Grafts between networks from different starts</h2><p>{text}</p>{_profile(found, images, 'profiles')}"


def _methods_section(found: Rows, tables: Mapping[str, Rows], images: Images) -> str:
    caption = (
        "Error at the connecting layer, fitted by least squares and by transport; bands are 95% intervals over pairs."
    )
    return (
        f"<h2>Spans or "
        f"distributions?</h2><p>{escape(_methods_text(found))}</p>{figure(images, 'methods', caption, wide=True)}"
    )


def _classes_section(found: Rows, tables: Mapping[str, Rows], images: Images) -> str:
    errors = {row["layer"]: row["error"] for row in found}
    text = (
        "Two classifiers agree on the class, and whatever in a layer is a function of the class alone can be read "
        "from either of them. The best "
        "prediction of the host's pre-activations by the label alone leaves an error between "
        f"{two(min(each.value for each in errors.values()))} and {two(max(each.value for each in errors.values()))}. "
    )
    trained = _squares(summary.starts(tables.get("starts", ()))).get("trained", ())
    rows = [{**row, "beyond": errors[row["layer"]].above(row["error"])} for row in trained if row["layer"] in errors]
    if rows:
        text += (
            f"With intervals apart, grafts on trained donors know more of the host than its class "
            f"{_separated(rows, 'beyond')}."
        )
    caption = "Error at the connecting layer: grafts, and the mean of the class (no donor)."
    return f"<h2>More than the class?</h2><p>{escape(text)}</p>{figure(images, 'classes', caption)}"


def _later_section(found: Rows, tables: Mapping[str, Rows], images: Images) -> str:
    caption = "Error at every layer from the connecting one up, least squares, geometric means over pairs."
    text = escape(_later_text(tables["starts"]))
    return f"<h2>What later layers make of the error</h2><p>{text}</p>{figure(images, 'later', caption, wide=True)}"


def _l2_section(found: Rows, tables: Mapping[str, Rows], images: Images) -> str:
    return f"<h2>With the L2 penalty instead</h2>{_profile(found, images, 'l2')}"


def _profile(found: Rows, images: Images, name: str) -> str:
    arms = _squares(found)
    shown = [arm for arm in ("trained", *CONTROLS) if arm in arms]
    caption = (
        "Accuracy and output error of least-squares grafts by connecting layer; bands are 95% intervals over pairs."
    )
    details = "".join(
        f"<p>{title}</p>{_layer_table(arms, shown, key)}"
        for key, title in (
            ("relative_accuracy", "Accuracy of the graft / of its host"),
            ("output_error", "Relative error at the output"),
        )
    )
    sentences = [
        _trained_text(arms),
        *(_control_text(arm, arms[arm]) for arm in CONTROLS if arm in arms),
        _self_text(arms),
    ]
    return (
        f"<p>{escape(' '.join(filter(None, sentences)))}</p>{figure(images, name, caption, wide=True)}"
        f"<details><summary>All figures, with 95% intervals</summary>{details}</details>"
    )


def _layer_table(arms: Mapping[str, Rows], shown: Sequence[str], name: str) -> str:
    layers = [row["layer"] for row in next(iter(arms.values()))]
    values = {(arm, row["layer"]): row[name] for arm in shown for row in arms[arm]}
    head = ["connecting layer", *(NAMES[arm] for arm in shown)]
    return plain_table(head, [[layer, *(values.get((arm, layer)) for arm in shown)] for layer in layers])


def _trained_text(arms: Mapping[str, Rows]) -> str:
    if "trained" not in arms:
        return ""
    rows = arms["trained"]
    accuracy, error = ([row[name].value for row in rows] for name in ("relative_accuracy", "output_error"))
    worst, best = (pick(rows, key=lambda row: row["relative_accuracy"].value)["layer"] for pick in (min, max))
    return (
        f"Over {count(rows[0]['pairs'], 'pair')}, grafts on trained donors keep between {min(accuracy):.1%} (at "
        f"{worst}) and {max(accuracy):.1%} "
        f"(at {best}) of the accuracy of their hosts, and leave an output error between {two(min(error))} and "
        f"{two(max(error))}."
    )


def _control_text(arm: str, rows: Rows) -> str:
    accuracy, error = ([row[name].value for row in rows] for name in ("relative_accuracy", "output_error"))
    text = (
        f"{capital(DONORS[arm])} keep between {min(accuracy):.1%} and {max(accuracy):.1%}, with an output error "
        f"between {two(min(error))} and "
        f"{two(max(error))}."
    )
    if rows[0]["pairs"] < 2:
        return f"{text} One pair gives no intervals."
    accuracy, error = (_separated(rows, name) for name in ("accuracy_separated", "error_separated"))
    return (
        f"{text} With intervals apart, their accuracy lies below that of trained donors {accuracy}, their error "
        f"above {error}."
    )


def _separated(rows: Rows, name: str) -> str:
    """Where intervals do not meet."""
    apart, together = (_runs(rows, name, wanted) for wanted in (True, False))
    if not apart or not together:
        return "at every layer" if apart else "at no layer"
    return f"at {listed(apart)}, not at {listed(together)}"


def _runs(rows: Rows, name: str, wanted: bool) -> list[str]:
    """Layers with the wanted entry, neighbours as one: "conv3 to conv5"."""
    runs = [[row["layer"] for row in run] for value, run in groupby(rows, key=lambda row: row[name]) if value is wanted]
    return [run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]


def _self_text(arms: Mapping[str, Rows]) -> str:
    if "self" not in arms:
        return ""
    most = max(row["output_error"].value for row in arms["self"])
    return f"Grafted onto itself a host comes back with an output error of at most {most:.1g}."


def _methods_text(found: Rows) -> str:
    means = {
        (arm, method): geometric(row["error"].value for row in each)
        for (arm, method), each in groups(found, "arm", "method").items()
    }
    least, moved = (means.get(("trained", method)) for method in ("least_squares", "transport"))
    text = (
        "Least squares may combine the features of the donor in any way, so that it only compares the spaces that "
        "they span. Transport may not: it "
        "matches the channels of the two networks by their distributions and pulls the host's own kernel through the "
        "match."
    )
    if least is None or moved is None:
        return text
    text += (
        f" At the connection, in the geometric mean over pairs and layers, least squares leaves trained donors an "
        f"error of {two(least)}, transport "
        f"{two(moved)}, {two(moved / least)} times as much."
    )
    return " ".join([text, _rotated_text(means, found), *_others_text(means, moved)])


def _rotated_text(means: Mapping[Any, float], found: Rows) -> str:
    if ("rotated", "transport") not in means:
        return ""
    arms, moved = _squares(found), means["rotated", "transport"] / means["trained", "transport"]
    change = max(abs(a["error"].value / b["error"].value - 1) for a, b in zip(arms["rotated"], arms["trained"]))
    unchanged = (
        f"changes no error of least squares by more than {change:.1g} of itself"
        if change < 0.01
        else (f"should leave least squares alone, but changes its error by up to {change:.0%}")
    )
    return (
        f"A random rotation of the donor's features, which keeps their span and spoils their distributions, "
        f"{unchanged}; it multiplies the error of "
        f"transport by {two(moved)}."
    )


def _others_text(means: Mapping[Any, float], trained: float) -> list[str]:
    least = means["trained", "least_squares"]
    return [
        f"{capital(DONORS[arm])} have {two(means[arm, 'least_squares'] / least)} times the error of trained ones by "
        f"least squares and "
        f"{two(means[arm, 'transport'] / trained)} times by transport."
        for arm in CONTROLS
        if (arm, "transport") in means
    ]


def _later_text(rows: Rows) -> str:
    found = []
    for arm in ("trained", *CONTROLS):
        there = [
            row
            for row in select(rows, arm=arm, method="least_squares")
            if row["error"] > 0 and row["layer"] != layers_upwards(rows, "layer")[-1]
        ]
        if there:
            found.append(f"{two(geometric(row['output_error'] / row['error'] for row in there))} with {DONORS[arm]}")
    return (
        "Each row follows the error of one graft through the layers of the host above it. From the connection to the "
        "output it is multiplied by "
        f"{listed(found)}, in the geometric mean over connecting layers below the last and over pairs."
    )


def _trajectory_section(found: Rows, tables: Mapping[str, Rows], images: Images) -> str:
    text = (
        "Both networks are taken at every epoch. If they went through the same features in the same order, distances "
        "would be smallest on the "
        "diagonal, whatever the start. The contrast compares equal with different epochs: half of log D(s,t) + log "
        "D(t,s) &minus; log D(s,s) &minus; "
        "log D(t,t), a mean over epochs s &lt; t after the start. What depends on one of the epochs alone cancels; 0 "
        "means no ridge, and c that "
        "different epochs are e<sup>c</sup> times as far apart as equal ones."
    )
    rows = [
        [
            row["layer"],
            NAMES[row["arm"]],
            kind(row),
            _hundredths(row["contrast"]),
            f"{math.exp(row['contrast'].value):.2f}",
        ]
        for row in found
    ]
    captions = {
        "error": "Least-squares grafts: donor and host at every epoch.",
        "transport": "The same with transport.",
        "mmd": "Distance of the features that enter the layer, without any graft.",
    }
    ridge = (
        "All three at the deepest layer, after the start, without what depends on one epoch alone: a ridge is a "
        "dark diagonal."
    )
    return (
        f"<h2>The same path through training?</h2><p>{text}</p><p>{escape(_contrast_text(found))}</p>"
        + "".join(
            figure(images, f"trajectory_{kind}", f"{caption} Geometric means over pairs.", wide=True)
            for kind, caption in captions.items()
        )
        + (figure(images, "ridge", ridge, wide=True) if "ridge" in images else "")
        + plain_table(["layer", "donor", "distance", "contrast (95% over pairs)", "factor"], rows)
    )


def _contrast_text(found: Rows) -> str:
    """Of the deepest layer."""
    if not found:
        return "There are too few epochs for contrasts."
    layers, sentences = layers_upwards(found, "layer"), []
    for (layer, arm), each in groups(select(found, layer=layers[-1]), "layer", "arm").items():
        values = [f"{_hundredths(row['contrast'])} for the {kind(row)}{_ridge(row['contrast'])}" for row in each]
        subject = (
            "pairs of trained networks have"
            if arm == "trained"
            else "with the donor trained on permuted labels the contrasts are"
        )
        sentences.append(f"At {layer} {subject} {'contrasts of ' if arm == 'trained' else ''}{listed(values)}.")
    return " ".join([*sentences, f"The table has {listed(layers[:-1])} too."] if len(layers) > 1 else sentences)


def _ridge(contrast: Interval) -> str:
    return ", no ridge by this interval" if contrast.bounded and contrast.low <= 0 <= contrast.high else ""


def _hundredths(found: Interval) -> str:
    value, low, high = (f"{round(each, 2) + 0.0:.2f}" for each in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})" if found.bounded else value


def _epochs_section(_: Any, tables: Mapping[str, Rows], images: Images) -> str:
    rows, sentences = tables["epochs"], []
    first, last = min(row["epoch"] for row in rows), max(row["epoch"] for row in rows)
    for (moving,), each in groups(rows, "moving").items():
        found = []
        for (arm,), same in groups(each, "arm").items():
            ends = [geometric(row["output_error"] for row in select(same, epoch=epoch)) for epoch in (first, last)]
            found.append(f"from {two(ends[0])} to {two(ends[1])} with {DONORS[arm]}")
        sentences.append(
            f"As the {'donor' if moving == 'lower' else 'host'} goes from epoch {first} to {last}, it goes "
            f"{listed(found)}."
        )
    text = (
        "One network is taken at an epoch, the other one at the end of its training; read the output error, in the "
        "geometric mean over layers and "
        f"pairs. {' '.join(sentences)}"
    )
    caption = "Output error of least-squares grafts by connecting layer and epoch, geometric means over pairs."
    return f"<h2>From when on?</h2><p>{escape(text)}</p>{figure(images, 'epochs', caption, wide=True)}"


def _across_section(_: Any, tables: Mapping[str, Rows], images: Images) -> str:
    rows = tables["across"]
    below = layers_upwards(rows, "lower_layer")
    steps: dict[str, dict[int, list[float]]] = {}
    order = [*below, *(layer for layer in layers_upwards(rows, "layer") if layer not in below)]
    for row in rows:
        step = order.index(row["layer"]) - order.index(row["lower_layer"])
        steps.setdefault(row["arm"], {}).setdefault(step, []).append(row["output_error"])
    found = [
        f"from {two(geometric(by_step[min(by_step)]))} for {count(min(by_step), 'layer')} to "
        f"{two(geometric(by_step[max(by_step)]))} for "
        f"{count(max(by_step), 'layer')} with {DONORS[arm]}"
        for arm, by_step in steps.items()
    ]
    text = (
        "What enters one layer of the donor is led into a later layer of the host. By the number of layers that are "
        "skipped so, the output error "
        f"goes {listed(found)}."
    )
    caption = "Output error: the features that enter the donor's layer, read by the host's."
    return f"<h2>Into another layer</h2><p>{escape(text)}</p>{figure(images, 'across', caption, wide=True)}"


def _strengths_section(found: Rows, _: Mapping[str, Rows], images: Images) -> str:
    text = (
        f"Donor and host are trained with different strengths of the penalty; means over pairs and over connecting "
        f"layers from the middle up. "
        f"{_settings_text(found)} A start does not know its penalty: untrained donors are one line."
    )
    return (
        f"<h2>Strength of the "
        f"penalty</h2><p>{escape(text)}</p>{figure(images, 'strengths', 'Output error by strength of either penalty.')}"
    )


def _widths_section(found: Rows, _: Mapping[str, Rows], images: Images) -> str:
    text = (
        f"Donor and host differ in width; means over pairs and over connecting layers from the middle up. "
        f"{_settings_text(found)}"
    )
    return f"<h2>Width</h2><p>{escape(text)}</p>{figure(images, 'widths', 'Output error by width of either network.', wide=True)}"


def _settings_text(found: Rows) -> str:
    """Ranges of a matrix, with the accuracies that the picture does not show."""
    sentences = []
    for (method, arm), each in groups(found, "method", "arm").items():
        error, accuracy = ([row[name] for row in each] for name in ("output_error", "relative_accuracy"))
        sentences.append(
            f"with {METHODS[method]} and {DONORS[arm]} the output error lies between {two(min(error))} and "
            f"{two(max(error))}, the accuracy between "
            f"{min(accuracy):.1%} and {max(accuracy):.1%} of the host's"
        )
    return f"{capital('; '.join(sentences))}."


def _procedures_section(found: Rows, _: Mapping[str, Rows], images: Images) -> str:
    points, excess, ratio = (fmean(row[name] for row in found) for name in ("accuracy_points", "excess", "ratio"))
    text = (
        f"The connecting layer trained by Adam, as the authors do, ends {abs(points):.1f} points "
        f"{'above' if points > 0 else 'below'} the accuracy "
        f"of least squares, with {percent_more(excess)} error on the training images, and takes {ratio:.3g} times the "
        f"CPU seconds, on average over "
        f"{count(len(found), 'layer')}."
    )
    rows = [
        [
            row["layer"],
            f"{row['accuracy_points']:+.2f}",
            f"{row['fit_error']:.3g}",
            f"{row['adam_fit_error']:.3g}",
            f"{row['excess']:+.1%}",
            f"{row['cpu_seconds']:.2f}",
            f"{row['adam_cpu_seconds']:.1f}",
            f"{row['ratio']:.3g}",
        ]
        for row in found
    ]
    head = ["layer", "points of accuracy, Adam minus least squares", "training error, least squares", "Adam", "excess"]
    head += ["CPU seconds, least squares", "Adam", "ratio"]
    return f"<h2>Least squares against the authors' procedure</h2><p>{escape(text)}</p>{plain_table(head, rows)}"


def _correlations_section(found: Rows, _: Mapping[str, Rows], images: Images) -> str:
    sentences = []
    for (method,), each in groups([row for row in found if math.isfinite(row["mean"])], "method").items():
        best, worst = (pick(each, key=lambda row: abs(row["mean"])) for pick in (max, min))
        sentences.append(
            f"the error of {METHODS[method]} is tied most closely to {DISTANCES[best['distance']]} "
            f"({best['mean']:.2f}) and least to "
            f"{DISTANCES[worst['distance']]} ({worst['mean']:.2f})"
        )
    text = (
        "Spearman's rank correlation of distances between the features with the error at the connection, across pairs "
        "and across donors "
        f"(trained, untrained, permuted labels), layer by layer. In the mean over layers, "
        f"{'; '.join(sentences) or 'none is defined'}."
    )
    rows = [
        [
            METHODS[row["method"]],
            DISTANCES[row["distance"]],
            row["layers"],
            *(finite(row[name]) for name in ("mean", "least", "most")),
        ]
        for row in found
    ]
    head = ["error of", "distance", "layers", "mean over layers", "least", "most"]
    return f"<h2>Distances and errors</h2><p>{escape(text)}</p>{plain_table(head, rows)}"


def _train_section(_: Any, tables: Mapping[str, Rows], images: Images) -> str:
    ends = [row for row in tables["train"] if "held_out_accuracy" in row]
    rows = [
        [
            labels,
            penalty,
            f"{strength:g}",
            width,
            each[0]["epoch"],
            len(each),
            _extent(each, "accuracy"),
            _extent(each, "held_out_accuracy"),
        ]
        for (labels, penalty, strength, width), each in groups(ends, "labels", "penalty", "strength", "width").items()
    ]
    text = f"{capital(count(len(ends), 'network'))} were trained." if len(ends) != 1 else "One network was trained."
    permuted = select(ends, labels="permuted")
    if permuted:
        text += (
            f" Those on permuted labels fitted {_extent(permuted, 'accuracy')} of them: where that is near chance, "
            f"the control is training "
            "without anything to learn, not memorised noise."
        )
    head = ["labels", "penalty", "strength", "width", "epochs", "networks", "accuracy in training", "accuracy held out"]
    return f"<h2>The networks</h2><p>{text}</p>{plain_table(head, rows)}"


def _extent(rows: Rows, name: str) -> str:
    values = [row[name] for row in rows]
    return f"{min(values):.1%}" if len(values) == 1 else f"{min(values):.1%} to {max(values):.1%}"


def _limits() -> str:
    return (
        "<h2>What this does not say</h2>"
        "<p>A good graft by least squares says that the features of the donor span what one layer of the host reads. "
        "It does not say that the two "
        "networks have features of equal distribution: equal distributions imply equal spans, not the other way "
        "round. Where the question is about "
        "distributions, read transport and the distances, next to the rotated donors.</p>"
        "<p>A connecting layer has many unknowns. Where images are few, a feature that is active on a handful of them "
        "can get a large weight, and "
        "the error on held-out images can then exceed 1, more than that of a constant.</p>"
        "<p>Small data sets of digits are easy: even untrained features do well at lower layers, so that what "
        "separates trained donors from "
        "controls is the figure to read, not the accuracy. The intervals are over pairs of networks on the same "
        "images; nothing here speaks of other "
        "images or of larger data sets.</p>"
    )
