"""Lines of networks between two of them, and how far J rises above its chord there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import meanfield as mf
from theory_checks.rounding import value_error

Join = Callable[[mf.ParticleNetwork, mf.ParticleNetwork, float], mf.ParticleNetwork]


def rises(
    problem: mf.Problem, first: mf.ParticleNetwork, second: mf.ParticleNetwork, join: Join, times: Sequence[float]
) -> tuple[list[float], list[float]]:
    """J above its chord at every time in (0, 1): relative to the larger J of both ends, and in rounding bounds."""
    ends = [float(problem.terms(end).total()) for end in (first, second)]
    allowed = max(value_error(problem, first), value_error(problem, second))
    relative, ratios = [], []
    for t in times:
        middle = join(first, second, t)
        rise = float(problem.terms(middle).total()) - (1 - t) * ends[0] - t * ends[1]
        relative.append(rise / max(ends))
        ratios.append(rise / (allowed + value_error(problem, middle)))
    return relative, ratios
