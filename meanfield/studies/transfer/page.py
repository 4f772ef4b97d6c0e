"""The sections of the transfer study's page: sentences that carry their figures, pictures, small tables."""

from __future__ import annotations

from typing import Any

from meanfield.bench.study import Found
from meanfield.bench.sweep import Row, Rows, Tables, groups, select
from meanfield.pages.html import Details, Figure, Section, Table
from meanfield.pages.words import capital, count, listed, scientific, two
from meanfield.rates import Interval
from meanfield.studies.transfer.arms import ARMS, PREDICTED
from meanfield.studies.transfer.pictures import FIGURES, HEADS, SCALINGS, choice, way
from meanfield.studies.transfer.summary import FIGURES as JUDGED
from meanfield.studies.transfer.summary import NEAR, TASK_NAMES, at, points
from meanfield.studies.transfer.tasks import REDUCED

ACCOUNTS = {
    "I": "the start does not matter",
    "R": "the sum is the trained network with noise",
    "P": "it is what is predicted without a start",
}

SEPARATED = {True: " (separated)", False: " (not separated)", None: ""}

LIMITS = Section(
    "What this does not say",
    [
        "Digits of 8x8 pixels are easy, and the networks small. Where a figure depends on the size of the start, on "
        "the epochs or on the width, it is shown over them; for other data and recipes it has to be measured anew.",
        "The prediction is exact over starts for one hidden layer; beyond it rests on many channels, and maxima of "
        "pooling windows are approximated. It is made for chains of layers: batch norm divides every channel by a "
        "deviation of its own, which does not concentrate as the width grows, and is refused.",
        "That the union of networks has the outputs of their ensemble is an identity, and no merit of the networks. "
        "What its reduction loses was measured on the images that it was reduced on and on held-out ones of the same "
        "kind.",
    ],
)


def claim(found: Found) -> str:
    sentences = [_prediction_text(found["regimes"])] if "regimes" in found else []
    return " ".join(filter(None, sentences)) or "What of a training survives another start, a fusion, and another task."


def _prediction_text(rows: Rows) -> str:
    said = []
    for network in PREDICTED:
        predicted, literal = (at(rows, network=network, gap=gap) for gap in ("P", "R"))
        if predicted and literal:
            said.append(
                f"{points(predicted['mean'])} points for {network} over {count(predicted['cells'], 'cell')}, where the "
                f"trained network with noise is off by {points(literal['mean'])}"
            )
    if not said:
        return ""
    return (
        f"A prediction that draws no start is off by {'; '.join(said)} (means of absolute differences, 95% intervals)."
    )


def train(found: Found, tables: Tables) -> Section:
    rows = tables["train"]
    text = (
        f"{capital(count(len(rows), 'network'))}, by kind: their accuracies at the end of training, in per cent, "
        "means. Permuted labels are trained until they fit; the first column is on the labels that were trained on."
    )
    head = ["network", "labels", "width", "scale of the start", "epochs", "networks", "trained on", "held out"]
    table = [
        [*kind, len(each), *(_mean(each, name) for name in ("train_accuracy", "held_out_accuracy"))]
        for kind, each in groups(rows, "network", "labels", "width", "scale", "epochs").items()
    ]
    return Section("Networks", [Details(text, Table(head, table))])


def _mean(rows: Rows, name: str) -> str:
    return f"{100 * sum(row[name] for row in rows) / len(rows):.1f}"


