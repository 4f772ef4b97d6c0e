"""Functions on the square [-1, 1]^2 by their values at nested Chebyshev points, with an estimate of the largest error.

The polynomial of degree n in each coordinate errs most about where the nodes of degree 2n lie between its own: checks
are drawn there, and are not evaluated again when the degree is doubled.  They are drawn with probabilities that follow
the surplus |f - polynomial of degree n/2| at the nodes around, which is known: where a polynomial erred, the next one
errs.  The estimate is FACTOR times the largest error that is met.

Where FACTOR comes from: errors of magnitude e with tails exp(-e/b) have a largest of N with median b ln(N / ln 2), and
the largest of m is below b ln(m / ln(1 / MISSED)) with probability MISSED.  FACTOR times the second is the first for
m = ln(1 / MISSED) (N / ln 2)^(1 / FACTOR), the number of checks: 17, 26, 41, 65 at degrees 4, 8, 16, 32.  Tails may
be heavier and errors are alike among neighbours, so that this is a derivation of sizes and no proof.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from meanfield.landscape import chebyshev

FACTOR = 3.0
MISSED = 0.02
BLIND = 0.1  # the share of the checks that is drawn from all candidates alike: what the surplus does not know of
MOST = 32  # degree in either coordinate: 1,089 nodes

Degrees = tuple[int, int]


class Checks(NamedTuple):
    """Points (C, 2), what the polynomial says there and what is there, (C, F) each."""

    points: Tensor
    predicted: Tensor
    exact: Tensor


class Nested:
    """A function by its polynomial of a degree in either coordinate, which `climb` doubles.

    function: points (P, 2) -> values (P, F), float64.
    judged: columns whose surplus leads the checks.
    price: of one of its points.
    degrees, values (n + 1, m + 1, F), checks and errors (F,), the estimated largest errors: as they stand, also where
    a climb is broken off.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        degrees: Degrees,
        judged: Sequence[int],
        generator: torch.Generator,
        price: float = 1.0,
    ) -> None:
        self.function, self.judged, self.generator, self.price = function, list(judged), generator, price
        self.climb(degrees)

    def climb(self, degrees: Degrees) -> None:
        """To the polynomial of these degrees, and checks of it."""
        first, second = (chebyshev.nodes(degree) for degree in degrees)
        values = self.function(torch.cartesian_prod(first, second)).unflatten(0, (len(first), len(second)))
        drawn = self._drawn(values)
        points = torch.stack([chebyshev.nodes(2 * degree)[each] for degree, each in zip(degrees, drawn.T)], 1)
        checks = Checks(points, chebyshev.at_points(values, points), self.function(points))
        self.degrees, self.values, self.checks = degrees, values, checks
        self._between = drawn % 2 == 1
        self.errors = FACTOR * self._missed.amax(0)

    def ahead(self, goal: Tensor) -> Degrees | None:
        """What to climb to for errors of the judged columns (J,) of at most `goal`; None beyond MOST.

        A check between the nodes of one coordinate alone errs by that one: a coordinate whose estimate of this kind is
        within a quarter of the goal need not grow.
        """
        short = [self._falls_short(axis, goal / 4) for axis in (0, 1)]
        grown = [2 * degree if each or not any(short) else degree for degree, each in zip(self.degrees, short)]
        return (grown[0], grown[1]) if max(grown) <= MOST else None

    def cost(self, degrees: Degrees) -> float:
        """Of a climb, at most: checks are nodes of the next polynomial where both degrees are doubled."""
        both = all(new > old for new, old in zip(degrees, self.degrees))
        return self.price * (
            points_of(degrees) - math.prod(degree + 1 for degree in self.degrees) - both * len(self.checks.points)
        )

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

    @property
    def _missed(self) -> Tensor:
        """(C, F): by how much the polynomial errs at the checks."""
        return (self.checks.predicted - self.checks.exact).abs()

    def _falls_short(self, axis: int, goal: Tensor) -> bool:
        alone = self._between[:, axis] & ~self._between[:, 1 - axis]
        missed = self._missed[alone][:, self.judged]
        return not len(missed) or bool((FACTOR * missed.amax(0) > goal).any())

    def _drawn(self, values: Tensor) -> Tensor:
        """Indices (C, 2) into the nodes of twice the degrees, none of them a node of these."""
        rows, columns = (torch.arange(2 * size - 1) % 2 == 1 for size in values.shape[:2])
        candidates = (rows[:, None] | columns).nonzero()
        surplus = _around(_surplus(values[..., self.judged]))[tuple(candidates.T)]
        count = checks_of((values.shape[0] - 1, values.shape[1] - 1))
        return candidates[torch.multinomial(_shares(surplus).mean(1), count, generator=self.generator)]


def checks_of(degrees: Degrees) -> int:
    """How many checks the polynomial of these degrees has."""
    candidates = math.prod(2 * degree + 1 for degree in degrees) - math.prod(degree + 1 for degree in degrees)
    return round(-math.log(MISSED) * (candidates / math.log(2)) ** (1 / FACTOR))


def points_of(degrees: Degrees) -> int:
    """Nodes and checks of the polynomial of these degrees."""
    return math.prod(degree + 1 for degree in degrees) + checks_of(degrees)


def _surplus(values: Tensor) -> Tensor:
    """(n + 1, m + 1, F): the error of the polynomial of half the degrees at the nodes; what is not finite counts as 0,
    for it ends the surface anyway.
    """
    first, second = (chebyshev.nodes(size - 1) for size in values.shape[:2])
    return (values - chebyshev.on_grid(values[::2, ::2], first, second)).abs().nan_to_num(0.0, 0.0, 0.0)


def _around(surplus: Tensor) -> Tensor:
    """(2n + 1, 2m + 1, F) at the nodes of twice the degrees: the largest surplus (n + 1, m + 1, F) up to the second one
    away.
    """
    finer = surplus.new_zeros((2 * surplus.shape[0] - 1, 2 * surplus.shape[1] - 1, surplus.shape[2]))
    finer[::2, ::2] = surplus
    return functional.max_pool2d(finer.permute(2, 0, 1), 5, stride=1, padding=2).permute(1, 2, 0)


def _shares(surplus: Tensor) -> Tensor:
    """Probabilities of candidates (C, F), column by column; all alike where there is no surplus."""
    total = surplus.sum(0)
    led = torch.where(total > 0, surplus / total.clamp_min(math.ulp(0.0)), 1 / len(surplus))
    return (1 - BLIND) * led + BLIND / len(surplus)
