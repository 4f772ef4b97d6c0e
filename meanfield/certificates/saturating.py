"""Odd activations that are concave above zero and end at one: tanh, erf, hard tanh; how far they are from lines."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Saturating:
    """An odd h, concave on x >= 0, with |h| <= 1.

    slope: h'(0), the largest.  derivative: h', which falls as |x| rises.  touch: where it falls to theta, 0 < theta <=
    slope.  bend: the largest |h''| at |x| >= y, y >= 0; inf before a kink.
    """

    function: Callable[[Tensor], Tensor]
    slope: float
    derivative: Callable[[Tensor], Tensor]
    touch: Callable[[Tensor], Tensor]
    bend: Callable[[Tensor], Tensor]

    def apart(self, theta: Tensor, reach: Tensor) -> Tensor:
        """alpha(theta, T) = max_{|x| <= T} |h(x) - theta x|: h - theta x rises to its top and falls to where T ends."""
        top = torch.minimum(self.touch(theta), reach)
        above, below = self.function(top) - theta * top, theta * reach - self.function(reach)
        return torch.maximum(above, below).clamp_min(0)


TANH_BEND, ERF_BEND = math.atanh(3**-0.5), 0.5**0.5  # where |h''| is largest
ERF = 2 / math.sqrt(math.pi)


def _tanh_bend(least: Tensor) -> Tensor:
    h = least.clamp_min(TANH_BEND).tanh()
    return 2 * h * (1 - h.square())


def _erf_bend(least: Tensor) -> Tensor:
    x = least.clamp_min(ERF_BEND)
    return 2 * ERF * x * (-x.square()).exp()


def _kink(least: Tensor) -> Tensor:
    return torch.where(least < 1, math.inf, 0.0).to(least)


SATURATING = {
    "tanh": Saturating(
        torch.tanh, 1.0, lambda x: 1 - x.tanh().square(), lambda theta: (1 - theta).sqrt().atanh(), _tanh_bend
    ),
    "erf": Saturating(
        torch.erf,
        ERF,
        lambda x: ERF * (-x.square()).exp(),
        lambda theta: (-(theta / ERF).log()).clamp_min(0).sqrt(),
        _erf_bend,
    ),
    "hardtanh": Saturating(
        torch.nn.functional.hardtanh, 1.0, lambda x: (x.abs() < 1).to(x.dtype), torch.ones_like, _kink
    ),
}
