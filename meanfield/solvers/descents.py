"""How the flow is followed, step by step: explicit Euler for trajectories, Adam's moments (Kingma & Ba 2015) to get to
the limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from meanfield.network import ParticleNetwork
from meanfield.penalties import input_norms
from meanfield.problem import Problem
from meanfield.solvers import velocities
from meanfield.solvers.velocities import Tangent
from meanfield.storage import states

DISSIPATION_ERROR = 0.1  # relative error of dJ = -step speed^2 at which an Euler step is accepted


class Descent(Protocol):
    """One step of a method: from a network and its velocity to the next network."""

    time: float

    def state(self) -> dict[str, Any]:
        """What `restore` continues from, for a `StateFile`."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...

    def propose(self, network: ParticleNetwork, flow: Tangent) -> ParticleNetwork: ...

    def judge(self, network: ParticleNetwork, moved: ParticleNetwork, change: Tensor) -> bool:
        """Whether to accept, given the change of J, 0-dimensional; also adapts the step.  At most one host read."""
        ...


@dataclass
class GradientDescent:
    """Explicit Euler with the step adapted to the dissipation identity (adaptive=False: the step is kept, or falls to
    zero over `total` steps).
    """

    problem: Problem
    step: float
    adaptive: bool
    total: int | None = None
    count: int = 0
    time: float = 0.0
    dissipated: float = 0.0
    identity_error: float = 0.0

    def state(self) -> dict[str, Any]:
        names = ("step", "count", "time", "dissipated", "identity_error")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def length(self) -> float:
        """Of the next step, in flow time."""
        return self.step * (1.0 if self.total is None else annealed(self.count, self.total))

    def propose(self, network: ParticleNetwork, flow: Tangent) -> ParticleNetwork:
        return velocities.euler(self.problem, network, flow, self.length)

    def judge(self, network: ParticleNetwork, moved: ParticleNetwork, change: Tensor) -> bool:
        squared, change = torch.stack([velocities.squared_distance(network, moved), change]).tolist()
        predicted = squared / self.length  # = step speed^2
        noise = 64 * torch.finfo(network.dtype).eps  # J of order one cannot resolve less
        error = abs(change + predicted) / max(predicted, noise) if math.isfinite(change) else math.inf
        accepted = not self.adaptive or error <= 2 * DISSIPATION_ERROR or abs(change + predicted) <= noise
        if accepted:
            self.time += self.length
            self.count += 1
            self.dissipated += predicted
            self.identity_error = error
        if self.adaptive:  # the error is of first order in the step
            self.step *= min(1.5, max(0.3, 0.9 * DISSIPATION_ERROR / max(error, 1e-12)))
        return accepted


def annealed(count: int, total: int) -> float:
    """The share of a step that is left after `count` of `total` steps: from 1 to 0 along a cosine."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, count / total)))


@dataclass
class PreconditionedDescent:
    """Adam's moments on the flow's velocities.  Proximal maps and projections use the metric that its steps scale, in
    which a point is at rest just where the flow is.

    The rate is what an entry changes by in a step.  A flattened readout multiplies f / positions: its entries count in
    units of the positions, in which an image moves the output as much as it does with the average readout.
    """

    problem: Problem
    rate: float
    total: int
    betas: tuple[float, float] = (0.9, 0.99)
    count: int = 0
    time: float = math.nan
    first: Tangent | None = None
    second: Tangent | None = None

    def state(self) -> dict[str, Any]:
        moments = {name: getattr(self, name) for name in ("first", "second")}
        return {"count": self.count} | {name: m and states.entries(m) for name, m in moments.items()}

    def restore(self, state: dict[str, Any]) -> None:
        self.count, self.first, self.second = state["count"], Tangent.of(state["first"]), Tangent.of(state["second"])

    def propose(self, network: ParticleNetwork, flow: Tangent) -> ParticleNetwork:
        self.count += 1
        b1, b2 = self.betas
        squares = self._squares(flow)
        self.first = flow if self.first is None else self.first.map(lambda m, v: b1 * m + (1 - b1) * v, flow)
        self.second = squares if self.second is None else self.second.map(lambda m, v: b2 * m + (1 - b2) * v, squares)
        rate = self.rate * annealed(self.count, self.total)
        steps = self.second.map(lambda m: rate / (m.sqrt() + 1e-12))
        steps = replace(steps, readout=steps.readout * flow.readout[0, 0].numel())
        move = self.first.map(lambda m, s: m * s, steps)
        return velocities.advance(self.problem, network, move, steps)

    def _squares(self, flow: Tangent) -> Tangent:
        """Squared velocities, one per set of entries that a penalty or a bound moves together: the means over
        kernels (i, j), and over (z_i, b_i) where an input bound is on.
        """
        first, bias = flow.kernels[0].square(), flow.biases[0]
        biases = [None if v is None else v.square() for v in flow.biases]
        if self.problem.penalty.input_bound is not None:
            joint = input_norms(flow.kernels[0], bias).square() / (first[0].numel() + (bias is not None))
            first, biases[0] = joint[:, None, None, None], None if bias is None else joint
        return Tangent(
            [None if v is None else v.square() for v in flow.masses],
            [first, *(v.square().mean((2, 3), keepdim=True) for v in flow.kernels[1:])],
            flow.readout.square(),
            biases,
        )

    def judge(self, network: ParticleNetwork, moved: ParticleNetwork, change: Tensor) -> bool:
        return True  # without a look, which a device would wait for: the next record finds what is not finite
