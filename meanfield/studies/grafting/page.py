"""The sections of the grafting study's page: sentences that carry their figures, pictures, small tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from markupsafe import Markup

from meanfield.bench.study import Found
from meanfield.bench.sweep import Row, Rows, Tables, groups, select
from meanfield.pages.html import Details, Figure, Section, Table
from meanfield.pages.words import capital, count, finite, listed, percent_more, two
from meanfield.rates import Interval
from meanfield.studies.grafting.pictures import CONTROLS, DISTANCES, DONORS, METHODS, NAMES, kind
from meanfield.studies.grafting.summary import after_start, geometric, layers_upwards

LIMITS = Section(
    "What this does not say",
    [
        "A good graft by least squares says that the features of the donor span what one layer of the host reads. It "
        "does not say that the two networks have features of equal distribution: equal distributions imply equal "
        "spans, not the other way round. Where the question is about distributions, read transport and the distances, "
        "next to the rotated donors.",
        "A connecting layer has many unknowns. Where images are few, a feature that is active on a handful of them "
        "can get a large weight, and the error on held-out images can then exceed 1, more than that of a constant.",
        "Small data sets of digits are easy: even untrained features do well at lower layers, so that what separates "
        "trained donors from controls is the figure to read, not the accuracy. The intervals are over pairs of "
        "networks on the same images; nothing here speaks of other images or of larger data sets.",
    ],
)


def claim(found: Found) -> str:
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
        f"On the features of another trained network a network keeps {means['trained']:.1%} of its accuracy, averaged "
        "over the layers of the graft"
    )
    return f"{text}; {others}." if others else f"{text}."


def starts(found: Found, tables: Tables) -> Section:
    text = (
        "A graft takes the layers below the connecting layer from a donor and those above it from a host; only the "
        "connecting layer is fitted, by least squares on the training images. Everything is measured on held-out "
        "images. A relative error is the squared difference from the host as a share of the variance of the host: 0 "
        "is the host again, 1 is as bad as its mean."
    )
    return Section("Grafts between networks from different starts", [text, *_profile(found["starts"], "profiles")])


def methods(found: Found, tables: Tables) -> Section:
    caption = (
        "Error at the connecting layer, fitted by least squares and by transport; bands are 95% intervals over pairs."
    )
    return Section("Spans or distributions?", [_methods_text(found["starts"]), Figure("methods", caption, wide=True)])


def _methods_text(found: Rows) -> str:
    means = {
        (arm, method): geometric(row["error"].value for row in each)
        for (arm, method), each in groups(found, "arm", "method").items()
    }
    least, moved = (means.get(("trained", method)) for method in ("least_squares", "transport"))
    text = (
        "Least squares may combine the features of the donor in any way, so that it only compares the spaces that "
        "they span. Transport may not: it matches the channels of the two networks by their distributions and pulls "
        "the host's own kernel through the match."
    )
    if least is None or moved is None:
        return text
    text += (
        " At the connection, in the geometric mean over pairs and layers, least squares leaves trained donors an "
        f"error of {two(least)}, transport {two(moved)}, {two(moved / least)} times as much."
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
        else f"should leave least squares alone, but changes its error by up to {change:.0%}"
    )
    return (
        "A random rotation of the donor's features, which keeps their span and spoils their distributions, "
        f"{unchanged}; it multiplies the error of transport by {two(moved)}."
    )


def _others_text(means: Mapping[Any, float], trained: float) -> list[str]:
    least = means["trained", "least_squares"]
    return [
        f"{capital(DONORS[arm])} have {two(means[arm, 'least_squares'] / least)} times the error of trained ones by "
        f"least squares and {two(means[arm, 'transport'] / trained)} times by transport."
        for arm in CONTROLS
        if (arm, "transport") in means
    ]


def later(found: Found, tables: Tables) -> Section:
    caption = "Error at every layer from the connecting one up, least squares, geometric means over pairs."
    picture = Figure("later", caption, wide=True)
    return Section("What later layers make of the error", [_later_text(tables["starts"]), picture])


def _later_text(rows: Rows) -> str:
    found, last = [], layers_upwards(rows, "layer")[-1]
    for arm in ("trained", *CONTROLS):
        squares = select(rows, arm=arm, method="least_squares")
        there = [row for row in squares if row["error"] > 0 and row["layer"] != last]
        if there:
            found.append(f"{two(geometric(row['output_error'] / row['error'] for row in there))} with {DONORS[arm]}")
    return (
        "Each row follows the error of one graft through the layers of the host above it. From the connection to the "
        f"output it is multiplied by {listed(found)}, in the geometric mean over connecting layers below the last and "
        "over pairs."
    )


def correlations(found: Found, tables: Tables) -> Section:
    known = found["correlations"]
    sentences = []
    for (method,), each in groups([row for row in known if math.isfinite(row["mean"])], "method").items():
        best, worst = (pick(each, key=lambda row: abs(row["mean"])) for pick in (max, min))
        sentences.append(
            f"the error of {METHODS[method]} is tied most closely to {DISTANCES[best['distance']]} "
            f"({best['mean']:.2f}) and least to {DISTANCES[worst['distance']]} ({worst['mean']:.2f})"
        )
    text = (
        "Spearman's rank correlation of distances between the features with the error at the connection, across pairs "
        "and across donors (trained, untrained, permuted labels), layer by layer. In the mean over layers, "
        f"{'; '.join(sentences) or 'none is defined'}."
    )
    rows = []
    for row in known:
        figures = [finite(row[name]) for name in ("mean", "least", "most")]
        rows.append([METHODS[row["method"]], DISTANCES[row["distance"]], row["layers"], *figures])
    head = ["error of", "distance", "layers", "mean over layers", "least", "most"]
    return Section("Distances and errors", [text, Table(head, rows)])


def classes(found: Found, tables: Tables) -> Section:
    errors = {row["layer"]: row["error"] for row in found["classes"]}
    low, high = (two(pick(each.value for each in errors.values())) for pick in (min, max))
    text = (
        "Two classifiers agree on the class, and whatever in a layer is a function of the class alone can be read "
        "from either of them. The best prediction of the host's pre-activations by the label alone leaves an error "
        f"between {low} and {high}."
    )
    trained = _squares(found.get("starts", ())).get("trained", ())
    rows = [{**row, "beyond": errors[row["layer"]].above(row["error"])} for row in trained if row["layer"] in errors]
    if rows:
        text += (
            " With intervals apart, grafts on trained donors know more of the host than its class "
            f"{_separated(rows, 'beyond')}."
        )
    caption = "Error at the connecting layer: grafts, and the mean of the class (no donor)."
    return Section("More than the class?", [text, Figure("classes", caption)])


def l2(found: Found, tables: Tables) -> Section:
    return Section("With the L2 penalty instead", _profile(found["l2"], "l2"))


def trajectory(found: Found, tables: Tables) -> Section:
    text = Markup(
        "Both networks are taken at every epoch. If they went through the same features in the same order, distances "
        "would be smallest on the diagonal, whatever the start. The contrast compares equal with different epochs: "
        "half of log D(s,t) + log D(t,s) &minus; log D(s,s) &minus; log D(t,t), a mean over epochs s &lt; t after the "
        "start. What depends on one of the epochs alone cancels; 0 means no ridge, and c that different epochs are "
        "e<sup>c</sup> times as far apart as equal ones."
    )
    captions = {
        "error": "Least-squares grafts: donor and host at every epoch.",
        "transport": "The same with transport.",
        "mmd": "Distance of the features that enter the layer, without any graft.",
    }
    pictures = [
        Figure(f"trajectory_{name}", f"{caption} Geometric means over pairs.", wide=True)
        for name, caption in captions.items()
    ]
    if len(after_start(tables["trajectory"])) > 1:
        ridge = (
            "All three at the deepest layer, after the start, without what depends on one epoch alone: a ridge is a "
            "dark diagonal."
        )
        pictures.append(Figure("ridge", ridge, wide=True))
    rows = []
    for row in found["trajectory"]:
        contrast = row["contrast"]
        figures = [_hundredths(contrast), f"{math.exp(contrast.value):.2f}"]
        rows.append([row["layer"], NAMES[row["arm"]], kind(row), *figures])
    table = Table(["layer", "donor", "distance", "contrast (95% over pairs)", "factor"], rows)
    return Section("The same path through training?", [text, _contrast_text(found["trajectory"]), *pictures, table])


def _contrast_text(found: Rows) -> str:
    """Of the deepest layer."""
    if not found:
        return "There are too few epochs for contrasts."
    layers, sentences = layers_upwards(found, "layer"), []
    for (layer, arm), each in groups(select(found, layer=layers[-1]), "layer", "arm").items():
        values = [f"{_hundredths(row['contrast'])} for the {kind(row)}{_ridge(row['contrast'])}" for row in each]
        subject = (
            "pairs of trained networks have contrasts of"
            if arm == "trained"
            else "with the donor trained on permuted labels the contrasts are"
        )
        sentences.append(f"At {layer} {subject} {listed(values)}.")
    return " ".join([*sentences, f"The table has {listed(layers[:-1])} too."] if len(layers) > 1 else sentences)


def _ridge(contrast: Interval) -> str:
    return ", no ridge by this interval" if contrast.bounded and contrast.low <= 0 <= contrast.high else ""


def _hundredths(found: Interval) -> str:
    value, low, high = (f"{round(each, 2) + 0.0:.2f}" for each in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})" if found.bounded else value


def epochs(found: Found, tables: Tables) -> Section:
    rows, sentences = tables["epochs"], []
    first, last = min(row["epoch"] for row in rows), max(row["epoch"] for row in rows)
    for (moving,), each in groups(rows, "moving").items():
        changes = []
        for (arm,), same in groups(each, "arm").items():
            ends = [geometric(row["output_error"] for row in select(same, epoch=epoch)) for epoch in (first, last)]
            changes.append(f"from {two(ends[0])} to {two(ends[1])} with {DONORS[arm]}")
        end = "donor" if moving == "lower" else "host"
        sentences.append(f"As the {end} goes from epoch {first} to {last}, it goes {listed(changes)}.")
    text = (
        "One network is taken at an epoch, the other one at the end of its training; read the output error, in the "
        f"geometric mean over layers and pairs. {' '.join(sentences)}"
    )
    caption = "Output error of least-squares grafts by connecting layer and epoch, geometric means over pairs."
    return Section("From when on?", [text, Figure("epochs", caption, wide=True)])


def across(found: Found, tables: Tables) -> Section:
    changes = []
    for arm, by_step in _steps(tables["across"]).items():
        first, last = min(by_step), max(by_step)
        changes.append(
            f"from {two(geometric(by_step[first]))} for {count(first, 'layer')} to {two(geometric(by_step[last]))} for "
            f"{count(last, 'layer')} with {DONORS[arm]}"
        )
    text = (
        "What enters one layer of the donor is led into a later layer of the host. By the number of layers that are "
        f"skipped so, the output error goes {listed(changes)}."
    )
    caption = "Output error: the features that enter the donor's layer, read by the host's."
    return Section("Into another layer", [text, Figure("across", caption, wide=True)])


def _steps(rows: Rows) -> dict[str, dict[int, list[float]]]:
    """Output errors by arm and number of layers skipped."""
    below = layers_upwards(rows, "lower_layer")
    order = [*below, *(layer for layer in layers_upwards(rows, "layer") if layer not in below)]
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        step = order.index(row["layer"]) - order.index(row["lower_layer"])
        found.setdefault(row["arm"], {}).setdefault(step, []).append(row["output_error"])
    return found


def strengths(found: Found, tables: Tables) -> Section:
    text = (
        "Donor and host are trained with different strengths of the penalty; means over pairs and over connecting "
        f"layers from the middle up. {_settings_text(found['strengths'])} A start does not know its penalty: untrained "
        "donors are one line."
    )
    picture = Figure("strengths", "Output error by strength of either penalty.")
    return Section("Strength of the penalty", [text, picture])


def widths(found: Found, tables: Tables) -> Section:
    text = (
        "Donor and host differ in width; means over pairs and over connecting layers from the middle up. "
        f"{_settings_text(found['widths'])}"
    )
    return Section("Width", [text, Figure("widths", "Output error by width of either network.", wide=True)])


def _settings_text(found: Rows) -> str:
    """Ranges of a matrix, with the accuracies that the picture does not show."""
    sentences = []
    for (method, arm), each in groups(found, "method", "arm").items():
        error, accuracy = ([row[name] for row in each] for name in ("output_error", "relative_accuracy"))
        sentences.append(
            f"with {METHODS[method]} and {DONORS[arm]} the output error lies between {two(min(error))} and "
            f"{two(max(error))}, the accuracy between {min(accuracy):.1%} and {max(accuracy):.1%} of the host's"
        )
    return f"{capital('; '.join(sentences))}."


def procedures(found: Found, tables: Tables) -> Section:
    known = found["procedures"]
    points, excess, ratio = (fmean(row[name] for row in known) for name in ("accuracy_points", "excess", "ratio"))
    text = (
        f"The connecting layer trained by Adam, as the authors do, ends {abs(points):.1f} points "
        f"{'above' if points > 0 else 'below'} the accuracy of least squares, with {percent_more(excess)} error on the "
        f"training images, and takes {ratio:.3g} times the CPU seconds, on average over {count(len(known), 'layer')}."
    )
    rows = []
    for row in known:
        errors = [f"{row['fit_error']:.3g}", f"{row['adam_fit_error']:.3g}", f"{row['excess']:+.1%}"]
        seconds = [f"{row['cpu_seconds']:.2f}", f"{row['adam_cpu_seconds']:.1f}", f"{row['ratio']:.3g}"]
        rows.append([row["layer"], f"{row['accuracy_points']:+.2f}", *errors, *seconds])
    head = ["layer", "points of accuracy, Adam minus least squares", "training error, least squares", "Adam", "excess"]
    head += ["CPU seconds, least squares", "Adam", "ratio"]
    return Section("Least squares against the authors' procedure", [text, Table(head, rows)])


def train(found: Found, tables: Tables) -> Section:
    ends, rows = [row for row in tables["train"] if "held_out_accuracy" in row], []
    for (labels, penalty, strength, width), each in groups(ends, "labels", "penalty", "strength", "width").items():
        scores = [_extent(each, name) for name in ("accuracy", "held_out_accuracy")]
        rows.append([labels, penalty, f"{strength:g}", width, each[0]["epoch"], len(each), *scores])
    text = f"{capital(count(len(ends), 'network'))} were trained." if len(ends) != 1 else "One network was trained."
    permuted = select(ends, labels="permuted")
    if permuted:
        text += (
            f" Those on permuted labels fitted {_extent(permuted, 'accuracy')} of them: where that is near chance, the "
            "control is training without anything to learn, not memorised noise."
        )
    head = ["labels", "penalty", "strength", "width", "epochs", "networks", "accuracy in training", "accuracy held out"]
    return Section("The networks", [text, Table(head, rows)])


def _extent(rows: Rows, name: str) -> str:
    values = [row[name] for row in rows]
    return f"{min(values):.1%}" if len(values) == 1 else f"{min(values):.1%} to {max(values):.1%}"


def _squares(found: Rows) -> dict[str, list[Row]]:
    """Rows of least squares by arm, layers upwards."""
    kept = sorted(select(found, method="least_squares"), key=lambda row: row["position"])
    return {arm: each for (arm,), each in groups(kept, "arm").items()}


def _profile(found: Rows, name: str) -> list[Any]:
    """What grafts and controls do, layer by layer: a paragraph, the picture of that name, tables to be unfolded."""
    arms = _squares(found)
    controls = [_control_text(arm, arms[arm]) for arm in CONTROLS if arm in arms]
    caption = (
        "Accuracy and output error of least-squares grafts by connecting layer; bands are 95% intervals over pairs."
    )
    return [
        " ".join(filter(None, [_trained_text(arms), *controls, _self_text(arms)])),
        Figure(name, caption, wide=True),
        Details(
            "All figures, with 95% intervals: accuracy of the graft / of its host",
            _layer_table(arms, "relative_accuracy"),
        ),
        Details("All figures, with 95% intervals: relative error at the output", _layer_table(arms, "output_error")),
    ]


def _layer_table(arms: Mapping[str, Rows], name: str) -> Table:
    shown = [arm for arm in ("trained", *CONTROLS) if arm in arms]
    layers = [row["layer"] for row in next(iter(arms.values()))]
    values = {(arm, row["layer"]): row[name] for arm in shown for row in arms[arm]}
    head = ["connecting layer", *(NAMES[arm] for arm in shown)]
    return Table(head, [[layer, *(values.get((arm, layer)) for arm in shown)] for layer in layers])


def _trained_text(arms: Mapping[str, Rows]) -> str:
    if "trained" not in arms:
        return ""
    rows = arms["trained"]
    accuracy, error = ([row[name].value for row in rows] for name in ("relative_accuracy", "output_error"))
    worst, best = (pick(rows, key=lambda row: row["relative_accuracy"].value)["layer"] for pick in (min, max))
    return (
        f"Over {count(rows[0]['pairs'], 'pair')}, grafts on trained donors keep between {min(accuracy):.1%} (at "
        f"{worst}) and {max(accuracy):.1%} (at {best}) of the accuracy of their hosts, and leave an output error "
        f"between {two(min(error))} and {two(max(error))}."
    )


def _control_text(arm: str, rows: Rows) -> str:
    accuracy, error = ([row[name].value for row in rows] for name in ("relative_accuracy", "output_error"))
    text = (
        f"{capital(DONORS[arm])} keep between {min(accuracy):.1%} and {max(accuracy):.1%}, with an output error "
        f"between {two(min(error))} and {two(max(error))}."
    )
    if rows[0]["pairs"] < 2:
        return f"{text} One pair gives no intervals."
    accurate, wrong = (_separated(rows, name) for name in ("accuracy_separated", "error_separated"))
    return (
        f"{text} With intervals apart, their accuracy lies below that of trained donors {accurate}, their error above "
        f"{wrong}."
    )


def _separated(rows: Sequence[Row], name: str) -> str:
    """Where intervals do not meet."""
    apart, together = (_runs(rows, name, wanted) for wanted in (True, False))
    if not apart or not together:
        return "at every layer" if apart else "at no layer"
    return f"at {listed(apart)}, not at {listed(together)}"


def _runs(rows: Sequence[Row], name: str, wanted: bool) -> list[str]:
    """Layers with the wanted entry, neighbours as one: "conv3 to conv5"."""
    runs = [[row["layer"] for row in run] for value, run in groupby(rows, key=lambda row: row[name]) if value is wanted]
    return [run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]


def _self_text(arms: Mapping[str, Rows]) -> str:
    if "self" not in arms:
        return ""
    most = max(row["output_error"].value for row in arms["self"])
    return f"Grafted onto itself a host comes back with an output error of at most {most:.1g}."
