"""Functions on the square [-1, 1]^2 by their values at nested Chebyshev points, with an estimate of the largest error.

The polynomial of degree n in each coordinate errs most about where the nodes of degree 2n lie between its own: checks
are drawn there, and are not evaluated again when the degree is doubled.  They are drawn with probabilities that follow
the surplus |f - polynomial of degree n/2| at the nodes around, which is known: where a polynomial erred, the next one
errs.  The estimate is FACTOR times the largest error that is met.

Where FACTOR comes from: errors of magnitude e with tails exp(-e/b) have a largest of N with median b ln(N / ln 2), and
the largest of m is below b ln(m / ln(1 / MISSED)) with probability MISSED.  FACTOR times the second is the first for
m = ln(1 / MISSED) (N / ln 2)^(1 / FACTOR), the number of checks: 17, 26, 41, 65 at degree 4, 8, 16, 32.  Tails may
be heavier and errors are alike among neighbours, so that this is a derivation of sizes and no proof.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from meanfield.landscape import chebyshev

FACTOR = 3.0
MISSED = 0.02
BLIND = 0.1  # the share of the checks that is drawn from all candidates alike: what the surplus does not know of
MOST = 32  # degree: 1,089 nodes


class Checks(NamedTuple):
    """Points (C, 2), what the polynomial says there and what is there, (C, F) each."""

    points: Tensor
    predicted: Tensor
    exact: Tensor


class Nested:
    """A function by its polynomial of a degree, which `climb` doubles.

    function: points (P, 2) -> values (P, F), float64.
    judged: columns whose surplus leads the checks.
    price: of one of its points.
    degree, values (degree + 1, degree + 1, F), checks and errors (F,), the estimated largest errors: as they stand,
    also where a climb is broken off.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        degree: int,
        judged: Sequence[int],
        generator: torch.Generator,
        price: float = 1.0,
    ) -> None:
        self.function, self.judged, self.generator, self.price = function, list(judged), generator, price
        self._reach(degree)

    def climb(self) -> None:
        """Twice the degree, and checks of it."""
        self._reach(2 * self.degree)

    @property
    def cost(self) -> float:
        """Of a climb."""
        return self.price * (points_of(2 * self.degree) - points_of(self.degree))

    def at(self, points: Tensor) -> Tensor:
        """(P, F) at points (P, 2)."""
        return chebyshev.at_points(self.values, points)

    def grid(self, first: Tensor, second: Tensor) -> Tensor:
        """(P, Q, F) at all pairs of places (P,), (Q,)."""
        return chebyshev.on_grid(self.values, first, second)

    @property
    def finite(self) -> bool:
        """Whether all that is judged is finite, at nodes and checks."""
        seen = (self.values[..., self.judged], self.checks.exact[:, self.judged])
        return all(bool(each.isfinite().all()) for each in seen)

    def _reach(self, degree: int) -> None:
        values = self.function(_grid(degree)).unflatten(0, (degree + 1, degree + 1))
        places = self._drawn(values)
        points = torch.stack([chebyshev.nodes(2 * degree)[each] for each in places.T], 1)
        checks = Checks(points, chebyshev.at_points(values, points), self.function(points))
        self.degree, self.values, self.checks = degree, values, checks
        self.errors = FACTOR * (checks.predicted - checks.exact).abs().amax(0)

    def _drawn(self, values: Tensor) -> Tensor:
        """Indices (C, 2) into the nodes of twice the degree, none of them a node of it."""
        degree = len(values) - 1
        odd = torch.arange(2 * degree + 1) % 2 == 1
        candidates = (odd[:, None] | odd).nonzero()
        surplus = _around(_surplus(values[..., self.judged]))[tuple(candidates.T)].clamp_min(0)
        shares = _shares(surplus).mean(1)
        return candidates[torch.multinomial(shares, checks_of(degree), generator=self.generator)]


def checks_of(degree: int) -> int:
    """How many checks the polynomial of a degree has."""
    candidates = (2 * degree + 1) ** 2 - (degree + 1) ** 2
    return round(-math.log(MISSED) * (candidates / math.log(2)) ** (1 / FACTOR))


def points_of(degree: int) -> int:
    """At how many points a function is evaluated by the time that it has the polynomial of a degree and its checks."""
    return (degree + 1) ** 2 + checks_of(degree)


def _grid(degree: int) -> Tensor:
    places = chebyshev.nodes(degree)
    return torch.cartesian_prod(places, places)


def _surplus(values: Tensor) -> Tensor:
    """(n + 1, n + 1, F): the error of the polynomial of half the degree at the nodes; what is not finite counts as 0,
    for it ends the surface anyway.
    """
    places = chebyshev.nodes(len(values) - 1)
    return (values - chebyshev.on_grid(values[::2, ::2], places, places)).abs().nan_to_num(0.0, 0.0, 0.0)


def _around(surplus: Tensor) -> Tensor:
    """(2n + 1, 2n + 1, F) at the nodes of twice the degree: the largest surplus (n + 1, n + 1, F) up to the second one
    away.
    """
    finer = surplus.new_zeros((2 * len(surplus) - 1, 2 * len(surplus) - 1, surplus.shape[2]))
    finer[::2, ::2] = surplus
    return torch.nn.functional.max_pool2d(finer.permute(2, 0, 1), 5, stride=1, padding=2).permute(1, 2, 0)


def _shares(surplus: Tensor) -> Tensor:
    """Probabilities of candidates (C, F), column by column; all alike where there is no surplus."""
    total = surplus.sum(0)
    led = torch.where(total > 0, surplus / total.clamp_min(math.ulp(0.0)), 1 / len(surplus))
    return (1 - BLIND) * led + BLIND / len(surplus)
