"""Claim 1: the change of variables network -> program -> network is exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import meanfield as mf
from meanfield.convex import repopulation
from theory_checks.claim import Axes, Claim, Evidence, Setting, ranked
from theory_checks.instances import Variety, random_network
from theory_checks.rounding import in_units, output_error, value_error
from theory_checks.statistics import largest, share_text

WIDTHS = ((5,), (5, 4), (4, 3, 5))
Change = Callable[[mf.ParticleNetwork], mf.ProgramPoint]


def _errors(problem: mf.Problem, network: mf.ParticleNetwork, change: Change) -> dict[str, float]:
    """Errors of value, output, features and realisation constraint, and of the way back, in units of their rounding
    bounds.
    """
    program = mf.ConvexProgram.freeze(problem, network)
    point = change(network)
    back = program.network(point)
    allowed, spread = output_error(network, problem.inputs), value_error(problem, network)
    responses, returned = network.responses(problem.inputs), back.responses(problem.inputs)
    value = float(problem.terms(network).total())
    return {
        "value": abs(float(program.value(point)) - value) / (2 * spread),
        "output": in_units(program.output(point) - responses.output, 2 * allowed),
        "features": max(
            (
                in_units(residual, _residual_error(program, point, layer))
                for layer, (residual, _) in enumerate(program.image_residuals(point, problem.inputs), start=1)
            ),
            default=0.0,
        ),
        "value of the network back": abs(float(problem.terms(back).total()) - value) / (2 * spread),
        "output of the network back": in_units(returned.output - responses.output, 2 * allowed),
    }


def _residual_error(program: mf.ConvexProgram, point: mf.ProgramPoint, layer: int) -> Tensor:
    """Bound of the float error in sum W T f + B - p g: twice the sum of absolute values, once for g and once for the
    sum.
    """
    conv = program.problem.architecture.layers[layer]
    eps = torch.finfo(point.readout.dtype).eps
    bias = point.biases[layer - 1]
    terms = point.kernels[layer - 1][0].numel() + 8
    total = conv.convolve(
        program.maps(program.problem.inputs)[1][layer - 1].abs(),
        point.kernels[layer - 1].abs(),
        None if bias is None else bias.abs(),
    )
    return 2 * terms * eps * total


def _compare(setting: Setting, change: Change) -> Evidence:
    worst: list[float] = []
    names: list[str] = []
    variety = Variety(setting, 1)
    for instance in range(setting.instances(24, 240)):
        depth = 1 + instance % 3
        problem = variety.problem(instance, depth)
        network = random_network(problem, WIDTHS[depth - 1], setting.generator(101, instance))
        errors = _errors(problem, network, change)
        name = max(errors, key=lambda key: errors[key])
        worst.append(errors[name])
        names.append(name)
    top = max(range(len(worst)), key=worst.__getitem__)
    beyond = sum(error > 1 for error in worst)
    text = (
        f"{share_text(beyond, len(worst), 'networks change')}; the largest change is {worst[top]:.2g} rounding bounds, "
        f"in the {names[top]}"
    )
    return Evidence(largest(worst), text, len(worst), beyond, (ranked("largest change", worst),))


def _without_source_mass(network: mf.ParticleNetwork) -> mf.ProgramPoint:
    """W_ij = w_ij p_j."""
    point = repopulation.to_program(network)
    kernels = tuple(W / source[None, :, None, None] for W, source in zip(point.kernels, network.masses))
    readout = point.readout if kernels else network.readout  # one layer has no W: U = u there
    return replace(point, kernels=kernels, readout=readout)


def _uniform_masses(network: mf.ParticleNetwork) -> mf.ProgramPoint:
    """W_ij = w_ij / (M M'), U_j = u_j / M: as if all particles weighed the same."""
    count = [len(p) for p in network.masses]
    point = repopulation.to_program(network)
    kernels = tuple(w / (a * b) for w, a, b in zip(network.kernels[1:], count, count[1:]))
    return replace(point, kernels=kernels, readout=network.readout / count[-1])


CLAIMS = (
    Claim(
        name="change_of_variables",
        statement="Network -> program variables -> network keeps value, output and features.",
        source="docs/theory.md, section 3; Fang et al. 2019, section 4",
        statistic="largest change of value, output or features over random networks, in rounding bounds",
        threshold=1.0,
        derivation="running error bound of every quantity in float64; 1 means that rounding alone explains the change",
        limits="It is an identity for one network. It says nothing of what can be reached from it.",
        measure=lambda setting: _compare(setting, repopulation.to_program),
        controls={
            "W without the source's mass": lambda setting: _compare(setting, _without_source_mass),
            "uniform masses in place of p": lambda setting: _compare(setting, _uniform_masses),
        },
        axes=Axes("network, sorted by its change", "change / rounding bound", "y", 1.0),
    ),
)
