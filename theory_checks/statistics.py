"""Intervals for what a finite number of random instances can say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95


def largest(values: Sequence[float]) -> float:
    """The maximum; NaN where one of them is, which supports and refutes nothing."""
    return float(np.max(np.asarray(values, dtype=float)))


def smallest(values: Sequence[float]) -> float:
    """The minimum; NaN where one of them is."""
    return float(np.min(np.asarray(values, dtype=float)))


def share_interval(count: int, total: int) -> tuple[float, float]:
    """Clopper-Pearson interval of a share, at 95%."""
    interval = stats.binomtest(count, total).proportion_ci(LEVEL, method="exact")
    return float(interval.low), float(interval.high)


def share_text(count: int, total: int, what: str) -> str:
    """"3 of 40 instances (2% to 20%) ..." in words."""
    low, high = share_interval(count, total)
    return f"{count} of {total} {what} (95% interval of the share {low:.1%} to {high:.1%})"


def slope(x: Sequence[float], samples: Sequence[Sequence[float]], seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """Log-log slope of the mean of `samples[k]` over x[k], with its 95% bootstrap interval (samples of every x redrawn)."""
    generator = np.random.default_rng(seed)
    logs = np.log(np.asarray(x, dtype=float))
    centred = logs - logs.mean()

    def fit(means: np.ndarray) -> np.ndarray:
        return np.log(means) @ centred / (centred @ centred)

    means = np.stack([_resampled_means(np.asarray(each, dtype=float), generator, draws) for each in samples], 1)
    low, high = np.quantile(fit(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(fit(np.array([np.mean(each) for each in samples]))), float(low), float(high)


def _resampled_means(sample: np.ndarray, generator: np.random.Generator, draws: int) -> np.ndarray:
    return sample[generator.integers(0, len(sample), (draws, len(sample)))].mean(1)
