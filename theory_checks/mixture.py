"""Claim 8: the straight line of measures between two networks of any widths stays below the chord of J, and of the
loss alone; so do modules side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import meanfield as mf
from meanfield import measures
from meanfield.finite import residual, vgg
from meanfield.fusion import Ensemble, matched
from theory_checks.claim import Axes, Claim, Evidence, Series, Setting, ranked
from theory_checks.instances import LOSSES, Variety, digits_problem, random_network, random_start
from theory_checks.lines import Join, rises
from theory_checks.rounding import in_units, loss_change, loss_error, output_error
from theory_checks.statistics import largest

TIMES = (0.1, 0.25, 0.5, 0.75, 0.9)
SHAPE, OUTPUTS = (1, 8, 8), 3
_RESIDUAL = partial(residual, SHAPE, OUTPUTS, width=3, blocks=(1, 1), dtype=torch.float64)
MODULES: dict[str, Callable[[torch.Generator], nn.Module]] = {
    "vgg": lambda generator: vgg(11, SHAPE, OUTPUTS, width=2, generator=generator, dtype=torch.float64),
    "residual": lambda generator: _RESIDUAL(batch_norm=False, generator=generator),
    "residual with batch norm": lambda generator: _RESIDUAL(batch_norm=True, generator=generator),
}
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


def _matched(problem: mf.Problem, first: mf.ParticleNetwork, second: mf.ParticleNetwork) -> Any:
    return matched(first, second, problem.inputs, "transport")


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
        joined = [(p, a, _matched(p, a, b)) for p, a, b in _pairs(setting, ((width, width),))]
        found = _rises(setting, joined, measures.interpolate, "matched weights")
        lines.append(found.series[0])
        barriers.append(f"{np.mean([max(line.y) for line in found.series]):.1%} at {2 * width}/{width}")
    text = f"{raw.text}; beside it, after matching of features, mean barriers in J of {', '.join(barriers)}"
    return Evidence(raw.statistic, text, raw.instances, raw.beyond, (*raw.series[:2], *lines))


def _any_pairs(setting: Setting) -> Iterator[tuple[mf.Problem, Any, Any]]:
    """Data, and two networks for them that were never trained on these: particles of any architecture and widths, and
    modules that have nothing in common but the shape of their outputs.  One pair in eight is a network with itself,
    where the chord is as flat as the line and rounding is all.
    """
    variety = Variety(setting, 18)
    for instance in range(setting.instances(16, 160)):
        generator, depth = setting.generator(18, 1, instance), 1 + instance % 3
        problem = variety.problem(instance, depth)
        first, second = (random_network(problem, widths[:depth], generator) for widths in ((3, 4, 2), (5, 2, 4)))
        yield problem, first, first if instance % 8 == 0 else second
    for instance in range(setting.instances(8, 40)):
        generator, loss = setting.generator(18, 2, instance), variety.pick(LOSSES, 30, instance)
        problem = _module_problem(setting, loss, generator)
        kinds = [variety.pick(tuple(MODULES), 31 + side, instance) for side in range(2)]
        first, second = (_module(kind, problem, generator) for kind in kinds)
        yield problem, first, first if instance % 8 == 0 else second


def _module_problem(setting: Setting, loss: str, generator: torch.Generator) -> mf.Problem:
    """Eight images, targets of three classes or numbers; its architecture is nobody's."""
    inputs = torch.randn(8, *SHAPE, generator=generator, dtype=torch.float64)
    targets = {
        "softmax": torch.arange(8) % OUTPUTS,
        "logistic": torch.randn(8, OUTPUTS, generator=generator, dtype=torch.float64).sign(),
        "squared": torch.randn(8, OUTPUTS, generator=generator, dtype=torch.float64),
    }
    architecture = mf.Architecture(SHAPE, (mf.Conv(3),), outputs=OUTPUTS)
    return mf.Problem(architecture, inputs, targets[loss], loss).to(device=setting.device)


def _module(kind: str, problem: mf.Problem, generator: torch.Generator) -> nn.Module:
    """A random classifier of this kind whose running statistics, if it has any, are of images of its own."""
    network = MODULES[kind](generator)
    network(torch.randn(8, *SHAPE, generator=generator, dtype=torch.float64))
    return network.eval().to(problem.inputs.device)


