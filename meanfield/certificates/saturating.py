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

    slope: h'(0), the largest.  touch: the x >= 0 where h' falls to theta, 0 < theta <= slope.
    """

    function: Callable[[Tensor], Tensor]
    slope: float
    touch: Callable[[Tensor], Tensor]

    def apart(self, theta: Tensor, reach: Tensor) -> Tensor:
        """alpha(theta, T) = max_{|x| <= T} |h(x) - theta x|: h - theta x rises to its top and falls to where T ends."""
        top = torch.minimum(self.touch(theta), reach)
        above, below = self.function(top) - theta * top, theta * reach - self.function(reach)
        return torch.maximum(above, below).clamp_min(0)

    def chords(self, x: Tensor, reach: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(v, s, apart) with |h(x + d) - v - s d| <= apart for |d| <= reach: lines parallel to the chords, between the
        extremes of h(x + d) - s d.  It is the same at both ends, so that these are where h' is s or at the end before.
        """
        low, high = self.function(x - reach), self.function(x + reach)
        tiny = torch.finfo(x.dtype).tiny
        slopes = ((high - low) / (2 * reach).clamp_min(tiny)).clamp(tiny, self.slope)
        touch = self.touch(slopes)
        top, bottom = (torch.minimum(torch.maximum(at, x - reach), x + reach) for at in (touch, -touch))
        most = self.function(top) - slopes * (top - x)
        least = self.function(bottom) - slopes * (bottom - x)
        return 0.5 * (most + least), slopes, 0.5 * (most - least)


def _tanh_touch(theta: Tensor) -> Tensor:
    """artanh(sqrt(1 - theta)), to the same digits where theta is less than the rounding of 1."""
    return (1 + (1 - theta).sqrt()).log() - 0.5 * theta.log()


ERF = 2 / math.sqrt(math.pi)
SATURATING = {
    "tanh": Saturating(torch.tanh, 1.0, _tanh_touch),
    "erf": Saturating(torch.erf, ERF, lambda theta: (-(theta / ERF).log()).clamp_min(0).sqrt()),
    "hardtanh": Saturating(torch.nn.functional.hardtanh, 1.0, torch.ones_like),
}
