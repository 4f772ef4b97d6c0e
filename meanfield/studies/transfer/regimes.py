"""Who is right where: three gaps, each of them zero by one account of what a displacement is on another start.

I = own start - fresh start: zero where the start does not matter.  R = fresh start - literal noise: zero where the sum
is the trained network with noise.  P = fresh start - predicted: zero where the sum is the displacement's network with
an independent start, whose law is all that is known of it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from meanfield import transfer
from meanfield.bench.classifiers import Classifier
from meanfield.bench.sweep import Cell, Row
from meanfield.finite import evaluate
from meanfield.rates import Interval, mean
from meanfield.studies.transfer.arms import Draw, Trained, fresh, literal, own
from meanfield.studies.transfer.judged import divided
from meanfield.studies.transfer.plan import PREDICTED


def regimes(cell: Cell, store: str) -> list[Row]:
    """A row per alpha: accuracies on held-out images, and the gaps with intervals over the fresh starts, paired with
    the noise of their norms.

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
    known["own"] = accuracy(trained.at(own(trained, drawn[0], alpha)))
    on_fresh, noised = ([accuracy(trained.at(arm(trained, draw, alpha))) for draw in drawn] for arm in (fresh, literal))
    known |= {"fresh": mean(on_fresh), "literal": mean(noised)}
    known["I"] = mean([known["own"] - each for each in on_fresh])
    known["R"] = mean([each - other for each, other in zip(on_fresh, noised)])
    if trained.classifier.network in PREDICTED:
        known["predicted"] = transfer.moments(trained.displacement, trained.law, images, alpha).accuracy(labels)
        known["P"] = mean([each - known["predicted"] for each in on_fresh])
    return _flat(known)


def _flat(figures: dict[str, Any]) -> Row:
    """Intervals as name, name_low, name_high."""
    found: Row = {}
    for name, figure in figures.items():
        if isinstance(figure, Interval):
            found |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
        else:
            found[name] = figure
    return found
