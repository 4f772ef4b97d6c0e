"""What a network is judged on: images it was trained on, images by which something is chosen, images held out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from meanfield.bench.classifiers import Classifier
from meanfield.bench.sweep import Cell, Row
from meanfield.finite import evaluate


class Division(NamedTuple):
    """Images (N, C, H, W) and classes (N,) of three kinds: what a Classifier does not train on, halved."""

    training: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


def divided(classifier: Classifier) -> Division:
    """With the labels that the classifier trains on."""
    images = classifier.images()
    half = len(images.held_out) // 2
    validation, held_out = (
        (images.held_out[part], images.held_out_labels[part]) for part in (slice(half), slice(half, None))
    )
    return Division((images.inputs, classifier.training_labels()), validation, held_out)


def scores(network: nn.Module, division: Division) -> Row:
    """train_accuracy, train_loss, validation_accuracy, ..., held_out_loss."""
    found = {}
    for name, (images, labels) in zip(("train", "validation", "held_out"), division):
        score = evaluate(network, images, labels)
        found |= {f"{name}_accuracy": score.accuracy, f"{name}_loss": score.loss}
    return found


def train(cell: Cell, store: str) -> list[Row]:
    """Train one classifier into the store: its losses and accuracies at the end, on the labels it was trained on."""
    classifier = Classifier.from_dict(cell)
    network = classifier.at(classifier.epochs, store)
    kept = ("network", "width", "scale", "labels", "seed", "epochs")
    return [{**{name: getattr(classifier, name) for name in kept}, **scores(network, divided(classifier))}]
