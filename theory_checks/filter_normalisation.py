"""A filter-normalised surface does not see how a ReLU network spreads its scale over layers; over channels it does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

import meanfield as mf
from meanfield import landscape
from meanfield.network import along_axis
from meanfield.subject import Subject
from theory_checks.claim import Axes, Claim, Evidence, Setting, ranked
from theory_checks.instances import random_network, random_problem
from theory_checks.statistics import largest, share_text

WIDTHS = ((6, 5), (5, 4, 6))
POINTS = ((1.0, 0.0), (0.0, 1.0), (-0.5, 0.75), (1.0, -1.0), (0.1, 0.2))
EXPONENTS = 4  # factors are 2^-4 to 2^4


def rescaled(network: mf.ParticleNetwork, factors: Sequence[Tensor]) -> mf.ParticleNetwork:
    """What comes into particle j of layer l times factors[l][j], what goes out divided by it: F stays with ReLU."""
    kernels = [kernel * along_axis(factor, kernel, 0) for kernel, factor in zip(network.kernels, factors)]
    kernels[1:] = [kernel / along_axis(factor, kernel, 1) for kernel, factor in zip(kernels[1:], factors)]
    biases = [None if bias is None else bias * factor for bias, factor in zip(network.biases, factors)]
    readout = network.readout / along_axis(factors[-1], network.readout, 1)
    return mf.ParticleNetwork(network.architecture, network.masses, kernels, readout, biases)


def _factors(network: mf.ParticleNetwork, generator: torch.Generator, channels: bool) -> list[Tensor]:
    counts = network.widths if channels else (1,) * len(network.widths)
    draws = [torch.randint(-EXPONENTS, EXPONENTS + 1, (count,), generator=generator) for count in counts]
    if channels:  # one of a layer twice another, at least: no common factor by chance
        draws = [torch.cat([draw[:1], draw[:1] + 1, draw[2:]]) for draw in draws]
    return [(2.0 ** draw.double()).to(network.readout).expand(width) for draw, width in zip(draws, network.widths)]


def _surface(problem: mf.Problem, network: mf.ParticleNetwork, seed: int, **options) -> Tensor:
    """F at the points, (points, N, K)."""
    plane, subject = landscape.plane(network, seed, biases=True, **options), Subject(network)
    return torch.stack([subject(plane.at(*point), problem.inputs) for point in POINTS])


def _changes(
    setting: Setting, *, channels: bool = False, activation: str = "relu", normalise: str = "filter"
) -> Evidence:
    changes, balanced = [], []
    for instance in range(setting.instances(12, 120)):
        generator, depth = setting.generator(17, instance), 2 + instance % 2
        problem = random_problem(generator, depth, activation=activation, bias=True, device=setting.device)
        network = random_network(problem, WIDTHS[depth - 2], generator)
        pair = [network, rescaled(network, _factors(network, generator, channels))]
        changes.append(_apart(*(_surface(problem, each, instance, normalise=normalise) for each in pair)))
        if activation == "relu":
            balanced.append(_apart(*(_surface(problem, each, instance, balance=True) for each in pair)))
    beyond = sum(change > 0 for change in changes)
    text = f"{share_text(beyond, len(changes), 'surfaces change')}; at most {largest(changes):.2g} of the largest |F|"
    if balanced:
        text += f"; of balanced channels by {largest(balanced):.2g}"
    return Evidence(largest(changes), text, len(changes), beyond, (ranked("rescaled", changes),))


def _apart(first: Tensor, second: Tensor) -> float:
    """Relative to the largest |F| on the surface."""
    return float((first - second).abs().max() / first.abs().max())


CLAIMS = (
    Claim(
        name="filter_normalisation",
        statement="ReLU: one factor per layer, taken back by its reader, changes no point of the filter-normalised "
        "plane of a given seed.  One factor per channel does.",
        source="Li, Xu, Taylor, Studer & Goldstein 2018, section 4",
        statistic="largest change of F over points of the plane, relative to the largest |F| there",
        threshold=0.0,
        derivation="the factors are powers of two, by which multiplying and dividing is exact",
        limits="Positive homogeneity only.  Filter normalisation does not make networks comparable that spread their "
        "scale over channels in different ways; balancing the channels first does.",
        measure=_changes,
        controls={
            "one factor per channel": partial(_changes, channels=True),
            "tanh": partial(_changes, activation="tanh"),
            "directions that are not normalised": partial(_changes, normalise="none"),
        },
        axes=Axes("network, sorted by its change", "change / largest |F|", "", 0.0),
    ),
)
