"""Claim 4: no bad stationary points once masses move and features are reborn."""

from __future__ import annotations

from functools import lru_cache

import meanfield as mf
from theory_checks.claim import Axes, Claim, Evidence, Series, Setting
from theory_checks.instances import digits_problem, random_start
from theory_checks.statistics import largest

SOURCE = "theory.md sections 4.2, 7 and 8; Gu et al. 2020, theorem 1; Chizat & Bach 2018"

# --- one layer, against the exact optimum ---------------------------------------------------------------------------

STOPPING = 1e-3
GROWTH, ROUNDS, FLOW_STEPS, PROGRAM_ITERATIONS = 16, 40, 100, 100
SMALL = 4


@lru_cache(maxsize=8)
def _one_layer(device: str) -> tuple[mf.Problem, float]:
    """Section 8: digits 3 against 5, kernels of two entries without padding; and the lower bound over all measures."""
    data = mf.data.load("digits", classes=(3, 5), samples=12, pool=2)
    architecture = mf.Architecture(data.input_shape, (mf.Conv((1, 2), activation="relu"),), "average", 1)
    penalty = mf.Penalty(source=0.0, readout=2e-3, input=2e-3)
    problem = mf.Problem(architecture, data.inputs, data.targets("squared"), "squared", penalty)
    bound = mf.solvers.arrangements.solve(problem).lower_bound
    assert bound is not None
    return problem.to(device=device), bound


def _starts(setting: Setting) -> list[tuple[int, int]]:
    """(width, number) of every start."""
    widths, each = ([1, 4, 16, 64], 5) if setting.full else ([4, 64], 1)
    return [(width, number) for width in widths for number in range(each)]


def _grown(setting: Setting, problem: mf.Problem, start: mf.ParticleNetwork) -> float:
    solved = mf.solvers.alternating.solve(
        problem, start, rounds=ROUNDS, tolerance=STOPPING, flow_steps=FLOW_STEPS, later_steps=FLOW_STEPS, program_tolerance=STOPPING,
        program_iterations=PROGRAM_ITERATIONS, grow=GROWTH, seed=setting.seed,
    )  # fmt: skip
    return solved.value


def _fixed(setting: Setting, problem: mf.Problem, start: mf.ParticleNetwork) -> float:
    """Equal masses that stay: plain mean-field training."""
    return mf.solvers.flow.solve(problem, start, masses=False, steps=setting.either(400, 4000)).value


def _without_growth(setting: Setting, problem: mf.Problem, start: mf.ParticleNetwork) -> float:
    return mf.solvers.alternating.solve(problem, start, rounds=2, flow_steps=setting.either(200, 1000), tolerance=STOPPING).value


def _against_optimum(setting: Setting, descend, starts: list[tuple[int, int]]) -> Evidence:
    problem, optimum = _one_layer(setting.device)
    values = [descend(setting, problem, random_start(problem, (width,), setting.derived_seed(4, width, k))) for width, k in starts]
    excesses = [value / optimum - 1 for value in values]
    beyond = sum(excess > STOPPING for excess in excesses)
    text = (
        f"{min(excesses):.1e} to {max(excesses):.1e} above the exact optimum {optimum:.8f}, "
        f"{beyond} of {len(starts)} starts (widths {starts[0][0]} to {starts[-1][0]}) by more than the tolerance"
    )
    series = Series("starts", [float(width) for width, _ in starts], [max(excess, 1e-9) for excess in excesses], "points")
    return Evidence(largest(excesses), text, len(starts), beyond, (series,))


def _small_starts(setting: Setting) -> list[tuple[int, int]]:
    return [(SMALL, number) for number in range(setting.either(2, 10))]


# --- two layers, against the best value known -----------------------------------------------------------------------

WIDTHS, SMALL_WIDTHS = (24, 12), (4, 2)
REBORN = (8, 4)
SHARE = 0.25


@lru_cache(maxsize=64)
def _two_layers(setting: Setting, number: int, widths: tuple[int, int], moving: bool) -> tuple[float, float]:
    """(value at the end, what the program frozen there reaches)."""
    problem = digits_problem(setting, 2, samples=setting.either(6, 12))
    start = random_start(problem, widths, setting.derived_seed(41, number))
    steps = setting.either(200, 1500)
    if moving:
        solved = mf.solvers.alternating.solve(
            problem, start, rounds=setting.either(2, 4), flow_steps=steps, later_steps=steps, tolerance=STOPPING, clones=REBORN,
            program_iterations=setting.either(100, 1000), seed=setting.seed,
        )  # fmt: skip
        return solved.value, solved.value
    trained = mf.solvers.flow.solve(problem, start, masses=False, steps=steps)
    program = mf.ConvexProgram.freeze(problem, trained.network)
    return trained.value, min(trained.value, mf.solvers.splitting.solve(program, 1e-3, max_iterations=setting.either(300, 2000)).value)


def _against_best(setting: Setting, widths: tuple[int, int], moving: bool) -> Evidence:
    count = setting.either(2, 4)
    reached = [_two_layers(setting, number, WIDTHS, True)[0] for number in range(count)]
    count = count if moving else 2 * count
    ends = [_two_layers(setting, number, widths, moving) for number in range(count)]
    best = min(reached)
    excesses = [value / best - 1 for value, _ in ends]
    gains = [1 - own / value for value, own in ends]
    text = f"{min(excesses):.1%} to {max(excesses):.1%} above the best value known, {best:.5f}, over {count} starts of widths {widths}"
    if not moving:
        text += f"; the convex program of their own features lowers them by {min(gains):.1%} to {max(gains):.1%}"
    series = Series("value at the end", [float(i) for i in range(count)], sorted(value for value, _ in ends), "points")
    return Evidence(largest(excesses), text, count, sum(excess > SHARE for excess in excesses), (series,))


CLAIMS = (
    Claim(
        name="stationary_points.one_layer",
        statement="One ReLU layer: with moving masses and growth every start, of any width, ends at the optimum over all measures.",
        source=SOURCE,
        statistic="largest (J - optimum) / optimum over starts; the optimum is exact, from all activation patterns",
        threshold=STOPPING,
        derivation="the tolerance at which the alternation stops, 1e-3 of J; the exact solver's bound is within 1e-6",
        limits="One layer, kernels of two entries, one data set. The convex program and the search for features do what the flow alone does not.",
        measure=lambda setting: _against_optimum(setting, _grown, _starts(setting)),
        controls={
            "equal fixed masses, width 4": lambda setting: _against_optimum(setting, _fixed, _small_starts(setting)),
            "moving masses without growth, width 4": lambda setting: _against_optimum(setting, _without_growth, _small_starts(setting)),
        },
        axes=Axes("width of the start", "(J - optimum) / optimum", "xy"),
    ),
    Claim(
        name="stationary_points.two_layers",
        statement="Two tanh layers: with moving masses, convex programs and reborn particles, the starts end close to each other.",
        source=SOURCE,
        statistic="largest (J - best) / best over starts; best is the lowest value that any of these runs reached",
        threshold=SHARE,
        derivation="a definition: within a quarter of the best value known",
        limits="No optimum is known here: all starts may lie above it. A finite number of rounds, one data set.",
        measure=lambda setting: _against_best(setting, WIDTHS, True),
        controls={"equal fixed masses, small widths": lambda setting: _against_best(setting, SMALL_WIDTHS, False)},
        axes=Axes("start, sorted", "J at the end"),
    ),
)
