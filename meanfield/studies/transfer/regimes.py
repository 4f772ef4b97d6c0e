"""Who is right where: three gaps, each of them zero by one account of what a displacement is on another start.

I = own start - fresh start: zero where the start does not matter.  R = fresh start - literal noise: zero where the sum
is the trained network with noise.  P = fresh start - predicted: zero where the sum is the displacement's network with
an independent start, whose law is all that is known of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from meanfield import transfer
from meanfield.bench.classifiers import Classifier
from meanfield.bench.sweep import Cell, Row
from meanfield.finite import evaluate
from meanfield.finite.statistics import norms
from meanfield.rates import Interval, mean
from meanfield.studies.transfer.arms import Draw, Trained, fresh, literal, own
from meanfield.studies.transfer.judged import divided
from meanfield.studies.transfer.plan import PREDICTED


def regimes(cell: Cell, store: str) -> list[Row]:
    """A row per alpha: accuracies on held-out images, and the gaps with intervals over the fresh starts, paired with
    the noise of their norms; of networks with batch norm `_divisors`.

    cell: networks (one training), alphas, draws.  ratio: |theta_0| / |Delta|.
    """
    trained = Trained.of(Classifier.from_dict(cell["networks"][0]), store)
    named = {**cell["names"], "draws": cell["draws"], "ratio": trained.ratio}
    return [{**named, "alpha": alpha, **_gaps(trained, alpha, cell["draws"])} for alpha in cell["alphas"]]


def _gaps(trained: Trained, alpha: float, draws: int) -> Row:
    images, labels = divided(trained.classifier).held_out

    def accuracy(network: nn.Module) -> float:
        return evaluate(network, images, labels).accuracy

    known: dict[str, Any] = {"trained": accuracy(trained.at(trained.after))}
    drawn = [Draw.of(trained, number) for number in range(draws)]
    on_fresh = [trained.at(fresh(trained, draw, alpha)) for draw in drawn]
    known["own"] = accuracy(trained.at(own(trained, drawn[0], alpha)))
    fresh_ones = [accuracy(network) for network in on_fresh]
    noised = [accuracy(trained.at(literal(trained, draw, alpha))) for draw in drawn]
    known |= {"fresh": mean(fresh_ones), "literal": mean(noised), **_divisors(on_fresh)}
    known["I"] = mean([known["own"] - each for each in fresh_ones])
    known["R"] = mean([each - other for each, other in zip(fresh_ones, noised)])
    if trained.classifier.network in PREDICTED:
        known["predicted"] = transfer.moments(trained.displacement, trained.law, images, alpha).accuracy(labels)
        known["P"] = mean([each - known["predicted"] for each in fresh_ones])
    return _flat(known)


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


def _flat(figures: dict[str, Any]) -> Row:
    """Intervals as name, name_low, name_high."""
    found: Row = {}
    for name, figure in figures.items():
        if isinstance(figure, Interval):
            found |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
        else:
            found[name] = figure
    return found