def alphas(found: Found, tables: Tables) -> Section:
    rows = found["alphas"]
    trainings = max(row["trainings"] for row in rows)
    text = (
        "What a training moved, Delta, times alpha, on another start of the same law. Own start: theta_0 + alpha "
        "Delta; fresh: theta_0' + alpha Delta, which at alpha = 0 is the start alone; zero: alpha Delta; trained, "
        "scaled: alpha theta_T; literal noise: alpha theta_T with noise of the norm of theta_0' - alpha theta_0, "
        f"tensor by tensor. Means over {count(trainings, 'training')} with 95% intervals."
    )
    controls = (
        "Controls: Delta dealt anew among the particles of its own start, with neighbouring layers in step or not; "
        "that of a training on permuted labels, on a fresh start; noise of the start's norm in place of a fresh start; "
        "noise of Delta's norm in place of Delta."
    )
    sums = "The original start added back to a fresh one, and two trained networks added: theta_A + alpha theta_B."
    items: list[Any] = [text, _at_one(rows)]
    items += [Figure("alphas_arms_held_out_accuracy", "Accuracy on held-out images over alpha.", wide=True), controls]
    items += [Figure("alphas_controls_held_out_accuracy", "The same, of the controls.", wide=True), sums]
    items += [Figure("alphas_sums_held_out_accuracy", "The same, of sums of networks.", wide=True)]
    for figure, name in FIGURES.items():
        if figure != "held_out_accuracy":
            items += [
                Figure(f"alphas_{arms}_{figure}", f"{capital(name)}.", wide=True) for arms in ("arms", "controls")
            ]
    return Section("Other starts", [*items, Details("All figures", _all(rows))])


def _at_one(rows: Rows) -> Table:
    """Accuracies at alpha = 1 and at the largest one, per network and arm."""
    last = max(row["alpha"] for row in rows)
    networks = list(groups(rows, "network"))
    head = ["accuracy, held out, %", *(f"{name}, alpha = {alpha:g}" for (name,) in networks for alpha in (1, last))]
    table = []
    for arm in (*ARMS, "predicted"):
        entries = [at(rows, network=name, arm=arm, alpha=alpha) for (name,) in networks for alpha in (1.0, last)]
        if any(entries):
            table.append([arm, *(None if row is None else points(row["held_out_accuracy"]) for row in entries)])
    return Table(head, table)


def _all(rows: Rows) -> Table:
    head = ["network", "arm", "alpha", *(FIGURES[name] for name in JUDGED), "on the labels it memorised"]
    table = [
        [row["network"], row["arm"], row["alpha"], *(row.get(name) for name in (*JUDGED, "memorised_accuracy"))]
        for row in rows
    ]
    return Table(head, table)


def chosen(found: Found, tables: Tables) -> Section:
    rows = found["chosen"]
    text = (
        "The factor that is best on the validation images, training by training, and the accuracy on held-out images "
        "there, in per cent."
    )
    networks = [name for (name,) in groups(rows, "network")]
    table = []
    for (arm,), each in groups(rows, "arm").items():
        entries = [at(each, network=name) for name in networks]
        table.append([arm, *(None if row is None else points(row["accuracy"]) for row in entries)])
    factors = [[row["network"], row["arm"], ", ".join(f"{alpha:g}" for alpha in row["alphas"])] for row in rows]
    folded = Details("The factors", Table(["network", "arm", "alpha, training by training"], factors))
    return Section("The best factor", [text, Table(["accuracy, held out, %", *networks], table), folded])


def regimes(found: Found, tables: Tables) -> Section:
    rows = found["regimes"]
    text = (
        "Three gaps, each zero by one account: I = own start - fresh start, by the account that the start does not "
        "matter; R = fresh start - literal noise, that the sum is the trained network with noise; P = fresh start - "
        "predicted, that it is the displacement's network with an independent start of which only the law is known. A "
        f"cell is one training and one alpha, its interval over {_draws(tables)} fresh starts, each paired with noise "
        "of its norm."
    )
    near = f"within {100 * NEAR:g} points"
    head = [
        "network",
        "gap",
        "cells",
        "mean absolute gap, points",
        "largest",
        f"cells {near}",
        "cells whose interval holds zero",
        "all cells near below |theta_0| / |alpha Delta| =",
    ]
    table = [
        [
            row["network"],
            row["gap"],
            row["cells"],
            points(row["mean"]),
            f"{100 * row['largest']:.1f}",
            row["near"],
            row["zero_inside"],
            None if row["near_below_ratio"] is None else two(row["near_below_ratio"]),
        ]
        for row in rows
    ]
    caption = "The three gaps of every cell over the size of the start against that of the displacement."
    items: list[Any] = [text, _verdict(rows), Figure("gaps", caption, wide=True)]
    if select(rows, gap="P"):
        caption = "What each account says of a fresh start, against what fresh starts do; a point per cell."
        items.append(Figure("predicted", caption, wide=True))
    items += _divisors(tables["regimes"])
    return Section("Who is right where", [*items, Table(head, table), Details("All cells", _cells(tables["regimes"]))])


