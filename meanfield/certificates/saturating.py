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

    slope: h'(0), the largest.  derivative: h'.  touch: where h' falls to theta, 0 < theta <= slope.  bend: the largest
    |h''|, inf for an h with a kink.
    """

    function: Callable[[Tensor], Tensor]
    slope: float
    derivative: Callable[[Tensor], Tensor]
    touch: Callable[[Tensor], Tensor]
    bend: float

    def apart(self, theta: Tensor, reach: Tensor) -> Tensor:
        """alpha(theta, T) = max_{|x| <= T} |h(x) - theta x|: h - theta x rises to its top and falls to where T ends."""
        top = torch.minimum(self.touch(theta), reach)
        above, below = self.function(top) - theta * top, theta * reach - self.function(reach)
        return torch.maximum(above, below).clamp_min(0)


ERF = 2 / math.sqrt(math.pi)
SATURATING = {
    "tanh": Saturating(
        torch.tanh, 1.0, lambda x: 1 - x.tanh().square(), lambda theta: (1 - theta).sqrt().atanh(), 4 / 3**1.5
    ),
    "erf": Saturating(
        torch.erf,
        ERF,
        lambda x: ERF * (-x.square()).exp(),
        lambda theta: (-(theta / ERF).log()).clamp_min(0).sqrt(),
        ERF * math.sqrt(2 / math.e),
    ),
    "hardtanh": Saturating(
        torch.nn.functional.hardtanh, 1.0, lambda x: (x.abs() < 1).to(x.dtype), torch.ones_like, math.inf
    ),
}
