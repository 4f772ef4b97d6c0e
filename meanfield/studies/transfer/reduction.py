"""Which channels of a mixture stay: those without which the layers behind miss most, those to which the convex program
gives most mass, or any.
"""

from __future__ import annotations

import torch

from meanfield import measures
from meanfield.architecture import Architecture, Conv
from meanfield.bench.classifiers import Classifier
from meanfield.bench.sweep import Cell, Row
from meanfield.finite import FiniteCNN, fit, sequential
from meanfield.fusion import reduce
from meanfield.penalties import Penalty
from meanfield.studies.transfer.fusion import error, outputs
from meanfield.studies.transfer.judged import Division, divided, scores

DEPTH = 2
STRENGTHS = ("source", "readout", "input")
SALT = 7919  # seeds of random channels are not those of a start


def reduction(cell: Cell, store: str) -> list[Row]:
    """A row per share of one parent's widths, way to choose channels and, of masses, factor of the default penalty:
    scores, and errors against the ensemble on validation and held-out images.

    cell: network (images, recipe, width and seed of the first parent; the second one's seed is the next), shares,
        factors.
    Networks have DEPTH layers, of `width` and twice as many particles, and a readout per position; they are trained in
    the standard scaling.
    """
    classifier = Classifier.from_dict(cell["network"])
    division, widths = divided(classifier), (classifier.width, 2 * classifier.width)
    parents = [_trained(classifier, widths, seed, division) for seed in (classifier.seed, classifier.seed + 1)]
    mixture = measures.mixture(parents[0].particles(), parents[1].particles(), 0.5)
    images, whole = division.training[0], sequential(mixture)
    ways = {"elimination": [None], "masses": cell["factors"], "random": [None]}
    rows = [{**cell["names"], "way": "ensemble", "share": 2.0, **scores(whole, division)}]
    for share in cell["shares"]:
        few = [max(1, round(share * width)) for width in widths]
        for way, factor in ((way, factor) for way, factors in ways.items() for factor in factors):
            penalty = None if factor is None else _penalty(factor)
            network = reduce(mixture, few, images, way, penalty=penalty, seed=classifier.seed + SALT)
            row = {**cell["names"], "way": way, "share": share, "factor": factor, **scores(network, division)}
            for name in ("validation", "held_out"):
                judged = getattr(division, name)[0]
                row[f"{name}_error"] = error(outputs(network, judged), outputs(whole, judged))
            rows.append(row)
    return rows


def _trained(classifier: Classifier, widths: tuple[int, int], seed: int, division: Division) -> FiniteCNN:
    images, labels = division.training
    channels, height, width = images.shape[1:]
    sides = [min(height, width) >> layer for layer in range(DEPTH)]
    layers = tuple(Conv(3, padding=1, bias=True, pooling="max" if side >= 2 else "none") for side in sides)
    architecture = Architecture((channels, height, width), layers, "flatten", classifier.images().classes)
    start = FiniteCNN.random(architecture, widths, images, torch.Generator().manual_seed(seed), "standard")
    network = fit(start, images, labels, classifier.recipe, seed).network
    assert isinstance(network, FiniteCNN)
    return network


def _penalty(factor: float) -> Penalty:
    """The default strengths times a factor."""
    strengths = {name: factor * getattr(Penalty(), name) for name in STRENGTHS}
    return Penalty(**strengths)
