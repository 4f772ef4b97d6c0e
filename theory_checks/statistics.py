"""Intervals for what a finite number of random instances can say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from meanfield.rates import LEVEL


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
    """ "3 of 40 instances (2% to 20%) ..." in words."""
    low, high = share_interval(count, total)
    return f"{count} of {total} {what} (95% interval of the share {low:.1%} to {high:.1%})"