def _side_by_side(first: Any, second: Any, t: float) -> Any:
    if isinstance(first, nn.Module):
        return Ensemble([first, second], (1 - t, t))
    return measures.mixture(first, second, t)


@torch.no_grad()
def _losses(setting: Setting, steep: bool = False) -> Evidence:
    """Outputs against the line of outputs, and the loss against its chord, both in rounding bounds.

    steep: the loss log(1 + loss) in place of the loss, which is not convex.
    """
    off, above = [], []
    for problem, first, second in _any_pairs(setting):
        ends = [network(problem.inputs) for network in (first, second)]
        errors = [_output_error(network, problem) for network in (first, second)]
        for t in TIMES:
            middle = _side_by_side(first, second, t)
            output, line, error, size = (
                middle(problem.inputs),
                *((1 - t) * a + t * b for a, b in (ends, errors, [end.abs() for end in ends])),
            )
            error = error + _output_error(middle, problem) + 3 * torch.finfo(output.dtype).eps * size
            off.append(in_units((output - line).abs(), error))
            values = [problem.loss.value(each, problem.targets) for each in (*ends, output)]
            a, b, found = ((value.log1p() if steep else value).mean() for value in values)
            allowed = loss_change(problem, output, error) + sum(loss_error(problem, each) for each in (*ends, output))
            above.append(float(found - (1 - t) * a - t * b) / allowed)
    beyond = sum(ratio > 1 for ratio in (*off, *above))
    text = (
        f"{beyond} of {len(off)} outputs and {len(above)} losses beyond rounding; outputs at most {largest(off):.2g} "
        f"bounds off the line, losses at most {largest(above):.2g} above the chord"
    )
    return Evidence(largest([*off, *above]), text, len(off), beyond, (ranked("loss above its chord", above),))


def _raw_losses(setting: Setting) -> Evidence:
    """The loss alone along averaged weights of trained networks, and beside it after matching."""
    ratios, beside = [], []
    for problem, first, second in _pairs(setting, ((8, 8),)):
        ratios.append(_rise(problem, first, second))
        beside.append(_rise(problem, first, _matched(problem, first, second)))
    text = (
        f"rises of {min(ratios):.2g} to {max(ratios):.2g} bounds; after matching {min(beside):.2g} to {max(beside):.2g}"
    )
    return Evidence(min(ratios), text, len(ratios), sum(ratio > 1 for ratio in ratios), (ranked("raw", ratios),))


def _rise(problem: mf.Problem, first: mf.ParticleNetwork, second: mf.ParticleNetwork) -> float:
    """The largest of the loss above its chord along the line of weights, in rounding bounds."""
    networks = [measures.interpolate(first, second, t) for t in (0.0, *TIMES, 1.0)]
    outputs = [network(problem.inputs) for network in networks]
    losses = [float(problem.loss.value(output, problem.targets).mean()) for output in outputs]
    allowed = [
        loss_change(problem, output, output_error(network, problem.inputs)) + loss_error(problem, output)
        for network, output in zip(networks, outputs)
    ]
    return max(
        (loss - (1 - t) * losses[0] - t * losses[-1]) / (own + allowed[0] + allowed[-1])
        for t, loss, own in zip(TIMES, losses[1:], allowed[1:])
    )


def _output_error(network: Any, problem: mf.Problem) -> Tensor:
    """Of modules none: what counts are the outputs that they computed, the same ones side by side."""
    if isinstance(network, mf.ParticleNetwork):
        return output_error(network, problem.inputs)
    return torch.zeros_like(problem.inputs[:1, 0, 0, :1])


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
    Claim(
        name="mixture.loss",
        statement="The mixture of two networks, particles of any architecture or any two modules, has the straight "
        "line of their outputs, so that every loss that is convex in the outputs stays below its chord.",
        source="docs/theory.md, section 6; the definition of convexity",
        statistic="largest distance of an output from the line of outputs, and rise of a loss above its chord, in "
        "rounding bounds",
        threshold=1.0,
        derivation="running error bounds of the outputs, their effect on the loss, and the rounding of the loss",
        limits="The mixture has the parameters of both networks.  It says nothing about accuracy, nor about losses "
        "that are not convex.",
        measure=_losses,
        controls={
            "a loss that is not convex": lambda setting: _losses(setting, steep=True),
            "raw weight interpolation": _raw_losses,
        },
        axes=Axes("line and time, sorted", "rise above the chord / rounding bound", "", 0.0, "chord"),
    ),
)
