"""A training repeated from another start, step by step, and by errors that go backward through other weights."""

from __future__ import annotations

import torch

from meanfield.bench.classifiers import Classifier
from meanfield.bench.sweep import Cell, Row
from meanfield.finite import feedback_aligned, fit, replay
from meanfield.landscape.directions import generator_of
from meanfield.studies.transfer.arms import STARTS
from meanfield.studies.transfer.judged import divided, scores
from meanfield.subject import Subject
from meanfield.transfer import Displacement


def steps(cell: Cell, store: str) -> list[Row]:
    """A row per rule: accuracies and losses; agreement, the mean share of entries per tensor that move as the network's
    own gradient would; apart, of the open loop, the largest distance of a parameter to start + Delta, over the largest
    parameter.

    cell: network (fields of a Classifier).
    """
    classifier = Classifier.from_dict(cell["network"])
    images, labels = classifier.images().inputs, classifier.training_labels()
    start, division = classifier.start().to(images), divided(classifier)
    other = classifier.variant(seed=STARTS * (classifier.seed + 1)).start().to(images)
    rows: list[Row] = []
    for loop in ("open", "closed"):
        found = replay(start, other, images, labels, classifier.recipe, classifier.seed, loop)
        if loop == "open":
            rows.append({"rule": "the training itself", **scores(found.source.network, division)})
        agreement = [each for each in found.agreement.values() if each == each]
        row = {"rule": f"{loop} loop", "agreement": sum(agreement) / len(agreement), **scores(found.network, division)}
        if loop == "open":
            row["apart"] = _apart(found.network, start, found.source.network, other, images)
        rows.append(row)
    fed = feedback_aligned(other, generator_of(classifier.seed))
    aligned = fit(fed, images, labels, classifier.recipe, classifier.seed)
    rows.append({"rule": "random feedback", **scores(aligned.network, division)})
    return [{**cell["names"], **row} for row in rows]


def _apart(
    replayed: torch.nn.Module,
    start: torch.nn.Module,
    end: torch.nn.Module,
    other: torch.nn.Module,
    images: torch.Tensor,
) -> float:
    """Of a replayed network from other + Delta."""
    moved = Subject(Displacement.between(start, end).applied(other, 1.0, images)).parameters
    found = Subject(replayed).parameters
    largest = max(float(each.abs().max()) for each in moved.values())
    return max(float((found[name] - each).abs().max()) for name, each in moved.items()) / largest
