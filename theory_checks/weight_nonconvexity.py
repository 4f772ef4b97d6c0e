"""Claim 3: in the weights of a network J is not convex, and explicit witnesses show it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

import meanfield as mf
from meanfield import measures
from meanfield.studies import convexity
from meanfield.studies.convexity import Function, ProgramVariables
from theory_checks.claim import Axes, Claim, Evidence, Series, Setting, ranked
from theory_checks.instances import permuted, random_problem, random_start
from theory_checks.lines import Join, rises
from theory_checks.statistics import share_text, smallest

WIDTHS = ((8,), (8, 5), (6, 5, 4))
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
COPIES = 4
NEGLIGIBLE = 1e-6  # of the largest kernel
UNMOVED = 1e-3  # of the size of a start


@lru_cache(maxsize=256)
def _problem(setting: Setting, depth: int, instance: int) -> mf.Problem:
    generator = setting.generator(4, depth, instance)
    return random_problem(generator, depth, side=2, images=6, activation="tanh", loss="squared", device=setting.device)


def _start(setting: Setting, depth: int, instance: int, copy: int = 0) -> mf.ParticleNetwork:
    return random_start(
        _problem(setting, depth, instance), WIDTHS[depth - 1], setting.derived_seed(41, depth, instance, copy)
    )


@lru_cache(maxsize=256)
def _trained(setting: Setting, depth: int, instance: int, copy: int = 0) -> mf.ParticleNetwork:
    """Weights moved to a minimum, masses uniform."""
    problem, start = _problem(setting, depth, instance), _start(setting, depth, instance, copy)
    return mf.solvers.flow.solve(problem, start, steps=setting.either(200, 1500), masses=False).network


def _copy(setting: Setting, network: mf.ParticleNetwork, instance: int) -> mf.ParticleNetwork:
    return permuted(network, setting.generator(42, instance))


def _cases(setting: Setting) -> list[tuple[int, int]]:
    return [(depth, instance) for depth in (1, 2, 3) for instance in range(setting.instances(1, 10))]


def _barriers(setting: Setting, join: Join) -> Evidence:
    """Per problem the largest rise above a chord, over lines from a trained network to copies of it and to one from
    another start.
    """
    ratios, heights, series = [], [], []
    for depth, instance in _cases(setting):
        problem, first = _problem(setting, depth, instance), _trained(setting, depth, instance)
        ends = [_copy(setting, first, COPIES * instance + index) for index in range(COPIES)] + [
            _trained(setting, depth, instance, 1)
        ]
        lines = [rises(problem, first, end, join, TIMES) for end in ends]
        relative, bounds = max(lines, key=lambda line: max(line[1]))
        heights.append(max(relative))
        ratios.append(max(bounds))
        for name, line in zip(("a copy", "another start"), lines[::COPIES]) if instance == 0 else ():
            series.append(Series(f"L = {depth}, to {name}", [0.0, *TIMES, 1.0], [0.0, *line[0], 0.0]))
    above = sum(ratio > 1 for ratio in ratios)
    text = (
        f"{share_text(above, len(ratios), 'problems have a line above its chord')}; the highest by {min(heights):+.2g} "
        f"to {max(heights):+.2g} of J"
    )
    return Evidence(smallest(ratios), text, len(ratios), len(ratios) - above, tuple(series))


def _in_weights(problem: mf.Problem, network: mf.ParticleNetwork) -> tuple[Function, Tensor]:
    """J of kernels and readout as one vector, masses kept, and the vector of the network."""
    depth, weights = network.architecture.depth, [*network.kernels, network.readout]
    sizes = [tensor.numel() for tensor in weights]

    def value(vector: Tensor) -> Tensor:
        parts = [part.reshape(tensor.shape) for part, tensor in zip(vector.split(sizes), weights)]
        moved = mf.ParticleNetwork.unchecked(network.architecture, network.masses, parts[:depth], parts[depth])
        return problem.terms(moved).total()

    return value, torch.cat([tensor.flatten() for tensor in weights])


def _in_program(problem: mf.Problem, network: mf.ParticleNetwork) -> convexity.Curvature:
    """The same network, curvature in (p, W, U) at its frozen features."""
    variables = ProgramVariables(mf.ConvexProgram.freeze(problem, network))
    vector = variables.template.vector()
    return convexity.curvature(variables.objective, vector, variables.tangent(vector))


def _in_network(problem: mf.Problem, network: mf.ParticleNetwork) -> convexity.Curvature:
    """Curvature in (w, u) with kernels that all but vanish kept as they are: each is a kink of the source penalty."""
    function, vector = _in_weights(problem, network)
    norms = [problem.penalty.norms(w)[:, :, None, None].expand_as(w).flatten() for w in network.kernels[1:]]
    away = [norm > NEGLIGIBLE * norm.max() for norm in norms]
    smooth = (
        torch.cat([torch.ones_like(network.kernels[0]).flatten(), *away, torch.ones_like(network.readout).flatten()])
        > 0
    )
    return convexity.curvature(function, vector, torch.eye(len(vector)).to(vector)[:, smooth])


def _curvatures(setting: Setting, of: Callable[[mf.Problem, mf.ParticleNetwork], convexity.Curvature]) -> Evidence:
    """-(smallest eigenvalue) / rounding at random starts and midway between a trained network and its copy."""
    ratios: dict[str, list[float]] = {"starts": [], "midpoints between copies": []}
    relative, minima, unmoved = [], [], 0
    for depth, instance in _cases(setting):
        problem, start, trained = (
            _problem(setting, depth, instance),
            _start(setting, depth, instance),
            _trained(setting, depth, instance),
        )
        copy = _copy(setting, trained, instance)
        points = {"starts": start, "midpoints between copies": measures.interpolate(trained, copy, 0.5)}
        if _distance(problem, trained, copy) <= UNMOVED * float(_in_weights(problem, start)[1].norm()):
            del points["midpoints between copies"]
            unmoved += 1
        for name, network in points.items():
            found = of(problem, network)
            ratios[name].append(-found.smallest / found.rounding)
            relative.append(found.smallest / max(found.largest, -found.smallest))
        at_minimum = of(problem, trained)
        minima.append(at_minimum.smallest / at_minimum.largest)
    every = [ratio for each in ratios.values() for ratio in each]
    negative = sum(ratio > 1 for ratio in every)
    text = (
        f"{share_text(negative, len(every), 'points have negative curvature')}, {min(relative):+.2g} to "
        f"{max(relative):+.2g} of the largest; at the trained networks {min(minima):+.2g} to {max(minima):+.2g}; "
        f"{unmoved} trained networks left out, of one particle or none: a permutation does not move them"
    )
    series = tuple(ranked(name, each) for name, each in ratios.items())
    return Evidence(smallest(every), text, len(every), len(every) - negative, series)


def _distance(problem: mf.Problem, first: mf.ParticleNetwork, second: mf.ParticleNetwork) -> float:
    """Euclidean, in the weights."""
    return float((_in_weights(problem, first)[1] - _in_weights(problem, second)[1]).norm())


CLAIMS = (
    Claim(
        name="weight_nonconvexity.barriers",
        statement="J is not convex in the weights: it rises between a trained network and a permuted copy of it, or "
        "another trained one.",
        source="docs/theory.md, sections 3 and 4.1",
        statistic="least, over problems, of the largest rise of J above the chord of a line, in rounding bounds",
        threshold=1.0,
        at_least=True,
        derivation="a rise beyond the running error bound of the three values is a witness against convexity",
        limits="Non-convexity by itself does not make training fail: it says that convexity has to come from "
        "elsewhere.",
        measure=lambda setting: _barriers(setting, measures.interpolate),
        controls={"the same lines, mixture of measures": lambda setting: _barriers(setting, measures.mixture)},
        axes=Axes("t along the line", "rise above the chord / J", "", 0.0, "chord"),
    ),
    Claim(
        name="weight_nonconvexity.curvature",
        statement="The Hessian of J in the weights has a negative eigenvalue at random starts and midway between "
        "distinct permuted copies.",
        source="docs/theory.md, sections 3 and 4.1",
        statistic="least, over points, of minus the smallest eigenvalue (autograd products, float64), in units of its "
        "rounding",
        threshold=1.0,
        at_least=True,
        derivation="a Rayleigh quotient below zero by more than d^(3/2) eps times the largest eigenvalue is a "
        "direction of negative curvature",
        limits="At a trained minimum the smallest eigenvalue cannot be negative; it is reported beside.",
        measure=lambda setting: _curvatures(setting, _in_network),
        controls={"the same networks in (p, W, U)": lambda setting: _curvatures(setting, _in_program)},
        axes=Axes("point, sorted", "minus the smallest eigenvalue / rounding", "", 1.0),
    ),
)
