"""Losses of the network output: value, gradient, convex conjugate and proximal map.

All work on batches: outputs F and dual arguments s have shape (N, K); values are per image, (N,).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from meanfield.validation import Misuse, finite, one_of

NEWTON_STEPS = 60
DEVICE_STEPS = 20  # on a GPU their number is fixed: to look whether all have settled would wait for it


class Loss(Protocol):
    """A loss convex in the output F, with everything that the solvers and the certificates need."""

    name: str
    classification: bool

    def check_targets(self, targets: Tensor, count: int, outputs: int, like: Tensor) -> Tensor: ...

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor: ...

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor: ...

    def conjugate(self, dual: Tensor, targets: Tensor) -> Tensor: ...

    def feasible(self, dual: Tensor, targets: Tensor) -> Tensor: ...

    def prox(self, center: Tensor, targets: Tensor, weight: float) -> Tensor: ...

    def predict(self, outputs: Tensor) -> Tensor: ...


def _steps(like: Tensor) -> int:
    return DEVICE_STEPS if like.is_cuda else NEWTON_STEPS


def _check_count(targets: Tensor, count: int) -> None:
    if targets.ndim == 0 or targets.shape[0] != count:
        raise ValueError(f"targets has shape {tuple(targets.shape)}; expected {count} rows, one per input")


def _columns(targets: Tensor, count: int, outputs: int, like: Tensor) -> Tensor:
    """Targets (N,) or (N, K) as a floating tensor (N, K)."""
    _check_count(targets, count)
    columns = targets.reshape(count, -1) if targets.ndim <= 2 else targets
    if tuple(columns.shape) != (count, outputs):
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}; expected ({count}, {outputs}) for {outputs} outputs"
        )
    return finite(columns.to(dtype=like.dtype, device=like.device), "targets")


class SquaredLoss:
    """loss(F, y) = 1/2 |F - y|^2."""

    name = "squared"
    classification = False

    def check_targets(self, targets: Tensor, count: int, outputs: int, like: Tensor) -> Tensor:
        return _columns(targets, count, outputs, like)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().sum(1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs - targets

    def conjugate(self, dual: Tensor, targets: Tensor) -> Tensor:
        """1/2 |s|^2 + <s, y>."""
        return (0.5 * dual.square() + dual * targets).sum(1)

    def feasible(self, dual: Tensor, targets: Tensor) -> Tensor:
        return dual

    def prox(self, center: Tensor, targets: Tensor, weight: float) -> Tensor:
        return (targets + weight * center) / (1 + weight)

    def predict(self, outputs: Tensor) -> Tensor:
        """Signs for one output (labels -1, +1), else the largest output."""
        return torch.where(outputs[:, 0] >= 0, 1, -1) if outputs.shape[1] == 1 else outputs.argmax(1)


class LogisticLoss:
    """loss(F, y) = sum_k log(1 + exp(-y_k F_k)), labels y in {-1, +1}."""

    name = "logistic"
    classification = True

    def check_targets(self, targets: Tensor, count: int, outputs: int, like: Tensor) -> Tensor:
        columns = _columns(targets, count, outputs, like)
        bad = columns[columns.abs() != 1]
        if bad.numel():
            raise ValueError(f"targets contain {bad[0].item():g}; the logistic loss expects the labels -1 and 1")
        if outputs == 1 and count > 1 and bool((columns == columns[0]).all()):
            raise ValueError(f"targets hold one class only (label {columns[0].item():g}); both -1 and 1 are needed")
        return columns

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-targets * outputs).sum(1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -targets * torch.sigmoid(-targets * outputs)

    def conjugate(self, dual: Tensor, targets: Tensor) -> Tensor:
        """Binary negative entropy of v = -y s, +inf outside 0 <= v <= 1."""
        v = -targets * dual
        entropy = torch.xlogy(v, v) + torch.xlogy(1 - v, 1 - v)
        return torch.where((v >= 0) & (v <= 1), entropy, torch.inf).sum(1)

    def feasible(self, dual: Tensor, targets: Tensor) -> Tensor:
        return -targets * (-targets * dual).clamp(0, 1)

    def prox(self, center: Tensor, targets: Tensor, weight: float) -> Tensor:
        """Root m of weight (m - mc) = sigmoid(-m) for the margin m = y F, by Newton kept inside a bracket."""
        margin_center = targets * center
        low, high = margin_center, margin_center + 1 / weight
        margin = margin_center + torch.sigmoid(-margin_center) / (weight + 0.25)
        for _ in range(_steps(center)):
            sigmoid = torch.sigmoid(-margin)
            residual = weight * (margin - margin_center) - sigmoid
            low, high = torch.where(residual < 0, margin, low), torch.where(residual > 0, margin, high)
            step = margin - residual / (weight + sigmoid * (1 - sigmoid))
            new = torch.where((step >= low) & (step <= high), step, 0.5 * (low + high))
            settled = (new - margin).abs() <= 4 * torch.finfo(margin.dtype).eps * (1 + margin.abs())
            margin = new
            if not margin.is_cuda and bool(settled.all()):
                break
        return targets * margin

    def predict(self, outputs: Tensor) -> Tensor:
        return torch.where(outputs[:, 0] >= 0, 1, -1) if outputs.shape[1] == 1 else outputs.sign()


class SoftmaxLoss:
    """loss(F, y) = log sum_k exp F_k - F_y, integer classes y in 0..K-1."""

    name = "softmax"
    classification = True

    def check_targets(self, targets: Tensor, count: int, outputs: int, like: Tensor) -> Tensor:
        _check_count(targets, count)
        if outputs < 2:
            raise Misuse("outputs", outputs, "is too few: the softmax loss needs one output per class, at least 2")
        if targets.ndim != 1 or bool((targets != targets.floor()).any() if targets.is_floating_point() else False):
            raise ValueError(
                f"targets of shape {tuple(targets.shape)}: the softmax loss expects ({count},) integer classes"
            )
        classes = targets.to(dtype=torch.int64, device=like.device)
        if int(classes.min()) < 0 or int(classes.max()) >= outputs:
            raise ValueError(
                f"targets lie in {int(classes.min())}..{int(classes.max())}; with outputs={outputs} the classes are "
                f"0..{outputs - 1}"
            )
        if count > 1 and bool((classes == classes[0]).all()):
            raise ValueError(f"targets hold one class only ({int(classes[0])}); at least two are needed")
        return classes

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.softmax(1) - self._one_hot(targets, outputs)

    def conjugate(self, dual: Tensor, targets: Tensor) -> Tensor:
        """Negative entropy of v = s + e_y, +inf outside the simplex (checked to rounding in its sum)."""
        v = dual + self._one_hot(targets, dual)
        slack = 16 * v.shape[1] * torch.finfo(v.dtype).eps
        inside = (v >= 0).all(1) & ((v.sum(1) - 1).abs() <= slack)
        return torch.where(inside, torch.xlogy(v, v).sum(1), torch.inf)

    def feasible(self, dual: Tensor, targets: Tensor) -> Tensor:
        v = (dual + self._one_hot(targets, dual)).clamp_min(0)
        total = v.sum(1, keepdim=True)
        v = torch.where(total > 0, v / total, self._one_hot(targets, dual))
        return v - self._one_hot(targets, dual)

    def prox(self, center: Tensor, targets: Tensor, weight: float) -> Tensor:
        """Newton's method; the Hessian diag(v + weight) - v v^T is inverted by Sherman-Morrison."""
        outputs, merit = center, self._merit(center, center, targets, weight)
        for _ in range(_steps(center)):
            v = outputs.softmax(1)
            gradient = v - self._one_hot(targets, center) + weight * (outputs - center)
            inverse = 1 / (v + weight)
            along = (inverse * v * gradient).sum(1, keepdim=True) / (1 - (inverse * v * v).sum(1, keepdim=True))
            step = inverse * (gradient + v * along)
            # rounding of the gradient over the least curvature
            settled = step.abs() <= 8 * torch.finfo(v.dtype).eps * (1 + outputs.abs() + 1 / weight)
            if not step.is_cuda and bool(settled.all()):
                break
            outputs, merit = self._advance(outputs, step, merit, center, targets, weight)
        return outputs

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(1)

    def _merit(self, outputs: Tensor, center: Tensor, targets: Tensor, weight: float) -> Tensor:
        return self.value(outputs, targets) + 0.5 * weight * (outputs - center).square().sum(1)

    def _advance(
        self, outputs: Tensor, step: Tensor, merit: Tensor, center: Tensor, targets: Tensor, weight: float
    ) -> tuple[Tensor, Tensor]:
        """The full Newton step of each image if its merit does not rise beyond rounding, else log(1 + d) / d of it.

        d is the step's span: along it the Hessian changes by at most exp(d), so that the shorter step always descends
        (generalised self-concordance; Sun & Tran-Dinh 2019, theorem 2).
        """
        whole = outputs - step
        new = self._merit(whole, center, targets, weight)
        descends = new <= merit + 8 * torch.finfo(merit.dtype).eps * (1 + merit.abs())
        span = (step.amax(1, keepdim=True) - step.amin(1, keepdim=True)).clamp_min(torch.finfo(merit.dtype).tiny)
        shorter = outputs - torch.log1p(span) / span * step
        return torch.where(descends[:, None], whole, shorter), torch.where(
            descends, new, self._merit(shorter, center, targets, weight)
        )

    def _one_hot(self, targets: Tensor, like: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(targets, like.shape[1]).to(like.dtype)


LOSSES: dict[str, type[Loss]] = {"squared": SquaredLoss, "logistic": LogisticLoss, "softmax": SoftmaxLoss}


def make(name: str) -> Loss:
    """The loss called `name`: 'squared', 'logistic' or 'softmax'."""
    return LOSSES[one_of(name, LOSSES, "loss")]()


def accuracy(loss: Loss, outputs: Tensor, targets: Tensor) -> float:
    """Share of images whose predicted label is the target (targets as stored by a Problem)."""
    predicted = loss.predict(outputs)
    if isinstance(loss, SquaredLoss) and outputs.shape[1] > 1:
        return float((predicted == targets.argmax(1)).double().mean())
    return float((predicted == targets.reshape(predicted.shape)).double().mean())
