"""A loss known by its formula alone: conjugate, domain and prox of a convex function of one variable, numerically."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meanfield.losses.base import LabelLoss, Loss
from meanfield.losses.kinked import rounded_in
from meanfield.validation import Misuse

STEPS = 80  # each halves the bracket: of 1e6 at weights of 1e-6, to rounding
DOUBLINGS = 40  # of the bracket of a slope, which begins at 1 around the target
FAR = 2.0**DOUBLINGS  # where slopes have reached their limits

Elementwise = Callable[[Tensor, Tensor], Tensor]


class ScalarLoss(Loss):
    """loss(F, y) = sum_k l(F_k, y_k) for a convex l, bounded below, of one variable F_k.

    value: l(F, y), elementwise on tensors of one shape (N, K), differentiated by torch.  slope: d l / d F, at a kink
    any subgradient; by default torch's derivative of `value`.  Both finite.
    name: in files and messages.  labels: y is -1 or +1, see `LabelLoss`; otherwise targets are real.
    supercoercive: l / |F| -> inf, so that every s is a slope; otherwise slopes end at those of F = y -+ 1e12.
    cvxpy: (cp, outputs, targets) -> the sum over images and outputs in cvxpy, for the reference solver.

    The conjugate s F - l(F, y) is taken where l' = s, the prox where l' + weight (F - center) = 0: roots of functions
    that do not fall, by Newton's method inside a bracket that is halved as well, for all entries at once.
    `losses.check` tells whether l is convex and the slope its own.
    """

    def __new__(cls, *args: Any, labels: bool = False, **kwargs: Any) -> ScalarLoss:
        made = _LabelScalarLoss if labels and cls is ScalarLoss else cls
        return super().__new__(made)  # type: ignore[arg-type]

    def __init__(
        self,
        value: Elementwise,
        slope: Elementwise | None = None,
        *,
        name: str,
        labels: bool = False,
        supercoercive: bool = False,
        cvxpy: Callable[[Any, Any, np.ndarray], Any] | None = None,
    ) -> None:
        for argument, given in (("value", value), ("slope", slope), ("cvxpy", cvxpy)):
            if not callable(given) and (argument == "value" or given is not None):
                raise Misuse(argument, given, "must be a function")
        self._value, self._slope, self._cvxpy = value, slope, cvxpy
        self.name, self.supercoercive = name, supercoercive

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        value = self._value(outputs, targets)
        if value.shape != outputs.shape:
            remedy = f"is the shape of what it gives: must be that of outputs and targets, {tuple(outputs.shape)}"
            raise Misuse("value", tuple(value.shape), remedy)
        return value.sum(1)

    def gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._slopes(outputs, targets)[0]

    def conjugate(self, dual: Tensor, targets: Tensor) -> Tensor:
        s, inside = self._in_domain(dual, targets)
        outputs = self._where(s, targets)
        return torch.where(inside, s * outputs - self._value(outputs, targets), torch.inf).sum(1)

    def feasible(self, dual: Tensor, targets: Tensor) -> Tensor:
        return self._in_domain(dual, targets)[0]

    def prox(self, center: Tensor, targets: Tensor, weight: float) -> Tensor:
        """Between the center and the point that its slope alone would move it to: the slope falls on the way."""
        end = center - self.gradient(center, targets) / weight

        def residual(outputs: Tensor, bend: bool) -> tuple[Tensor, Tensor, Tensor]:
            slope, bent = self._slopes(outputs, targets, bend)
            moved = weight * (outputs - center)
            return slope + moved, bent + weight, slope.abs() + moved.abs() + (bent + weight) * outputs.abs()

        return _root(residual, torch.minimum(center, end), torch.maximum(center, end))

    def cvxpy_sum(self, cp: Any, outputs: Any, targets: np.ndarray) -> Any:
        return super().cvxpy_sum(cp, outputs, targets) if self._cvxpy is None else self._cvxpy(cp, outputs, targets)

    def _slopes(self, outputs: Tensor, targets: Tensor, bend: bool = False) -> tuple[Tensor, Tensor]:
        """l' and, where asked for, l'' (0 where torch sees none), (N, K) each; no graph."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            if self._slope is None:
                (slope,) = torch.autograd.grad(self._value(leaf, targets).sum(), leaf, create_graph=bend)
            else:
                slope = self._slope(leaf, targets)
            bent = torch.zeros_like(outputs)
            if bend and slope.requires_grad:
                (found,) = torch.autograd.grad(slope.sum(), leaf, allow_unused=True)
                bent = bent if found is None else found
        return slope.detach(), bent.detach()

    def _in_domain(self, dual: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """A slope of l near each s, and whether s is one up to rounding."""
        if self.supercoercive:
            return dual, torch.ones_like(dual, dtype=torch.bool)
        return rounded_in(dual, self.gradient(targets - FAR, targets), self.gradient(targets + FAR, targets))

    def _where(self, slope: Tensor, targets: Tensor) -> Tensor:
        """F with l'(F) = slope, or where l' jumps over it; of an end that is only neared, where rounding reaches it."""
        low, high, step = targets - 1, targets + 1, 1.0
        for _ in range(DOUBLINGS):
            above, below = self.gradient(low, targets) > slope, self.gradient(high, targets) < slope
            if not slope.is_cuda and not bool((above | below).any()):
                break
            low, high = torch.where(above, low - step, low), torch.where(below, high + step, high)
            step *= 2

        def residual(outputs: Tensor, bend: bool) -> tuple[Tensor, Tensor, Tensor]:
            found, bent = self._slopes(outputs, targets, bend)
            return found - slope, bent, found.abs() + slope.abs() + bent * outputs.abs()

        return _root(residual, low, high)


class _LabelScalarLoss(ScalarLoss, LabelLoss):
    """Of labels -1 and +1."""


def _root(residual: Callable[[Tensor, bool], tuple[Tensor, Tensor, Tensor]], low: Tensor, high: Tensor) -> Tensor:
    """Where a function that does not fall passes 0 between low and high; given with its derivative, if asked for, and
    the size of the terms that cancel in it.
    """
    eps, at = torch.finfo(low.dtype).eps, 0.5 * (low + high)
    for _ in range(STEPS):
        value, slope, size = residual(at, True)
        low, high = torch.where(value <= 0, at, low), torch.where(value >= 0, at, high)
        newton = torch.where(slope > 0, at - value / slope, torch.inf)
        middle = 0.5 * (low + high)
        new = torch.where((newton >= low) & (newton <= high), newton, middle)
        there = value.abs() <= 2 * eps * size
        settled = there | (torch.minimum((new - at).abs(), high - low) <= 2 * eps * new.abs())
        at = torch.where(there, at, new)
        if not at.is_cuda and bool(settled.all()):
            break
        value = residual(middle, False)[0]
        low, high = torch.where(value <= 0, middle, low), torch.where(value >= 0, middle, high)
        at = torch.where((at > low) & (at < high), at, 0.5 * (low + high))
    return at
