"""Particle gradient flow: Wasserstein in positions and weights, Fisher-Rao in masses.  Network in, network out.

    dz_i/dt = -(1/p_i) dJ/dz_i      dw_ij/dt = -(1/(p_i p_j)) dJ/dw_ij      du_j/dt = -(1/p_j) dJ/du_j
    dp_i/dt = -p_i (dJ/dp_i - sum_k p_k dJ/dp_k)

(Chizat & Bach 2018; Chizat 2019 for masses; Fang et al. 2021 for several layers.)  J falls with dJ/dt = -speed^2, the
squared speed in the metric, which is how the integrator of descent="gradient" is tested and its step adapted.  Plain
Euler is a tool for trajectories; descent="preconditioned" takes the same velocities, scaled by running moments as in
Adam (Kingma & Ba 2015), to get to the limit.  Both treat the kernel norm by its proximal map, so that kernels vanish
exactly, and keep the bounds by projection in the metric: sum_i |w_ij| p_i <= B adds -kappa_j w_ij / |w_ij| to dw_ij/dt
and -p_i (a_i - sum_k p_k a_k) with a_i = sum_j kappa_j p_j |w_ij| to dp_i/dt, for the multipliers kappa_j >= 0 of
section 5 of the theory (`penalties.inflow_projection`).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor

from meanfield import certificates, limits
from meanfield.certificates import Certificate, Multipliers
from meanfield.convex import repopulation
from meanfield.convex.program import ConvexProgram
from meanfield.network import ParticleNetwork, along_axis
from meanfield.penalties import inflow_projection, input_norms, kernel_projection, shrinkage_root
from meanfield.precision import full_float32
from meanfield.problem import Problem, Terms, project_bounds
from meanfield.signatures import Count, Nonnegative, Positive, Seconds, Seed, checked
from meanfield.solvers.solution import ENDED_EARLY, Solution, message
from meanfield.storage import states
from meanfield.storage.states import StateFile
from meanfield.storage.tensors import digest
from meanfield.validation import choice, path

DESCENTS = ("preconditioned", "gradient")
DISSIPATION_ERROR = 0.1  # relative error of dJ = -step speed^2 at which an Euler step is accepted
STATE_SECONDS = 30.0  # of work that a killed run may lose
RECORD_SHARE = 0.2  # of the steps of minibatches, for records on all images
GLIMPSE = 1.0  # seconds between two looks at where a run is
PROBE = {torch.float32: 1e-3, torch.float64: 1e-6}


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
def velocity(problem: Problem, network: ParticleNetwork, masses: bool = True) -> tuple[Terms, Tangent]:
    """The terms of J and the flow's velocity, without the source penalty's pull on the kernels (its proximal map adds
    it).

    With masses=False the masses have no rates.
    """
    leaf = network.map(lambda tensor: tensor.detach().requires_grad_())
    loss, gradients = problem.pulled_back(network)
    with torch.enable_grad():
        terms, depth = Terms(loss, *problem.prices(leaf)), problem.architecture.depth
        smooth = _slopes(terms.readout + terms.input, leaf)
        gradients = [fit + penalty for fit, penalty in zip(gradients, smooth)]
        if masses and terms.source.requires_grad:
            priced = torch.autograd.grad(terms.source, leaf.masses)
            gradients[:depth] = [g + s for g, s in zip(gradients[:depth], priced)]
    return Terms(*(term.detach() for term in terms)), _tangent(network, gradients, masses)


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
    velocities, a number or one per entry (per kernel on layers >= 1): they turn the penalty's pull 2 lambda_s s_i into
    a shrinkage and are the scale of the metric in which the amplitude bound is projected on.
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
    """argmin over w of sum_j p_j |w_ij - .|^2 / (2 steps_ij) + lambda_s s_i^2, s_i = sum_j p_j |w_ij|, for every
    source i.
    """
    penalty = problem.penalty
    if penalty.source == 0:
        return kernels
    slopes = 2 * penalty.source * (steps[:, :, None] if isinstance(steps, Tensor) else steps)
    outflow = shrinkage_root(penalty.atoms(kernels), slopes, target[:, None, None], (0, 2), mass=1.0)
    return penalty.shrink(kernels, slopes * outflow)


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
    return math.sqrt(float(squared_distance(network, _euler(problem, network, flow, probe)))) / probe


def _euler(problem: Problem, network: ParticleNetwork, flow: Tangent, step: float) -> ParticleNetwork:
    return advance(problem, network, flow.map(lambda v: step * v), step)


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
        return _euler(self.problem, network, flow, self.length)

    def judge(self, network: ParticleNetwork, moved: ParticleNetwork, change: Tensor) -> bool:
        squared, change = torch.stack([squared_distance(network, moved), change]).tolist()
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
        return advance(self.problem, network, move, steps)

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


@checked
@torch.inference_mode(False)
def solve(
    problem: Problem,
    network: ParticleNetwork,
    *,
    descent: Annotated[str, choice(DESCENTS)] = "preconditioned",
    masses: bool = True,
    steps: Count = 2000,
    step_size: Positive | None = None,
    adaptive: bool = True,
    tolerance: Nonnegative = 1e-10,
    batch_size: Count | None = None,
    seed: Seed = 0,
    max_seconds: Seconds = math.inf,
    record_every: Count | None = None,
    state: Annotated[str | Path, path] | None = None,
    state_seconds: Seconds = STATE_SECONDS,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Solution:
    """Follow the particle gradient flow from `network`.

    descent "preconditioned" (default; reaches the limit; step_size is Adam's rate, 0.1, annealed to zero over `steps`)
    or "gradient" (explicit Euler for trajectories; step_size in flow time, start value 0.1, adapted to the dissipation
    identity unless adaptive=False).  masses=False keeps the masses fixed: plain mean-field training.  Stops when the
    squared metric speed (J per unit of flow time) falls below `tolerance`; it is evaluated, with J on all images, every
    `record_every` steps (default: 100 records a run, fewer with minibatches, where they take a sixth of the time).

    batch_size draws minibatches without replacement, reshuffled each epoch from `seed`: unbiased estimates of the
    velocities, those of masses among them.  Steps of both descents then fall to zero, so that the noise dies out.

    state: file (.safetensors) to which the whole state of the run is written every `state_seconds` seconds, and where a
    limit or an interrupt ends it.  A call with the same arguments continues from it and ends, on the same machine and
    as many threads, with the same bits as a run without a pause (seconds excepted).  It is removed when the run ends by
    itself, and refused (ValueError) where it is damaged or of other arguments or data.

    Returns the best recorded network.  History rows: step, images (seen in steps so far), seconds, time (flow time; NaN
    for the preconditioned descent), value, loss, source, readout, input, speed, dissipated (integral of speed^2),
    identity_error (of the last step, relative).  callback: called with every row, and in between, about once a second,
    with step, images and seconds alone.  The gap is that of the frozen program at the answer, with the flow's own
    multipliers.
    """
    problem.require_feasible(network)
    for layer, p in enumerate(network.masses):
        if bool((p <= 0).any()):
            raise ValueError(
                f"masses[{layer}] has particles without mass, which cannot flow; drop them (measures.drop_massless)"
            )
    warn_unattained(problem)
    rate = 0.1 if step_size is None else step_size
    adaptive = adaptive and batch_size is None
    method = (
        GradientDescent(problem, rate, adaptive, None if batch_size is None else steps)
        if descent == "gradient"
        else PreconditionedDescent(problem, rate, steps)
    )
    batches = _Batches(problem, batch_size, seed)
    every = record_every or max(1, steps // 100, batches.each_record)
    settings = {
        "descent": descent,
        "masses": masses,
        "steps": steps,
        "step_size": rate,
        "adaptive": adaptive,
        "tolerance": tolerance,
        "batch_size": batch_size,
        "seed": seed,
        "record_every": every,
        "widths": network.widths,
    }
    start = {"start": digest(network.tensors())[: states.DIGITS]}
    file = (
        None if state is None else StateFile(state, {**settings, **states.described(problem), **start}, problem.ranks)
    )
    run = _Run(problem, network.detach(), method, _Trail(problem, callback), batches, masses, steps, every, tolerance)
    with full_float32(), limits.within(max_seconds):
        return run.solution(file, state_seconds)


def warn_unattained(problem: Problem) -> None:
    """Warn, naming the bounds that are missing, where the infimum over measures may not be attained."""
    missing = problem.missing_bounds()
    if missing:
        warnings.warn(
            f"the infimum over all measures may not be attained: set {' and '.join(missing)} (unbounded activations, "
            "free biases or zero penalties can let the value fall on while mass concentrates)",
            UserWarning,
            stacklevel=5,  # who called the solver, which is wrapped twice
        )


class _Batches:
    """The problem itself, or its minibatches, epoch after epoch, each in an order of its own."""

    def __init__(self, problem: Problem, size: int | None, seed: int) -> None:
        self.problem, self.count = problem, problem.count
        self.size = None if size is None else min(size, self.count)
        self.generator, self.epoch = torch.Generator().manual_seed(seed), -1

    @property
    def each(self) -> int:
        """Images of a step."""
        return self.count if self.size is None else self.size

    @property
    def each_record(self) -> int:
        """Steps of which a record on all images costs a fifth."""
        return 1 if self.size is None else math.ceil(self.count / self.size / RECORD_SHARE)

    def at(self, step: int) -> Problem:
        """For increasing steps."""
        if self.size is None:
            return self.problem
        epoch, place = divmod(step, self.count // self.size)
        while self.epoch < epoch:
            self.order, self.epoch = torch.randperm(self.count, generator=self.generator), self.epoch + 1
        indices = self.order[place * self.size : (place + 1) * self.size]
        return self.problem.batch(indices.to(self.problem.inputs.device))


@dataclass
class _Run:
    """The loop; every step costs one forward and one backward pass, and with minibatches a record one on all images."""

    problem: Problem
    network: ParticleNetwork
    method: Descent
    trail: _Trail
    batches: _Batches
    masses: bool
    steps: int
    every: int
    tolerance: float
    step: int = 0
    kept: dict[str, Any] | None = None

    def solution(self, file: StateFile | None, seconds: float) -> Solution:
        """Continue from the file, which is written every so many seconds and goes where the run ends by itself."""
        if file is not None and (found := file.load(self.problem.inputs.device)) is not None:
            self.restore(found)
        status = self.follow(file, seconds)
        if status in ENDED_EARLY:
            self.save(file)
        solution = self.trail.solution(status)
        if file is not None and solution.status not in ENDED_EARLY:
            file.remove()
        return solution

    def save(self, file: StateFile | None) -> None:
        """As of the last place between two steps."""
        if file is not None and self.kept is not None:
            file.save(self.kept)

    def follow(self, file: StateFile | None, seconds: float) -> str:
        """The status with which the steps ended."""
        try:
            return self._descend(file, seconds)
        except limits.STOPS as stop:
            if self.trail.network is None:
                raise
            return limits.status(stop)

    def _descend(self, file: StateFile | None, seconds: float) -> str:
        batch, pulled, saved = self.batches.at(self.step), None, time.perf_counter()
        ranks = self.problem.ranks
        while True:
            late = limits.passed()
            if (late or self.step % self.every == 0 or self.step == self.steps) and self.trail.step != self.step:
                self.network = self.network.map(ranks.agreed)
                whole = self._whole() if pulled is None or batch is not self.problem else pulled
                if self.step and not ranks.decided(bool(whole[0].total().isfinite())):
                    return "stalled"
                if self._record(*whole) ** 2 <= self.tolerance:
                    return "converged"
                pulled = whole if batch is self.problem else pulled
            self.kept = None if file is None else self.state()
            if late:
                return "max_seconds"
            if self.step == self.steps:
                return "max_iterations"
            if time.perf_counter() - saved >= seconds:
                self.save(file)
                saved = time.perf_counter()
            terms, flow = velocity(batch, self.network, self.masses) if pulled is None else pulled
            moved = self.method.propose(self.network, flow)
            following = self.batches.at(self.step + 1)
            pulled = velocity(following, moved, self.masses)
            if ranks.decided(self.method.judge(self.network, moved, pulled[0].total() - terms.total())):
                self.network, batch = moved, following
            elif not isinstance(self.method, GradientDescent) or self.method.step < torch.finfo(moved.dtype).eps:
                return "stalled"
            else:
                pulled = terms, flow
            self.step += 1
            self.trail.glimpse(self.step, self.step * self.batches.each)

    def _whole(self) -> tuple[Terms, Tangent]:
        """On all images; of the start whatever the time, as it is the least that can be returned."""
        with limits.grace(math.inf) if self.trail.network is None else nullcontext():
            return velocity(self.problem, self.network, self.masses)

    def _record(self, terms: Terms, flow: Tangent) -> float:
        speed = self.problem.ranks.decided(metric_speed(self.problem, self.network, flow))
        return self.trail.record(self.step, self.step * self.batches.each, self.network, terms, speed, self.method)

    def state(self) -> dict[str, Any]:
        """What `restore` continues from: the place between two steps, with the record of that step, if there is one."""
        trail = self.trail
        return {
            "step": self.step,
            "network": states.entries(self.network),
            "method": self.method.state(),
            "history": list(trail.history),
            "best": trail.best,
            "best_network": None if trail.network is None else states.entries(trail.network),
            "seconds": trail.seconds(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        architecture, trail = self.problem.architecture, self.trail
        self.step, self.network = state["step"], ParticleNetwork(architecture, **state["network"])
        self.method.restore(state["method"])
        trail.history, trail.best = state["history"], state["best"]
        if state["best_network"] is not None:
            trail.network = ParticleNetwork(architecture, **state["best_network"])
        trail.began -= state["seconds"]


@dataclass
class _Trail:
    """The history of a run and its best network."""

    problem: Problem
    callback: Callable[[dict[str, Any]], None] | None
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float = math.inf
    network: ParticleNetwork | None = None
    began: float = field(default_factory=time.perf_counter)
    glimpsed: float = 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    @property
    def step(self) -> int | None:
        """Of the last record."""
        return self.history[-1]["step"] if self.history else None

    def glimpse(self, step: int, images: int) -> None:
        """Where the run is, for who watches it."""
        if self.callback is not None and self.seconds() - self.glimpsed > GLIMPSE:
            self.glimpsed = self.seconds()
            self.callback({"step": step, "images": images, "seconds": self.glimpsed})

    def record(
        self, step: int, images: int, network: ParticleNetwork, terms: Terms, speed: float, method: Descent
    ) -> float:
        row = {"step": step, "images": images, "seconds": self.seconds(), "time": method.time}
        row["value"] = self.problem.ranks.decided(float(terms.total()))
        if self.network is None:
            self.problem.require_finite(terms.total())
        row |= {name: float(term) for name, term in terms._asdict().items()} | {"speed": speed}
        if isinstance(method, GradientDescent):
            row |= {"dissipated": method.dissipated, "identity_error": method.identity_error, "step_size": method.step}
        self.history.append(row)
        if row["value"] < self.best or self.network is None:
            self.best, self.network = row["value"], network
        if self.callback is not None:  # last: it may raise KeyboardInterrupt
            self.callback(row)
        return speed

    def solution(self, status: str) -> Solution:
        """The best network, certified where the time or, for a run that was stopped, a moment more allows."""
        assert self.network is not None
        certificate = multipliers = None
        try:
            with limits.grace():
                certificate, multipliers = self._certified(self.network)
        except limits.STOPS as stop:
            ended = limits.status(stop)
            status = ended if status not in ENDED_EARLY else status
        return Solution(
            value=self.best if certificate is None else certificate.value,
            gap=math.inf if certificate is None else certificate.gap,
            status=status,
            message=message(status, f"metric speed {self.history[-1]['speed']:.2g}", certified=certificate is not None),
            network=self.network,
            point=repopulation.to_program(self.network.detach()),
            history=self.history,
            certificate=certificate,
            multipliers=multipliers,
            seconds=self.seconds(),
        )

    def _certified(self, network: ParticleNetwork) -> tuple[Certificate, Multipliers]:
        program = ConvexProgram.freeze(self.problem, network)
        limits.look()
        point = program.point(network)
        multipliers = certificates.stationary_multipliers(program.to(dtype=torch.float64), point.map(Tensor.double))
        limits.look()
        return certificates.certify(program, point, multipliers), multipliers
