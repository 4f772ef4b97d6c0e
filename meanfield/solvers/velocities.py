"""The velocity of the particle flow, and steps, lengths and speeds in its metric.

    dz_i/dt = -(1/p_i) dJ/dz_i      dw_ij/dt = -(1/(p_i p_j)) dJ/dw_ij      du_j/dt = -(1/p_j) dJ/du_j
    dp_i/dt = -p_i (dJ/dp_i - sum_k p_k dJ/dp_k)

(Chizat & Bach 2018; Chizat 2019 for masses; Fang et al. 2021 for several layers.)  Steps treat the kernel norm by its
proximal map, so that kernels vanish exactly, and keep the bounds by projection in the metric: sum_i |w_ij| p_i <= B
adds -kappa_j w_ij / |w_ij| to dw_ij/dt and -p_i (a_i - sum_k p_k a_k) with a_i = sum_j kappa_j p_j |w_ij| to dp_i/dt,
for the multipliers kappa_j >= 0 of section 5 of the theory (`penalties.inflow_projection`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meanfield.network import ParticleNetwork, along_axis
from meanfield.penalties import inflow_projection, kernel_projection, shrinkage_root
from meanfield.precision import full_float32
from meanfield.problem import Problem, Terms, UncertifiedTerms, project_bounds, summed

PROBE = {torch.float32: 1e-3, torch.float64: 1e-6}  # flow time over which a speed is measured


@dataclass(frozen=True, eq=False)
class Tangent:
    """One entry per tensor of a network: a velocity, a displacement or the gradient moments.

    masses are relative rates, (dp_i/dt) / p_i, None where masses are kept; everything else has the shape of what it
    moves.
    """

    masses: list[Tensor | None]
    kernels: list[Tensor]
    readout: Tensor
    biases: list[Tensor | None]

    def map(self, function: Callable[..., Tensor], *others: Tangent) -> Tangent:
        """`function` of every tensor and of its counterparts in the others; None stays None."""

        def apply(first: list[Any], *rest: list[Any]) -> list[Any]:
            return [None if entry is None else function(entry, *more) for entry, *more in zip(first, *rest)]

        return Tangent(
            apply(self.masses, *(o.masses for o in others)),
            apply(self.kernels, *(o.kernels for o in others)),
            function(self.readout, *(o.readout for o in others)),
            apply(self.biases, *(o.biases for o in others)),
        )

    @classmethod
    def of(cls, entries: dict[str, Any] | None) -> Tangent | None:
        """From `states.entries`, None from None."""
        return None if entries is None else cls(**entries)


@torch.inference_mode(False)
@full_float32()
def velocity(
    problem: Problem, network: ParticleNetwork, masses: bool = True
) -> tuple[Terms | UncertifiedTerms, Tangent]:
    """The terms of J and the flow's velocity, without the source penalty's pull on the kernels (its proximal map adds
    it).

    With masses=False the masses have no rates.
    """
    leaf = network.map(lambda tensor: tensor.detach().requires_grad_())
    loss, gradients = problem.pulled_back(network)
    with torch.enable_grad():
        terms, depth = summed(loss, problem.prices(leaf)), problem.architecture.depth
        smooth = _slopes(sum(terms[3:], terms.readout), leaf)  # with the user's own
        gradients = [fit + penalty for fit, penalty in zip(gradients, smooth)]
        if masses and terms.source.requires_grad:
            priced = torch.autograd.grad(terms.source, leaf.masses)
            gradients[:depth] = [g + s for g, s in zip(gradients[:depth], priced)]
    detached = [term.detach() for term in terms]
    return summed(detached[0], detached[1:]), _tangent(network, gradients, masses)


def _slopes(values: Tensor, leaf: ParticleNetwork) -> tuple[Tensor, ...]:
    return torch.autograd.grad(values, leaf.tensors(), allow_unused=True, materialize_grads=True)


def _tangent(network: ParticleNetwork, gradients: list[Tensor], masses: bool) -> Tangent:
    """Minus the gradients divided by the masses of what they move; mass gradients centred (Fisher-Rao)."""
    depth, p = network.architecture.depth, network.masses
    slopes, kernels, readout, rest = (
        gradients[:depth],
        gradients[depth : 2 * depth],
        gradients[2 * depth],
        gradients[2 * depth + 1 :],
    )
    rates: list[Tensor | None] = [q @ slope - slope if masses else None for slope, q in zip(slopes, p)]
    kernels = [-kernel / target[:, None, None, None] for kernel, target in zip(kernels, p)]
    for layer in range(1, depth):  # one mass after the other: their product may underflow
        kernels[layer] = kernels[layer] / p[layer - 1][None, :, None, None]
    biases = [None if bias is None else -rest.pop(0) / target for bias, target in zip(network.biases, p)]
    return Tangent(rates, kernels, -readout / along_axis(p[-1], readout, 1), biases)


def advance(problem: Problem, network: ParticleNetwork, move: Tangent, steps: Tangent | float) -> ParticleNetwork:
    """Move a network, then the proximal map of the source penalty and the projection on simplex and bounds.

    Masses become p exp(rate) before their sum is made one.  steps are the step lengths that made the move of the
    velocities, a number or one per entry (per kernel on layers >= 1): they turn the penalty's pull
    q lambda_s s_i^(q-1) into a shrinkage and are the scale of the metric in which the amplitude bound is projected on.
    """
    logits = [p if rate is None else p.log() + rate for p, rate in zip(network.masses, move.masses)]
    masses = [p if rate is None else torch.softmax(p, 0) for p, rate in zip(logits, move.masses)]
    kernels = [w + step for w, step in zip(network.kernels, move.kernels)]
    bound = problem.penalty.amplitude_bound
    # from the last layer on: a bound changes the masses of its sources, the targets of the layer before
    for layer in reversed(range(1, len(kernels))):
        lengths = steps.kernels[layer][:, :, 0, 0] if isinstance(steps, Tangent) else steps
        kernels[layer] = _source_prox(problem, kernels[layer], masses[layer], lengths)
        rates = steps.masses[layer - 1] if isinstance(steps, Tangent) else steps
        if bound is None:
            continue
        if rates is None or move.masses[layer - 1] is None:
            kernels[layer] = kernel_projection(kernels[layer], masses[layer - 1], problem.penalty, bound, lengths)
            continue
        kernels[layer], masses[layer - 1], _ = inflow_projection(
            kernels[layer], logits[layer - 1], masses[layer], problem.penalty, bound, lengths, rates
        )
    biases = [None if b is None or step is None else b + step for b, step in zip(network.biases, move.biases)]
    moved = ParticleNetwork.unchecked(network.architecture, masses, kernels, network.readout + move.readout, biases)
    return project_bounds(problem, moved)  # only rounding is left of the amplitude bound


def _source_prox(problem: Problem, kernels: Tensor, target: Tensor, steps: Tensor | float) -> Tensor:
    """argmin over w of sum_j p_j |w_ij - .|^2 / (2 steps_ij) + lambda_s s_i^q, s_i = sum_j p_j |w_ij|, for every
    source i.
    """
    penalty = problem.penalty
    if penalty.source == 0:
        return kernels
    q = penalty.power
    slopes = q * penalty.source * (steps[:, :, None] if isinstance(steps, Tensor) else steps)
    outflow = shrinkage_root(penalty.atoms(kernels), slopes, target[:, None, None], (0, 2), mass=1.0, power=q)
    return penalty.shrink(kernels, slopes * outflow.pow(q - 1))


def squared_distance(start: ParticleNetwork, end: ParticleNetwork) -> Tensor:
    """Squared length of a small displacement in the flow's metric at `start`, 0-dimensional.

    sum p_i |dz_i|^2 + sum p_i p_j |dw_ij|^2 + sum p_j |du_j|^2 + sum |dp_i|^2 / p_i, biases like their particle.
    """
    p = start.masses
    total = sum(((b - a).square() / a).sum() for a, b in zip(p, end.masses))
    sources = (torch.ones_like(p[0][:1]).expand(start.kernels[0].shape[1]), *p[:-1])
    for target, source, a, b in zip(p, sources, start.kernels, end.kernels):
        total = total + target @ (b - a).square().sum((2, 3)) @ source
    for target, a, b in zip(p, start.biases, end.biases):
        if a is not None and b is not None:
            total = total + target @ (b - a).square()
    return total + p[-1] @ (end.readout - start.readout).movedim(1, 0).flatten(1).square().sum(1)


def metric_speed(problem: Problem, network: ParticleNetwork, flow: Tangent) -> float:
    """|d network / dt| in the metric, the square root of -dJ/dt; proximal and projected parts included."""
    probe = PROBE[network.dtype]
    return math.sqrt(float(squared_distance(network, euler(problem, network, flow, probe)))) / probe


def euler(problem: Problem, network: ParticleNetwork, flow: Tangent, step: float) -> ParticleNetwork:
    """One explicit step of so much flow time, proximal and projected parts included."""
    return advance(problem, network, flow.map(lambda v: step * v), step)