def _divisors(rows: Rows) -> list[str]:
    """Why batch norm has no prediction."""
    found = groups([row for row in rows if "divisors_most" in row], "width")
    if not found:
        return []
    said = [
        f"{two(min(row['divisors_least'] for row in each))} to {two(max(row['divisors_most'] for row in each))} of it "
        f"at width {width}"
        for (width,), each in found.items()
    ]
    return [
        "Networks with batch norm have no prediction: over channels and starts of a layer the variance that a channel "
        f"is divided by deviates from its mean by {listed(said)}. A law of the start does not say what that variance "
        "is, and no width makes it a number."
    ]


def _draws(tables: Tables) -> int:
    return max(row["draws"] for row in tables["regimes"])


def _verdict(rows: Rows) -> str:
    """Who is right where: a sentence per network."""
    sentences = []
    for (network,), each in groups(rows, "network").items():
        parts = [f"{ACCOUNTS[row['gap']]} in {row['near']} of {row['cells']} cells{_where(row)}" for row in each]
        sentences.append(f"To within {100 * NEAR:g} points, of {network}, {listed(parts)}.")
    return " ".join(sentences)


def _where(row: Row) -> str:
    ratio = row["near_below_ratio"]
    return f" (all where |theta_0| / |alpha Delta| is below {two(ratio)})" if ratio is not None and row["near"] else ""


def _cells(rows: Rows) -> Table:
    head = [
        "network",
        "width",
        "scale",
        "epochs",
        "seed",
        "alpha",
        "|theta_0| / |Delta|",
        "own",
        "fresh",
        "literal",
        "predicted",
        "I",
        "R",
        "P",
    ]
    return Table(head, [[*_cell(row)] for row in rows])


def _cell(row: Row) -> list[Any]:
    kept = [row[name] for name in ("network", "width", "scale", "epochs", "seed", "alpha")]
    accuracies = [
        f"{100 * row[name]:.1f}" if name in row else None for name in ("own", "fresh", "literal", "predicted")
    ]
    gaps = [points(Interval.of(row, gap)) if gap in row else None for gap in ACCOUNTS]
    return [*kept, two(row["ratio"]), *accuracies, *gaps]


def widths(found: Found, tables: Tables) -> Section:
    rows = found["widths"]
    text = (
        "Particle networks of one and two layers of tanh, trained in two scalings, and the squared distance of each "
        "arm from the function predicted without a start. In the mean-field scaling a fresh start and Delta dealt anew "
        "come to it like 1/m; the own start does not, for displacement and start depend on each other; nor does "
        "anything in the standard scaling, where the start's own output does not vanish."
    )
    head = ["scaling", "layers", "arm", "slope over the width", "squared distance at the largest width"]
    table = [[SCALINGS[row["scaling"]], row["depth"], row["arm"], str(row["slope"]), row["error"]] for row in rows]
    items: list[Any] = [text, Table(head, table)]
    if len({row["width"] for row in tables["widths"]}) > 1:
        items.insert(1, Figure("widths", "Squared distance from the prediction, a point per training.", wide=True))
    return Section("The limit of width", items)


