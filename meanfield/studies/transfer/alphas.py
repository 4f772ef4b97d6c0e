"""A displacement on other starts, over its factor alpha, with every control."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from meanfield.bench.classifiers import Classifier
from meanfield.bench.sweep import Cell, Row
from meanfield.finite import evaluate
from meanfield.studies.transfer.arms import ARMS, FIXED, Draw, Trained
from meanfield.studies.transfer.judged import Division, divided, scores


def alphas(cell: Cell, store: str) -> list[Row]:
    """A row per arm and alpha: accuracies and losses, means over draws.

    cell: networks (a training, another one, one on permuted labels), alphas, draws.
    memorised_accuracy: of the arm "permuted labels", on the training images with the labels it was trained on.
    """
    mine, other, permuted = (Trained.of(Classifier.from_dict(each), store) for each in cell["networks"])
    division, memorised = divided(mine.classifier), divided(permuted.classifier).training
    draws = [Draw.of(mine, number, other, permuted) for number in range(cell["draws"])]
    rows = []
    for arm, make in ARMS.items():
        for alpha in cell["alphas"]:
            made = [make(mine, draw, alpha) for draw in (draws[:1] if arm in FIXED else draws)]
            networks = [mine.at(parameters) for parameters in made if parameters is not None]
            if not networks:
                continue
            row = {**cell["names"], "arm": arm, "alpha": alpha}
            row |= _means([scores(network, division) for network in networks])
            if arm == "permuted labels":
                row["memorised_accuracy"] = fmean(evaluate(network, *memorised).accuracy for network in networks)
            rows.append(row)
    return [*rows, *_predicted(mine, division, cell)]


def _means(found: Sequence[Row]) -> Row:
    return {name: fmean(row[name] for row in found) for name in found[0]}


def _predicted(trained: Trained, division: Division, cell: Cell) -> list[Row]:
    """Of a fresh start, without one."""
    found = {alpha: trained.predicted(alpha, *division.held_out) for alpha in cell["alphas"]}
    return [
        {**cell["names"], "arm": "predicted", "alpha": alpha, "held_out_accuracy": accuracy}
        for alpha, accuracy in found.items()
        if accuracy is not None
    ]
