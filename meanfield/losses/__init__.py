"""Losses of the network output: value, gradient, convex conjugate, proximal map, and how classes become targets.

A loss is an object of `Loss`; `LOSSES` holds those that go by a name on a command line and in files.
"""

from __future__ import annotations

from torch import Tensor

from meanfield.losses.base import LabelLoss, Loss
from meanfield.losses.checking import LossCheck, check
from meanfield.losses.kinked import HingeLoss, HuberLoss
from meanfield.losses.scalar import ScalarLoss
from meanfield.losses.smooth import LogisticLoss, SoftmaxLoss, SquaredLoss
from meanfield.validation import Misuse, WrongType, one_of

__all__ = [
    "LOSSES",
    "HingeLoss",
    "HuberLoss",
    "LabelLoss",
    "LogisticLoss",
    "Loss",
    "LossCheck",
    "ScalarLoss",
    "SoftmaxLoss",
    "SquaredLoss",
    "accuracy",
    "check",
    "make",
]

LOSSES: dict[str, type[Loss]] = {
    "squared": SquaredLoss,
    "logistic": LogisticLoss,
    "softmax": SoftmaxLoss,
    "huber": HuberLoss,
    "hinge": HingeLoss,
}


def make(loss: str | Loss) -> Loss:
    """The loss of this name in LOSSES, or the loss itself; Misuse for anything else."""
    if isinstance(loss, str):
        try:
            return LOSSES[one_of(loss, "loss", LOSSES)]()
        except Misuse as error:
            raise Misuse("loss", loss, f"{error.remedy}, or give the loss itself, an object of losses.Loss") from None
    if not isinstance(loss, Loss):
        given = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
        raise WrongType("loss", given, "a name or an object of losses.Loss")
    if not isinstance(getattr(loss, "name", None), str) or not loss.name:
        raise Misuse("loss", type(loss).__name__, "needs a name, a text, by which files and messages call it")
    if LOSSES.get(loss.name, type(loss)) is not type(loss):
        raise Misuse("loss", loss.name, f"is the name of {LOSSES[loss.name].__name__}: give this loss another")
    return loss


def accuracy(loss: Loss, outputs: Tensor, targets: Tensor) -> float:
    """Share of images whose predicted class is that of their target (targets as stored by a Problem)."""
    return float((loss.predict(outputs) == loss.decode(targets)).double().mean())
