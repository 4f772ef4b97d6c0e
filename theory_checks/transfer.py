"""What a training moved, on another start: the limit is a function that no start decides, and not the network's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from meanfield.rates import Slope, slope
from meanfield.studies.transfer import widths
from theory_checks.claim import Axes, Claim, Evidence, Series, Setting
from theory_checks.statistics import largest

WIDTHS = {1: (16, 64, 256), 2: (16, 48, 144)}
RUNS = {"mean_field": (8, 32), "standard": (3, 12)}  # trained networks of every width at quick and full effort
Errors = dict[str, list[list[float]]]  # arm -> width by width the mean squared errors, one per trained network


@lru_cache(maxsize=8)
def _errors(setting: Setting, depth: int, scaling: str) -> Errors:
    """E|F_arm - F_predicted|^2 over images and draws."""
    problem = widths.problem(depth).to(device=setting.device)
    found: Errors = {arm: [] for arm in widths.ARMS}
    for width in WIDTHS[depth]:
        generators = [setting.generator(16, depth, width, run) for run in range(setting.instances(*RUNS[scaling]))]
        rows = [widths.distances(problem, scaling, width, generator) for generator in generators]
        for arm in widths.ARMS:
            found[arm].append([row[arm] for row in rows])
    return found


def _slopes(setting: Setting, arms: Sequence[str], scaling: str) -> tuple[list[Slope], tuple[Series, ...], str]:
    slopes, series, texts = [], [], []
    for depth, every in WIDTHS.items():
        for arm in arms:
            errors = _errors(setting, depth, scaling)[arm]
            slopes.append(slope(list(every), errors, setting.derived_seed(161, depth)))
            means = [float(np.mean(each)) for each in errors]
            series.append(Series(f"{arm}, L = {depth}", [float(m) for m in every], means))
            texts.append(f"{arm}, L = {depth}: {slopes[-1]}")
    return slopes, tuple(series), "slopes of " + "; ".join(texts)


def _from_rate(setting: Setting, arms: Sequence[str], scaling: str = "mean_field") -> Evidence:
    """How far a slope lies from the middle of RATE."""
    slopes, series, text = _slopes(setting, arms, scaling)
    apart = [abs(each.value - MIDDLE) for each in slopes]
    return Evidence(largest(apart), text, len(slopes), sum(each > REACH for each in apart), series)


def _least_slope(setting: Setting, arm: str) -> Evidence:
    slopes, series, text = _slopes(setting, [arm], "mean_field")
    values = [each.value for each in slopes]
    return Evidence(min(values), text, len(values), sum(each < GAP for each in values), series)


RATE = (-1.15, -0.8)
MIDDLE, REACH = (RATE[0] + RATE[1]) / 2, (RATE[1] - RATE[0]) / 2
GAP = -0.3

CLAIMS = (
    Claim(
        name="transfer",
        statement="On a fresh start, and on its own start dealt anew among the particles, a displacement converges to "
        "the function predicted without a start: E|F_m - F|^2 falls like 1/m (mean-field scaling).",
        source="docs/theory.md, section 14",
        statistic="largest distance of a log-log slope in m from the middle of [-1.15, -0.8], one and two layers",
        threshold=REACH,
        derivation="1/m, with 0.15 to 0.2 for the error of a slope over a factor of 9 to 16 in the width",
        limits="Tanh, small digits, widths from 16 to 256.  A second layer's start vanishes in the limit.",
        measure=lambda setting: _from_rate(setting, ["fresh start", "shuffled"]),
        controls={
            "standard scaling": lambda setting: _from_rate(setting, ["fresh start"], "standard"),
            "own start": lambda setting: _from_rate(setting, ["own start"]),
            "layers shuffled apart": lambda setting: _from_rate(setting, ["layers shuffled apart"]),
        },
        axes=Axes("width m", "E|F_m - F predicted|^2", "xy"),
    ),
    Claim(
        name="transfer.dependence_gap",
        statement="On its own start it does not: the trained network stays away from the function predicted for an "
        "independent start of the same law, at every width (mean-field scaling).",
        source="docs/theory.md, section 14",
        statistic="least log-log slope of |F_m - F predicted|^2 in m, one and two layers",
        threshold=GAP,
        derivation="a distance between two limits has the slope 0 in the end, an independent start -1",
        limits="That the gap is there for this training, not how large it is for another.",
        measure=lambda setting: _least_slope(setting, "own start"),
        controls={
            "fresh start": lambda setting: _least_slope(setting, "fresh start"),
            "shuffled": lambda setting: _least_slope(setting, "shuffled"),
        },
        axes=Axes("width m", "|F_m - F predicted|^2", "xy"),
        at_least=True,
    ),
)
