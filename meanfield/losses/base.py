"""What a loss is: value, gradient, convex conjugate, proximal map, and how classes become targets.

All work on batches: outputs F and dual arguments s have shape (N, K); values are per image, (N,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meanfield.validation import Misuse, finite


class Loss(ABC):
    """A loss convex in the output F and bounded below: the one place of all that is particular to it.

    name: in files and messages; what decides the loss besides its class belongs into it, such as "huber(0.5)".
    supercoercive: loss / |F| -> inf as |F| -> inf, in other words the conjugate is finite everywhere.

    Classes: `encode` turns a class c = 0, 1, ... into a target, `predict` says which class outputs speak for.  Unless a
    loss says otherwise, targets are real, one number per output: two classes share one output, with +1 for class 0 and
    -1 for class 1; more have one output each, with 1 for the own class and 0 for the others.
    """

    name: str
    supercoercive = False

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`value`: a loss is a function of outputs and targets wherever one is taken."""
        return self.value(outputs, targets)

    @abstractmethod
    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """loss(F, y), (N,); differentiated by torch in the outputs."""

    @abstractmethod
    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """d loss / d F, (N, K); of a loss with kinks any subgradient."""

    @abstractmethod
    def conjugate(self, dual: Tensor, targets: Tensor) -> Tensor:
        """sup_F <s, F> - loss(F, y), (N,); +inf outside its domain."""

    @abstractmethod
    def feasible(self, dual: Tensor, targets: Tensor) -> Tensor:
        """A point of the conjugate's domain near s, (N, K): s itself where it lies in it."""

    @abstractmethod
    def prox(self, center: Tensor, targets: Tensor, weight: float) -> Tensor:
        """argmin_F loss(F, y) + weight / 2 |F - center|^2, (N, K)."""

    def cvxpy_sum(self, cp: Any, outputs: Any, targets: np.ndarray) -> Any:
        """sum_n loss(F_n, y_n) in atoms of cvxpy, the module `cp`; outputs is an affine expression (N, K).

        Only the reference solver and the exact optimum of one layer need it.
        """
        raise Misuse("loss", self.name, "has no form in cvxpy: give it a method cvxpy_sum")

    def unit(self, targets: Tensor) -> float:
        """A size b > 0 of targets with loss(F, y) = b^2 loss(F / b, y / b); 1 where targets are labels."""
        return 1.0

    def outputs_for(self, classes: int) -> int:
        """K, the outputs that tell so many classes apart."""
        return 1 if classes == 2 else classes

    def encode(self, indices: Tensor, classes: int) -> Tensor:
        """Targets of images of the classes `indices` (N,) int64 in 0..classes-1: (N,) or (N, K), float64."""
        if self.outputs_for(classes) == 1:
            return 1.0 - 2.0 * indices.double()
        return torch.nn.functional.one_hot(indices, classes).double()

    def check_targets(self, targets: Tensor, count: int, outputs: int, like: Tensor) -> Tensor:
        """The targets of `count` images as the other methods take them, dtype and device of `like`; ValueError."""
        return columns(targets, count, outputs, like)

    def predict(self, outputs: Tensor) -> Tensor:
        """The class that outputs (N, K) speak for, (N,) int64; of equals the first, an only output of 0 included."""
        return (outputs[:, 0] < 0).long() if outputs.shape[1] == 1 else outputs.argmax(1)

    def decode(self, targets: Tensor) -> Tensor:
        """The class of checked targets, (N,) int64: undoes `encode`."""
        return self.predict(targets)


def check_count(targets: Tensor, count: int) -> None:
    """Refuse targets that are not one row per image."""
    if targets.ndim == 0 or targets.shape[0] != count:
        raise ValueError(f"targets has shape {tuple(targets.shape)}; expected {count} rows, one per input")


def columns(targets: Tensor, count: int, outputs: int, like: Tensor) -> Tensor:
    """Targets (N,) or (N, K) as a floating tensor (N, K)."""
    check_count(targets, count)
    if targets.is_complex():
        raise ValueError(f"targets has dtype {targets.dtype}; targets are real")
    rows = targets.reshape(count, -1) if targets.ndim <= 2 else targets
    if tuple(rows.shape) != (count, outputs):
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}; expected ({count}, {outputs}) for {outputs} outputs"
        )
    return finite(rows.to(dtype=like.dtype, device=like.device), "targets")


class LabelLoss(Loss):
    """A loss of labels y in {-1, +1}.  More than two classes: one against the rest, +1 for the own class, -1 for the
    others.
    """

    def encode(self, indices: Tensor, classes: int) -> Tensor:
        targets = super().encode(indices, classes)
        return targets if targets.ndim == 1 else 2 * targets - 1

    def check_targets(self, targets: Tensor, count: int, outputs: int, like: Tensor) -> Tensor:
        found = columns(targets, count, outputs, like)
        bad = found[found.abs() != 1]
        if bad.numel():
            raise ValueError(f"targets contain {bad[0].item():g}; the {self.name} loss expects the labels -1 and 1")
        if outputs == 1 and count > 1 and bool((found == found[0]).all()):
            raise ValueError(f"targets hold one class only (label {found[0].item():g}); both -1 and 1 are needed")
        return found
