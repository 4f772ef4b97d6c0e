"""Claim 5: the limit of the flow is optimal for the convex program of its own features."""

from __future__ import annotations

from functools import lru_cache

import meanfield as mf
from meanfield.solvers.solution import Solution
from meanfield.starts import normal
from theory_checks.claim import Axes, Claim, Evidence, Series, Setting, ranked
from theory_checks.instances import random_problem, random_start
from theory_checks.statistics import largest

WIDTHS = ((6,), (8, 5), (8, 6, 5))
STEPS, EARLY_STEPS = 2000, 200
NOISE = 0.1


@lru_cache(maxsize=64)
def _problem(setting: Setting, depth: int, instance: int) -> mf.Problem:
    drawn = random_problem(
        setting.generator(5, depth, instance), depth, side=2, images=4, activation="tanh", loss="squared"
    )
    penalty = mf.Penalty(source=3e-3, readout=5e-3, input=2e-3)
    return mf.Problem(drawn.architecture, drawn.inputs, drawn.targets, "squared", penalty).to(device=setting.device)


@lru_cache(maxsize=128)
def _flowed(setting: Setting, depth: int, instance: int, steps: int) -> Solution:
    problem = _problem(setting, depth, instance)
    start = random_start(problem, WIDTHS[depth - 1], setting.derived_seed(51, depth, instance))
    return mf.solvers.flow.solve(problem, start, steps=steps)


def _limit(setting: Setting, depth: int, instance: int) -> mf.ParticleNetwork:
    return _flowed(setting, depth, instance, STEPS).network


def _early(setting: Setting, depth: int, instance: int) -> mf.ParticleNetwork:
    return _flowed(setting, depth, instance, EARLY_STEPS).network


def _perturbed(setting: Setting, depth: int, instance: int) -> mf.ParticleNetwork:
    """Every kernel and the readout of the limit times 1 + noise."""
    generator, limit = setting.generator(52, depth, instance), _limit(setting, depth, instance)
    noisy = [w * (1 + NOISE * normal(w.shape, generator, w)) for w in (*limit.kernels, limit.readout)]
    return mf.ParticleNetwork(limit.architecture, limit.masses, noisy[:-1], noisy[-1], limit.biases)


def _excess(problem: mf.Problem, network: mf.ParticleNetwork) -> float:
    """(J - dual value of the program frozen at the network) / J; the multipliers come from
    CLARABEL and are repaired.
    """
    solved = mf.solvers.reference.solve(mf.ConvexProgram.freeze(problem, network))
    value = float(problem.terms(network).total())
    return (value - (solved.value - solved.gap)) / value


def _cases(setting: Setting) -> list[tuple[int, int]]:
    if not setting.full:
        return [(1, 0), (2, 0)]
    return [(depth, instance) for depth in (1, 2, 3) for instance in range(6)]


def _excesses(setting: Setting, network_of) -> Evidence:
    cases = _cases(setting)
    found = [_excess(_problem(setting, *case), network_of(setting, *case)) for case in cases]
    speeds = [_flowed(setting, *case, STEPS).history[-1]["speed"] for case in cases]
    own = [_flowed(setting, *case, STEPS).relative_gap for case in cases]
    beyond = sum(excess > THRESHOLD for excess in found)
    text = (
        f"{min(found):.1e} to {max(found):.1e} of J above the dual value over {len(found)} runs (L = {cases[0][0]} to "
        f"{cases[-1][0]}); metric speed left at the limit {min(speeds):.1e} to {max(speeds):.1e}, gap by the flow's "
        f"own multipliers {min(own):.1e} to {max(own):.1e}"
    )
    return Evidence(largest(found), text, len(found), beyond, _series(cases, found))


def _series(cases: list[tuple[int, int]], found: list[float]) -> tuple[Series, ...]:
    by_depth: dict[int, list[float]] = {}
    for (depth, _), excess in zip(cases, found):
        by_depth.setdefault(depth, []).append(max(excess, 1e-12))
    return tuple(ranked(f"L = {depth}", excesses) for depth, excesses in by_depth.items())


THRESHOLD = 1e-4

CLAIMS = (
    Claim(
        name="zero_gap",
        statement="Where the flow comes to rest with positive masses, its convex program has nothing left to gain.",
        source="docs/theory.md, sections 4.2, 5 and 7; Fang et al. 2019, section 5",
        statistic="largest (J - dual value of the program frozen there) / J at the end of the flow",
        threshold=THRESHOLD,
        derivation="a definition: certified to 1e-4 of J. Convexity bounds the excess by the metric speed left times "
        "the distance to the optimum",
        limits="On the features the flow ended with. Other features may do better, and a flow stopped earlier "
        "certifies nothing.",
        measure=lambda setting: _excesses(setting, _limit),
        controls={
            "weights of the limit perturbed by 10%": lambda setting: _excesses(setting, _perturbed),
            "a tenth of the steps": lambda setting: _excesses(setting, _early),
        },
        axes=Axes("run, sorted by its excess", "excess over the dual value / J", "y", THRESHOLD),
    ),
)
