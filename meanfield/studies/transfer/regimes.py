"""Who is right where: three gaps, each of them zero by one account of what a displacement is on another start.

I = own start - fresh start: zero where the start does not matter.  R = fresh start - literal noise: zero where the sum
is the trained network with noise.  P = fresh start - predicted: zero where the sum is the displacement's network with
an independent start, whose law is all that is known of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from meanfield.bench.classifiers import Classifier
from meanfield.bench.sweep import Cell, Row
from meanfield.finite import evaluate
from meanfield.finite.statistics import norms
from meanfield.rates import mean
from meanfield.studies.transfer.arms import Draw, Trained, fresh, literal, own
from meanfield.studies.transfer.judged import divided


def regimes(cell: Cell, store: str) -> list[Row]:
    """A row per alpha: accuracies on held-out images, and the gaps with intervals over the fresh starts, paired with
    the noise of their norms; of networks with batch norm `_divisors`.

    cell: networks (one training), alphas, draws.  ratio: |theta_0| / |Delta|.
    """
    trained = Trained.of(Classifier.from_dict(cell["networks"][0]), store)
    draws = [Draw.of(trained, number) for number in range(cell["draws"])]
    named = {**cell["names"], "draws": len(draws), "ratio": trained.ratio}
    return [{**named, "alpha": alpha, **_gaps(trained, alpha, draws)} for alpha in cell["alphas"]]


def _gaps(trained: Trained, alpha: float, draws: Sequence[Draw]) -> Row:
    images, labels = divided(trained.classifier).held_out

    def accuracy(network: nn.Module) -> float:
        return evaluate(network, images, labels).accuracy

    on_fresh = [trained.at(fresh(trained, draw, alpha)) for draw in draws]
    here = [accuracy(network) for network in on_fresh]
    noised = [accuracy(trained.at(literal(trained, draw, alpha))) for draw in draws]
    at_home = accuracy(trained.at(own(trained, draws[0], alpha)))
    row: Row = {"trained": accuracy(trained.at(trained.after)), "own": at_home}
    row |= {**mean(here).columns("fresh"), **mean(noised).columns("literal"), **_divisors(on_fresh)}
    row |= mean([at_home - each for each in here]).columns("I")
    row |= mean([each - other for each, other in zip(here, noised)]).columns("R")
    predicted = trained.predicted(alpha, images, labels)
    if predicted is not None:
        row |= {"predicted": predicted, **mean([each - predicted for each in here]).columns("P")}
    return row


def _divisors(networks: list[nn.Module]) -> Row:
    """Of networks with batch norm, the variances by which channels are divided: their deviation over channels and
    starts relative to their mean, layer by layer, the least and the largest.  Where it does not vanish with the width,
    no law of the start alone says what a channel is divided by.
    """
    found = []
    for name in norms(networks[0]):
        buffers = [each.get_submodule(name).get_buffer("running_var") for each in networks]
        spread, centre = torch.std_mean(torch.cat(buffers).double())
        found.append(float(spread / centre))
    return {"divisors_least": min(found), "divisors_most": max(found)} if found else {}
