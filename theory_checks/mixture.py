"""Claim 8: the straight line of measures between two networks of any widths stays below the chord of J."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import meanfield as mf
from meanfield import measures
from theory_checks.claim import Axes, Claim, Evidence, Series, Setting
from theory_checks.instances import digits_problem, random_start
from theory_checks.lines import Join, rises
from theory_checks.statistics import largest

TIMES = (0.1, 0.25, 0.5, 0.75, 0.9)
Pair = tuple[mf.Problem, mf.ParticleNetwork, mf.ParticleNetwork]


@lru_cache(maxsize=64)
def _trained(setting: Setting, width: int, index: int) -> mf.ParticleNetwork:
    problem = _problem(setting)
    start = random_start(problem, (2 * width, width), setting.derived_seed(8, width, index))
    return mf.solvers.flow.solve(problem, start, steps=setting.either(150, 1000), masses=False).network


@lru_cache(maxsize=4)
def _problem(setting: Setting) -> mf.Problem:
    return digits_problem(setting, 2, samples=8)


def _pairs(setting: Setting, widths: tuple[tuple[int, int], ...]) -> list[Pair]:
    """Networks trained from different starts, of the given pairs of widths."""
    problem = _problem(setting)
    return [
        (problem, _trained(setting, a, index), _trained(setting, b, 100 + index))
        for a, b in widths
        for index in range(setting.instances(1, 2))
    ]


def _rises(setting: Setting, pairs: list[Pair], join: Join, name: str) -> Evidence:
    ratios, relative, series = [], [], []
    for problem, first, second in pairs:
        heights, bounds = rises(problem, first, second, join, TIMES)
        ratios += bounds
        relative.append(max(heights))
        label = f"{name}, widths {first.widths} and {second.widths}"
        series.append(Series(label, [0.0, *TIMES, 1.0], [0.0, *heights, 0.0]))
    beyond = sum(ratio > 1 for ratio in ratios)
    low, high = min(relative), max(relative)
    text = (
        f"{beyond} of {len(ratios)} points above the chord; the highest of a line is {low:+.2g} to {high:+.2g} of J "
        f"over {len(pairs)} pairs"
    )
    return Evidence(largest(ratios), text, len(ratios), beyond, tuple(series[:4]))


def matched(problem: mf.Problem, first: mf.ParticleNetwork, second: mf.ParticleNetwork) -> mf.ParticleNetwork:
    """The second network, of the same widths, with its particles in the order that fits the first
    best, layer by layer.
    """
    left, right = first.features(problem.inputs), second.features(problem.inputs)
    return measures.permute(second, [_assignment(a, b) for a, b in zip(left, right)])


def _assignment(first: Tensor, second: Tensor) -> Tensor:
    """For every feature of the first its partner in the second, at the least sum of squared distances."""
    distances = torch.cdist(first.movedim(1, 0).flatten(1), second.movedim(1, 0).flatten(1)).square()
    return torch.as_tensor(linear_sum_assignment(distances.cpu().numpy())[1], device=first.device)


def _mixture(setting: Setting) -> Evidence:
    return _rises(setting, _pairs(setting, ((8, 8), (8, 24), (16, 32))), measures.mixture, "mixture")


def _raw_weights(setting: Setting) -> Evidence:
    """The control, and beside it the weights after matching, whose barrier falls with the width and stays above the
    chord.
    """
    pairs = _pairs(setting, ((8, 8), (16, 16)))
    raw = _rises(setting, pairs, measures.interpolate, "raw weights")
    widths = (8, 32) if not setting.full else (8, 32, 128)
    lines, barriers = [], []
    for width in widths:
        joined = [(p, a, matched(p, a, b)) for p, a, b in _pairs(setting, ((width, width),))]
        found = _rises(setting, joined, measures.interpolate, "matched weights")
        lines.append(found.series[0])
        barriers.append(f"{np.mean([max(line.y) for line in found.series]):.1%} at {2 * width}/{width}")
    text = f"{raw.text}; beside it, after matching of features, mean barriers in J of {', '.join(barriers)}"
    return Evidence(raw.statistic, text, raw.instances, raw.beyond, (*raw.series[:2], *lines))


CLAIMS = (
    Claim(
        name="mixture",
        statement="Along the straight line of measures between two trained networks, of any widths, J stays below its "
        "chord.",
        source="docs/theory.md, section 6; Fang et al. 2019, section 4",
        statistic="largest rise of J above the chord, in rounding bounds",
        threshold=1.0,
        derivation="running error bounds of the three values",
        limits="The line leads through networks of the added width. It is no statement about averages of weights at "
        "one width.",
        measure=_mixture,
        controls={"raw weight interpolation": _raw_weights},
        axes=Axes("t along the line", "rise above the chord / J", "", 0.0, "chord"),
    ),
)
