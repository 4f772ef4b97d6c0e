"""Networks of finite width drawn from a continuous one, and the tangent kernel of their limit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import meanfield as mf
from meanfield import finite
from meanfield.rates import slope
from theory_checks.claim import Axes, Claim, Evidence, Series, Setting
from theory_checks.instances import Variety, random_network
from theory_checks.statistics import largest

SAMPLED_WIDTHS = (16, 64, 256)
PARTICLES = ((9,), (9, 7), (8, 7, 6))
Draw = Callable[[mf.ParticleNetwork, int, torch.Generator], finite.FiniteCNN]


def _by_mass(network: mf.ParticleNetwork, width: int, generator: torch.Generator) -> finite.FiniteCNN:
    return finite.sample(network, (width,) * network.architecture.depth, generator)


def _masses_ignored(network: mf.ParticleNetwork, width: int, generator: torch.Generator) -> finite.FiniteCNN:
    equal = [torch.full_like(p, 1 / len(p)) for p in network.masses]
    unweighted = mf.ParticleNetwork(network.architecture, equal, network.kernels, network.readout, network.biases)
    return _by_mass(unweighted, width, generator)


def _rates(setting: Setting, draw: Draw) -> Evidence:
    """Slope of E|F_m - F|^2 in m, its worst upper end over problems of every kind."""
    variety, ends, series = Variety(setting, 14), [], []
    for instance in range(setting.instances(6, 24)):
        depth = 1 + instance % 3
        problem = variety.problem(instance, depth, side=4)
        network = random_network(problem, PARTICLES[depth - 1], setting.generator(141, instance))
        goal, errors = network(problem.inputs), []
        for width in SAMPLED_WIDTHS:
            runs = [
                draw(network, width, setting.generator(142, instance, width, run))(problem.inputs)
                for run in range(setting.either(60, 200))
            ]
            errors.append([float((output.detach() - goal).square().mean()) for output in runs])
        fitted = slope(list(SAMPLED_WIDTHS), errors, setting.derived_seed(143, instance))
        ends.append(fitted.high)
        means = [float(np.mean(each)) for each in errors]
        series.append(Series(f"problem {instance}, L = {depth}", [float(m) for m in SAMPLED_WIDTHS], means))
    beyond = sum(end > SAMPLED_THRESHOLD for end in ends)
    text = f"upper ends of the slopes {min(ends):.2f} to {max(ends):.2f} over {len(ends)} continuous networks"
    return Evidence(largest(ends), text, len(ends), beyond, tuple(series[:4]))


SAMPLED_THRESHOLD = -0.5

# --- the tangent kernel ---------------------------------------------------------------------------------------------

WIDTH = 64
Theta = Callable[[mf.Architecture, Tensor], Tensor]


def _mean_kernel(setting: Setting, limit: Theta) -> Evidence:
    """The closed form against the mean of empirical kernels, entry by entry, in standard errors of that mean."""
    variety, worst, count = Variety(setting, 15), [], setting.either(200, 800)
    for instance in range(setting.instances(6, 24)):
        problem = variety.problem(
            instance, 1, activations=("relu",), poolings=("none", "average"), losses=("squared",), side=4
        )
        architecture = mf.Architecture(
            problem.architecture.input_shape, problem.architecture.layers, problem.architecture.readout, 1
        )
        draws = torch.stack([_empirical(architecture, problem.inputs, setting, instance, run) for run in range(count)])
        error = draws.std(0) / count**0.5
        worst.append(float(((draws.mean(0) - limit(architecture, problem.inputs)).abs() / error).max()))
    beyond = sum(each > Z_THRESHOLD for each in worst)
    text = f"entries differ by at most {max(worst):.2f} standard errors of the mean of {count} kernels of width {WIDTH}"
    series = Series("largest difference", [float(k) for k in range(len(worst))], worst, "points")
    return Evidence(largest(worst), text, len(worst), beyond, (series,))


def _empirical(architecture: mf.Architecture, inputs: Tensor, setting: Setting, instance: int, run: int) -> Tensor:
    network = finite.FiniteCNN.random(
        architecture, (WIDTH,), inputs, setting.generator(151, instance, run), scaling="ntk"
    )
    return finite.kernel.empirical(network, inputs)


def _patches_nearer(architecture: mf.Architecture, inputs: Tensor) -> Tensor:
    """The closed form on images that are a tenth of the way to their mean: pairs of patches at smaller angles."""
    return finite.kernel.infinite(architecture, 0.9 * inputs + 0.1 * inputs.mean(0))


Z_THRESHOLD = 5.0

CLAIMS = (
    Claim(
        name="sampling",
        statement="Networks of width m whose channels are drawn from the masses approach the continuous network: "
        "E|F_m - F|^2 falls with m.",
        source="docs/theory.md, section 10",
        statistic="largest upper end of the 95% bootstrap intervals of the log-log slope of E|F_m - F|^2 in m, over "
        "continuous networks of every kind",
        threshold=SAMPLED_THRESHOLD,
        derivation="Monte Carlo has the slope -1, what is drawn from another measure the slope 0 in the end: halfway",
        limits="From m = 16 to 256, where particles are few; the rate with many particles is the width study's.",
        measure=lambda setting: _rates(setting, _by_mass),
        controls={"masses ignored": lambda setting: _rates(setting, _masses_ignored)},
        axes=Axes("width m", "E|F_m - F|^2", "xy"),
    ),
    Claim(
        name="sampling.tangent_kernel",
        statement="The closed form of the tangent kernel of one ReLU layer is the mean of the kernels of networks at "
        "random starts.",
        source="Jacot et al. 2018; Cho & Saul 2009; derivation in meanfield/finite/kernel.py",
        statistic="largest difference of an entry from the mean over starts, in standard errors of that mean",
        threshold=Z_THRESHOLD,
        derivation="the mean of hundreds of independent kernels is nearly Gaussian; an entry of some hundred is beyond "
        "5 standard errors with probability 1e-4",
        limits="One layer, whose kernel has its limit as its mean at every width.",
        measure=lambda setting: _mean_kernel(setting, finite.kernel.infinite),
        controls={"images moved towards their mean": lambda setting: _mean_kernel(setting, _patches_nearer)},
        axes=Axes("problem", "largest difference / standard error", "", Z_THRESHOLD),
    ),
)
