"""Losses whose conjugate has a bounded domain and whose slope bends or jumps: Huber, hinge."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from meanfield.losses.base import LabelLoss, Loss
from meanfield.validation import positive


def rounded_in(amount: Tensor, low: Tensor | float, high: Tensor | float) -> tuple[Tensor, Tensor]:
    """The amount moved into [low, high], and whether it was there up to rounding: duals that were divided by N and
    multiplied by it again lie on the end of a domain as often as in it.
    """
    inside = amount.clamp(low, high)  # type: ignore[arg-type]
    slack = 16 * torch.finfo(amount.dtype).eps
    return inside, (amount - inside).abs() <= slack * inside.abs()


class HuberLoss(Loss):
    """loss(F, y) = sum_k h(F_k - y_k), h(t) = t^2 / 2 for |t| <= delta, delta |t| - delta^2 / 2 beyond; real targets.

    h is the infimal convolution of t^2 / 2 and delta |t|, so h* is the sum of their conjugates: s^2 / 2 where |s| <=
    delta, else +inf; the shift by y adds s y.  (Huber 1964.)
    """

    def __init__(self, delta: float = 1.0) -> None:
        self.delta = positive(delta, "delta")
        self.name = "huber" if self.delta == 1 else f"huber({self.delta!r})"  # every digit: two deltas, two names

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.huber_loss(outputs, targets, reduction="none", delta=self.delta).sum(1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).clamp(-self.delta, self.delta)

    def conjugate(self, dual: Tensor, targets: Tensor) -> Tensor:
        s, inside = rounded_in(dual, -self.delta, self.delta)
        return torch.where(inside, 0.5 * s.square() + s * targets, torch.inf).sum(1)

    def feasible(self, dual: Tensor, targets: Tensor) -> Tensor:
        return dual.clamp(-self.delta, self.delta)

    def prox(self, center: Tensor, targets: Tensor, weight: float) -> Tensor:
        """The slope s satisfies s + weight (F - center) = 0: s = weight (center - y) / (1 + weight), clipped."""
        share = weight / (1 + weight)
        return center - (share * (center - targets)).clamp(-self.delta, self.delta) / weight

    def cvxpy_sum(self, cp: Any, outputs: Any, targets: np.ndarray) -> Any:
        return 0.5 * cp.sum(cp.huber(outputs - targets, self.delta))


class HingeLoss(LabelLoss):
    """loss(F, y) = sum_k max(0, 1 - y_k F_k), labels y in {-1, +1}.

    More than two classes: one against the rest.  With the margin m = y F and v = -y s the conjugate is the supremum of
    -v m - max(0, 1 - m), which m = 1 attains for 0 <= v <= 1 and is +inf otherwise: -v = y s.

    At margins of 1 it has a kink, where solutions like to lie.  `gradient` is the subgradient 0 there, so a descent
    along it ends near and not at a minimum, and the gap at the duals that it gives stays open; bounds by any dual hold.
    The duals of the convex program lie between, and close the gap.
    """

    name = "hinge"

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (1 - targets * outputs).clamp_min(0).sum(1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.where(targets * outputs < 1, -targets, torch.zeros_like(targets))

    def conjugate(self, dual: Tensor, targets: Tensor) -> Tensor:
        """-v for v = -y s, +inf outside 0 <= v <= 1."""
        v, inside = rounded_in(-targets * dual, 0.0, 1.0)
        return torch.where(inside, -v, torch.inf).sum(1)

    def feasible(self, dual: Tensor, targets: Tensor) -> Tensor:
        return -targets * (-targets * dual).clamp(0, 1)

    def prox(self, center: Tensor, targets: Tensor, weight: float) -> Tensor:
        """The margin moves up by 1 / weight, and not beyond 1."""
        margin = targets * center
        return targets * torch.maximum(margin, (margin + 1 / weight).clamp_max(1))

    def cvxpy_sum(self, cp: Any, outputs: Any, targets: np.ndarray) -> Any:
        return cp.sum(cp.pos(1 - cp.multiply(targets, outputs)))
