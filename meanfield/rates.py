"""Rates of convergence fitted to random samples: log-log slopes with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Slope:
    """Log-log slope of a mean, or of another statistic, over x: `value`, and the ends `low`, `high` of its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"

    def inside(self, low: float, high: float) -> bool:
        """Whether the whole interval lies in [low, high]."""
        return low <= self.low and self.high <= high


def slope(x: Sequence[float], samples: Sequence[Sequence[float]], seed: int = 0, draws: int = 2000, statistic: str = "mean") -> Slope:
    """Least-squares slope of log statistic(samples[k]) over log x[k]; the samples of every x are redrawn (Efron 1979).

    statistic: "mean" or "median".  Everything must be positive.  The interval says how well the slope of these x is
    known, not whether the points lie on a line.
    """
    places, found = _checked(x, samples)
    summary = {"mean": np.mean, "median": np.median}[statistic]
    logs = np.log(places) - np.log(places).mean()
    generator = np.random.default_rng(seed)
    redrawn = np.stack([summary(each[generator.integers(0, len(each), (draws, len(each)))], axis=1) for each in found], 1)
    slopes = np.log(redrawn) @ logs / (logs @ logs)
    value = np.log([summary(each) for each in found]) @ logs / (logs @ logs)
    low, high = np.quantile(slopes, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Slope(float(value), float(low), float(high))


def _checked(x: Sequence[float], samples: Sequence[Sequence[float]]) -> tuple[np.ndarray, list[np.ndarray]]:
    places, found = np.asarray(x, dtype=float), [np.asarray(each, dtype=float) for each in samples]
    if len(found) != len(places) or len(np.unique(places)) < 2:
        raise ValueError(f"a slope needs samples at two different x at least; got {len(places)} x and {len(found)} samples")
    if not (places > 0).all() or not all(len(each) and (each > 0).all() for each in found):
        raise ValueError("x and samples must be positive and no sample empty: their logarithms are fitted")
    return places, found
