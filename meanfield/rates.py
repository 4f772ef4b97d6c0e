"""Figures of random samples with intervals: log-log slopes and rank correlations (bootstrap), means of a few values
(Student).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
LEAST_GROUPS = 5  # of a rank correlation with an interval


@dataclass(frozen=True)
class Interval:
    """A figure of samples and the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})" if self.bounded else f"{self.value:.3g}"

    @property
    def bounded(self) -> bool:
        """Not of a single value."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))

    def columns(self, name: str) -> dict[str, float]:
        """Of a row: name, name_low, name_high."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    @staticmethod
    def of(row: Mapping[str, float], name: str) -> Interval:
        """From its `columns`."""
        return Interval(row[name], row[f"{name}_low"], row[f"{name}_high"])

    def above(self, other: Interval) -> bool:
        """Whether the whole of this interval lies above the other one."""
        return self.low > other.high

    def inside(self, low: float, high: float) -> bool:
        """Whether the whole interval lies in [low, high]."""
        return low <= self.low and self.high <= high


@dataclass(frozen=True)
class Slope(Interval):
    """Log-log slope of a mean, or of another statistic, over x, with its bootstrap interval."""

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def mean(values: Sequence[float], *, geometric: bool = False) -> Interval:
    """Mean of independent values with Student's interval, for samples too few to be redrawn; infinitely wide for one
    value.

    geometric: both of the logarithms, and back; values must be positive.
    """
    found = np.asarray(values, dtype=float)
    if found.ndim != 1 or len(found) == 0:
        raise ValueError(f"a mean needs at least one value; got {values!r}")
    if geometric:
        if not (found > 0).all():
            raise ValueError(f"a geometric mean needs positive values; the least is {found.min():g}")
        logs = mean([float(each) for each in np.log(found)])
        return Interval(*(float(np.exp(each)) for each in (logs.value, logs.low, logs.high)))
    centre = float(found.mean())
    if len(found) == 1:
        return Interval(centre, -np.inf, np.inf)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)))
    return Interval(centre, centre - reach, centre + reach)


def slope(
    x: Sequence[float], samples: Sequence[Sequence[float]], seed: int = 0, draws: int = 2000, statistic: str = "mean"
) -> Slope:
    """Least-squares slope of log statistic(samples[k]) over log x[k]; the samples of every x are redrawn (Efron 1979).

    statistic: "mean" or "median".  Everything must be positive.  The interval says how well the slope of these x is
    known, not whether the points lie on a line.
    """
    places, found = _checked(x, samples)
    summary = {"mean": np.mean, "median": np.median}[statistic]
    logs = np.log(places) - np.log(places).mean()
    generator = np.random.default_rng(seed)
    redrawn = np.stack(
        [summary(each[generator.integers(0, len(each), (draws, len(each)))], axis=1) for each in found], 1
    )
    slopes = np.log(redrawn) @ logs / (logs @ logs)
    value = np.log([summary(each) for each in found]) @ logs / (logs @ logs)
    low, high = np.quantile(slopes, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Slope(float(value), float(low), float(high))


def rank_correlation(
    x: Sequence[float], y: Sequence[float], groups: Sequence[object] | None = None, seed: int = 0, draws: int = 2000
) -> Interval:
    """Spearman's rank correlation with its percentile interval from redrawn samples; nan where it is undefined.

    groups: of every sample; whole groups are redrawn, for samples of one group are not independent.  Without it every
    sample is its own.  Below five groups the interval is infinite: n values in no order at all come in a perfect one
    with probability 2 / n!, more than 1 in 20.  Redrawn samples without a spread have no correlation and are left out.
    """
    places, values = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if places.shape != values.shape or places.ndim != 1:
        raise ValueError(f"a correlation needs as many x as y; got {places.shape} and {values.shape}")
    if len(places) < 2:
        return Interval(float("nan"), -np.inf, np.inf)
    names = list(range(len(places))) if groups is None else list(groups)
    members = [list(dict.fromkeys(names)).index(name) for name in names]
    count, generator = len(set(members)), np.random.default_rng(seed)
    value = float(_spearman(places, values, np.ones((1, len(places))))[0])
    if count < LEAST_GROUPS or not np.isfinite(value):
        return Interval(value, -np.inf, np.inf)
    times = generator.multinomial(count, np.full(count, 1 / count), draws)  # that each group is drawn
    redrawn = _spearman(places, values, times[:, members].astype(float))
    low, high = np.quantile(redrawn[np.isfinite(redrawn)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def _spearman(x: np.ndarray, y: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The correlation of ranks, equal values at their mean rank, (B,): of samples that come as often as `times` (B, n)
    says.
    """
    total, products = times.sum(1, keepdims=True), {}
    ranks = [times @ ((each < each[:, None]) + (each == each[:, None]) / 2).T for each in (x, y)]
    centred = [each - (times * each).sum(1, keepdims=True) / total for each in ranks]
    for name, (first, second) in {"xy": (0, 1), "xx": (0, 0), "yy": (1, 1)}.items():
        products[name] = (times * centred[first] * centred[second]).sum(1)
    spread = products["xx"] * products["yy"]
    known = spread > 1e-12 * total[:, 0] ** 6  # ranks are half integers: anything else is rounding
    return np.where(known, products["xy"] / np.sqrt(np.where(known, spread, 1.0)), np.nan)


def _checked(x: Sequence[float], samples: Sequence[Sequence[float]]) -> tuple[np.ndarray, list[np.ndarray]]:
    places, found = np.asarray(x, dtype=float), [np.asarray(each, dtype=float) for each in samples]
    if len(found) != len(places) or len(np.unique(places)) < 2:
        raise ValueError(
            f"a slope needs samples at two different x at least; got {len(places)} x and {len(found)} samples"
        )
    if not (places > 0).all() or not all(len(each) and (each > 0).all() for each in found):
        raise ValueError("x and samples must be positive and no sample empty: their logarithms are fitted")
    return places, found
