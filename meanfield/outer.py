"""The outer function r(t) = t^q, q > 1, of the penalties on sources and on the readout, and all that follows from it.

    perspective   p r(s / p) = s^q / p^(q-1)                   jointly convex in s, p >= 0
    conjugate     sup_{t >= 0} x t - lambda r(t) = (x / c)^q'      q' = q / (q - 1), c = q lambda^(1/q) / (q-1)^(1/q')
    price         the x whose conjugate is a level: c level^(1/q')

(docs/theory.md, section 5.)  For q = 2: s^2 / p, x^2 / (4 lambda), 2 sqrt(lambda level).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outer:
    """t^power, power > 1.  Strengths are factors lambda >= 0 of it; all tensors hold numbers of at least 0."""

    power: float = 2.0

    @property
    def dual_power(self) -> float:
        """q' with 1/q + 1/q' = 1."""
        return self.power / (self.power - 1)

    def __call__(self, amounts: Tensor) -> Tensor:
        """r(t) of amounts t, elementwise."""
        return amounts.pow(self.power)

    def of_squares(self, squares: Tensor) -> Tensor:
        """r(t) of squares t^2, with the gradient 0 where they vanish."""
        if self.power == 2:
            return squares
        positive = squares > 0
        return torch.where(positive, torch.where(positive, squares, 1.0).pow(self.power / 2), 0.0)

    def perspective(self, amounts: Tensor, masses: Tensor) -> Tensor:
        """p r(s / p), with 0 where s = p = 0 and +inf where s > 0 = p."""
        positive = masses > 0
        safe = torch.where(positive, masses, 1.0)
        # the power of a light mass alone may underflow where s / p is ordinary
        found = amounts.square() / safe if self.power == 2 else safe * (amounts / safe).pow(self.power)
        return torch.where(positive, found, torch.where(amounts > 0, torch.inf, 0.0))

    def conjugate(self, pulls: Tensor, strength: float) -> Tensor:
        """sup over t >= 0 of x t - strength r(t) at pulls x; for strength 0 its limit: 0 or +inf."""
        if strength > 0:
            return (pulls / math.sqrt(self._square(strength))).pow(self.dual_power)  # x^2 alone may underflow
        return torch.where(pulls == 0, 0.0, torch.inf)

    def conjugate_of_squares(self, squares: Tensor, strength: float) -> Tensor:
        """`conjugate` at the pulls of which these are the squares; strength > 0.  Differentiable where they vanish."""
        shares = squares / self._square(strength)
        return shares if self.power == 2 else Outer(self.dual_power).of_squares(shares)

    def price(self, levels: Tensor, strength: float) -> Tensor:
        """The pull whose conjugate is the level, the inverse of `conjugate`: the least x with strength r(t) + level >=
        x t for every t.
        """
        if self.power == 2:
            return (self._square(strength) * levels).sqrt()
        return math.sqrt(self._square(strength)) * levels.pow(1 / self.dual_power)

    def _square(self, strength: float) -> float:
        """c^2, exactly 4 strength for power 2."""
        q = self.power
        return q * q * strength ** (2 / q) / (q - 1) ** (2 / self.dual_power)