def steps(found: Found, tables: Tables) -> Section:
    rows = found["steps"]
    apart = max((row["apart"] for row in rows if row["apart"] is not None), default=0.0)
    text = (
        "Another start follows a training step by step. Open loop: it is given every step as it was, and ends at its "
        f"start + Delta, here to {scientific(apart)} of the largest parameter. Closed loop: steps come from its own "
        "errors, sent backward through the weights of the training that it follows. Random feedback: through fixed "
        "random weights. Agreement is the share of entries that a step moves as the network's own gradient would; one "
        "half is chance."
    )
    head = ["network", "rule", "trainings", "accuracy, training images, %", "held out, %", "agreement"]
    table = [
        [
            row["network"],
            row["rule"],
            row["trainings"],
            points(row["train_accuracy"]),
            points(row["held_out_accuracy"]),
            row["agreement"],
        ]
        for row in rows
    ]
    return Section("Step by step", [text, Table(head, table)])


def fusion(found: Found, tables: Tables) -> Section:
    text = (
        "Networks from different starts, made one from the training images without their labels. An average is of "
        "weights as they stand or after a matching of channels; repaired, its layers have the means and variances of "
        "the parents' on average, and statistics of batch norm are taken anew in any case. The union has the channels "
        "of all parents and their ensemble's outputs; reduced, it has the first parent's widths. The error is the "
        "squared difference of held-out outputs to the ensemble's, in units of these around their means."
    )
    rows, unions = found["fusion"], found["reduced_unions"]
    head = ["network", "parents", "pairs", "way", "accuracy", "loss", "error", "largest difference to the ensemble"]
    table = [
        [
            *(row[name] for name in ("network", "parents", "pairs")),
            way(row),
            points(row["accuracy"]),
            f"{row['loss']}",
            f"{row['error']}",
            scientific(row["difference"]),
        ]
        for row in rows
    ]
    short = [
        [
            *(row[name] for name in ("network", "parents", "pairs")),
            points(row["to_ensemble"]),
            points(row["to_matching"]),
            f"{row['to_random']}",
        ]
        for row in unions
    ]
    names = ["network", "parents", "pairs", "points, minus the ensemble", "minus the best repaired matching"]
    caption = (
        "Accuracy of two parents and of what is made of them, means over pairs with 95% intervals; beside each bar its "
        "error against the ensemble."
    )
    items = [
        text,
        " ".join(_reduced_text(row) for row in select(unions, parents=2)),
        _exactness(rows),
        Figure("fusion", caption, wide=True),
        Table([*names, "error over that of random channels"], short),
        "With three parents the third one is half as wide again. Of repaired matchings the one that is best on the "
        "validation images is taken, pair by pair. Means of errors are geometric.",
        Details("All ways", Table(head, table)),
    ]
    return Section("Networks made one", items)


def _reduced_text(row: Row) -> str:
    return (
        f"The union of two {row['network']} networks, reduced to the widths of one: accuracy minus the ensemble's "
        f"{points(row['to_ensemble'])} points, minus the best repaired matching's {points(row['to_matching'])}, "
        f"{row['to_random']} times the error of random channels."
    )


def _exactness(rows: Rows) -> str:
    union = max(row["difference"] for row in rows if row["way"] == "union")
    kept = [row["kept"] for row in rows if row["kept"] is not None]
    matched = f"; a matched parent gives its own to {scientific(max(kept))} of the largest one" if kept else ""
    return f"Union and ensemble give the same outputs to {scientific(union)}{matched}, in the networks' precision."


