"""Networks at equal training loss: where a training passes a given loss, between two of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from meanfield.bench.classifiers import Classifier
from meanfield.finite import evaluate

SHARE = 1e-6  # of a segment between two checkpoints, to which the point is found

State = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Passed:
    """A network whose training loss is the target, the loss that it has, and the time: epochs, whole and a part."""

    network: nn.Module
    loss: float
    epoch: float


def at_loss(classifier: Classifier, store: str | Path, target: float) -> Passed | None:
    """The network with which the training first has this loss, None where no checkpoint is below it.

    It lies on the straight line from the last checkpoint above the target to the first one below, where the loss, which
    is continuous, has it.  A start that is below is taken as it is.
    """
    images, labels = classifier.images(), classifier.training_labels()

    def loss(network: nn.Module) -> float:
        return evaluate(network, images.inputs, labels, loss=classifier.loss).loss

    before: tuple[int, nn.Module] | None = None
    for epoch in classifier.checkpoints:
        network = classifier.at(epoch, store)
        if loss(network) > target:
            before = epoch, network
            continue
        if before is None:
            return Passed(network, loss(network), epoch)
        share = passing(loss, before[1], network, target)
        return Passed(network, loss(network), before[0] + share * (epoch - before[0]))
    return None


def passing(loss: Callable[[nn.Module], float], above: nn.Module, below: nn.Module, target: float) -> float:
    """The share t of the way from a network above the target to one below at which the loss is the target; `below` is
    moved there.
    """
    first, second = ({name: tensor.clone() for name, tensor in each.state_dict().items()} for each in (above, below))

    def excess(share: float) -> float:
        below.load_state_dict(between(first, second, share))
        return loss(below) - target

    if excess(1.0) == 0:
        return 1.0
    found: Any = brentq(excess, 0.0, 1.0, xtol=SHARE)
    excess(found)
    return float(found)


def between(first: State, second: State, share: float) -> dict[str, Tensor]:
    """(1 - share) first + share second of states, running statistics included; counts are the second's."""
    return {
        name: torch.lerp(first[name], tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in second.items()
    }
