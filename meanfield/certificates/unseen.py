"""What more starts of a search may still find, from what its starts have found: docs/theory.md, section 5.

A start counts with the best that was made of it: its shortfall is by how much higher the bound would be with that
alone.  K more starts lower the bound by more than t with a chance of at most E 2^(1 - m(t)), m(t) the number of the
first K whose shortfalls are at most t.
"""

from __future__ import annotations

import math

from torch import Tensor

LEVEL = 0.05  # a chance that is let go
NEEDED = 1 + math.ceil(-math.log2(LEVEL))  # starts that make the chance less


def reached(shortfalls: Tensor, tolerance: float) -> int:
    """m(t): how many starts, of shortfalls (K,), come within a tolerance t of the best known."""
    return int((shortfalls <= tolerance).sum())


def chance(count: int) -> float:
    """At most how probably as many starts again find more, where `count` have reached the best; 1 says nothing."""
    return min(1.0, 2.0 ** (1 - count))


def percent(share: float) -> str:
    """A chance that is said to be at most so much, rounded up: never none."""
    return f"{math.ceil(100 * share)}%"


def lowering(shortfalls: Tensor) -> float:
    """The least t that as many starts again exceed with a chance of at most LEVEL; inf where there are too few."""
    return float(shortfalls.sort().values[NEEDED - 1]) if len(shortfalls) >= NEEDED else math.inf