def reduction(found: Found, tables: Tables) -> Section:
    rows = found["reduction"]
    text = (
        "Which particles of a mixture stay? Elimination leaves out, one after the other, the particle without which "
        "the layers that read it miss least. Repopulation solves a convex program on all frozen particles, the "
        "mixture's own outputs its targets, and keeps the heaviest; its penalty is a setting, a factor of the default "
        f"strengths. Whatever stays is refitted in the same way. {capital(count(rows[0]['pairs'], 'pair'))} of "
        "particle networks of two layers, trained on all classes; the error is that of the section on networks made "
        "one."
    )
    head = ["share of one parent's widths", "chosen by", "accuracy", "points, minus the ensemble", "error"]
    table = [
        [
            f"{row['share']:g}",
            choice(row),
            points(row["accuracy"]),
            points(row["to_ensemble"]),
            f"{row['error']}",
            f"{row['to_elimination']}",
        ]
        for row in rows
    ]
    caption = "Errors against the ensemble and accuracies over the share of one parent's widths that is kept."
    items = [
        text,
        " ".join(_masses_text(row) for row in select(rows, way="masses", factor="chosen")),
        Figure("reduction", caption, wide=True),
        Table([*head, "error over that of elimination"], table),
    ]
    return Section("Reduction by repopulation against elimination", items)


def _masses_text(row: Row) -> str:
    """What the interval says; that of one pair says nothing."""
    ratio: Interval = row["to_elimination"]
    verdict = (
        "; not told from 1"
        if not ratio.bounded or ratio.low <= 1 <= ratio.high
        else ": worse"
        if ratio.low > 1
        else ": better"
    )
    return (
        f"At {row['share']:g} times one parent's widths masses, their penalty chosen on validation images, leave "
        f"{ratio} times the error of elimination{verdict}."
    )


def tasks(found: Found, tables: Tables) -> Section:
    rows = found["tasks"]
    text = (
        "Classes in groups, a task each, learnt one after another, and accuracies on held-out images after all of "
        "them, in per cent, means over seeds with 95% intervals. Strengths, and alpha of theta_A + alpha Delta_B, are "
        "chosen seed by seed on images kept from the training, and the method has all images then. Unions and averages "
        "are of networks that learnt a task alone, each from a start of its own, and have of each the rows of its own "
        f"classes; {REDUCED}: at the width of one of them, with the images of the newest task alone. With a head per "
        "task an image is decided among the classes of its task. Forgetting is the mean over all tasks but the last of "
        "the best accuracy before minus that in the end."
    )
    items: list[Any] = [text]
    if any("accuracy_3" not in row for row in rows):
        caption = (
            "Accuracy on either of two tasks, on the straight line from the network after the first one to that after "
            "both; the mark is the end."
        )
        items.append(Figure("tasks", caption, wide=True))
    for names, each in groups(rows, *TASK_NAMES).items():
        items += [_rivals_text(names, each, found["rivals"]), _tasks_table(each)]
    return Section("Tasks in sequence", items)


def _rivals_text(names: tuple[Any, ...], rows: Rows, rivals: Rows) -> str:
    """Whether the reduced union and its rivals separate."""
    network, division, heads = names
    said = f"{capital(division)}, {HEADS[heads]} ({network}, {count(rows[0]['seeds'], 'seed')})"
    own = at(rows, method=REDUCED)
    pairs = select(rivals, network=network, tasks=division, heads=heads)
    if own is None or not pairs:
        return f"{said}."
    parts = [f"{points(pair['difference'])} to {pair['method']}{SEPARATED[pair['separated']]}" for pair in pairs]
    return (
        f"{said}: the {REDUCED}, with images of the newest task alone, has {points(own['accuracy'])}; differences "
        f"paired by seeds, in points, are {listed(parts)}."
    )


def _tasks_table(rows: Rows) -> Table:
    by_task = [name for name in rows[0] if name.startswith("accuracy_")]
    head = [
        "method",
        "all tasks",
        *(f"task {name.removeprefix('accuracy_')}" for name in by_task),
        "loss",
        "forgetting, points",
        "strengths chosen",
        "at an end of those tried",
        "diverged",
    ]
    table = [
        [
            row["method"],
            *(points(row[name]) for name in ("accuracy", *by_task)),
            two(row["loss"].value),
            points(row["forgetting"]),
            ", ".join(f"{each:g}" for each in row["chosen"]),
            row["at_an_end"] if row["chosen"] else None,
            row["diverged"] or None,
        ]
        for row in rows
    ]
    return Table(head, table)
