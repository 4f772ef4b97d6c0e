"""The maximum of a concave function of one number: scales of multipliers, shares of prices."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy.optimize import minimize_scalar

ACCURACY = 1e-7  # of one pass, relative to its interval: two reach 1e-13, at a kink too
HALVINGS = 24  # of an interval at whose right end the function is -inf: 2^-24 is less than ACCURACY


def maximum(function: Callable[[float], float], limit: float) -> tuple[float, float]:
    """(where, value) of the largest value seen of a concave function on [0, limit], both ends included.

    It may be -inf from some point on, as a conjugate outside its domain, and is finite up to there.  Brent's method in
    scipy knows x to a relative 1e-8 at best, which at a kink costs as much of the value: a second pass looks between
    the neighbours of the best point, where concavity puts the maximum.
    """
    seen: dict[float, float] = {}

    def value(x: float) -> float:
        seen[x] = float(function(x))
        return seen[x]

    value(0.0)
    value(limit)
    for _ in range(2):
        points = sorted(seen)
        best = points.index(max(points, key=seen.__getitem__))
        low, high = points[max(best - 1, 0)], points[min(best + 1, len(points) - 1)]
        _look_between(value, low, high if seen[high] > -math.inf else _end(value, points[best], high))
    where = max(seen, key=seen.__getitem__)
    return where, seen[where]


def _look_between(value: Callable[[float], float], low: float, high: float) -> None:
    """Brent's method with `low` as origin."""
    minimize_scalar(
        lambda x: -value(low + float(x)),
        bounds=(0.0, high - low),
        method="bounded",
        options={"xatol": ACCURACY * (high - low)},
    )


def _end(value: Callable[[float], float], inside: float, outside: float) -> float:
    """A point at which the function is finite, near the one beyond which it is -inf."""
    for _ in range(HALVINGS):
        middle = 0.5 * (inside + outside)
        inside, outside = (middle, outside) if value(middle) > -math.inf else (inside, middle)
    return inside
