"""Particle gradient flow: Wasserstein in positions and weights, Fisher-Rao in masses.  Network in, network out.

J falls with dJ/dt = -speed^2, the squared speed in the metric, which is how the integrator of descent="gradient" is
tested and its step adapted.  Plain Euler is a tool for trajectories; descent="preconditioned" takes the same
velocities, scaled by running moments as in Adam, to get to the limit.  `velocities` has the flow, `descents` the two
ways to follow it.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from meanfield import certificates, limits
from meanfield.certificates import Certificate, Multipliers
from meanfield.convex import repopulation
from meanfield.convex.program import ConvexProgram
from meanfield.network import ParticleNetwork
from meanfield.precision import full_float32
from meanfield.problem import Problem, Terms, UncertifiedTerms
from meanfield.signatures import Count, Nonnegative, Positive, Seconds, Seed, checked
from meanfield.solvers import velocities
from meanfield.solvers.descents import Descent, GradientDescent, PreconditionedDescent
from meanfield.solvers.solution import ENDED_EARLY, UNCERTIFIED, Solution, message
from meanfield.solvers.velocities import Tangent, advance, metric_speed, squared_distance, velocity
from meanfield.storage import states
from meanfield.storage.states import StateFile
from meanfield.validation import choice, path

__all__ = ["DESCENTS", "Tangent", "advance", "metric_speed", "solve", "squared_distance", "velocity"]

DESCENTS = ("preconditioned", "gradient")
RECORD_SHARE = 0.2  # of the steps of minibatches, for records on all images
OWN_TERM = "uncertified: the penalty has a term of the user's own, which nothing is proven of"
GLIMPSE = 1.0  # seconds between two looks at where a run is


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
    state_seconds: Seconds = states.STATE_SECONDS,
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
    multipliers; it is infinite, and the message says so, where the penalty has an `uncertified` term.
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
    }
    run = _Run(
        problem,
        network.detach(),
        method,
        _Trail(problem, callback),
        batches,
        masses,
        steps,
        every,
        tolerance,
        states.of_run(state, settings, problem, network),
        state_seconds,
    )
    with full_float32(), limits.within(max_seconds):
        return run.solution()


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
    file: StateFile | None
    state_seconds: float
    step: int = 0
    kept: dict[str, Any] | None = None

    def solution(self) -> Solution:
        """Continue from the file, which is written every `state_seconds` and goes where the run ends by itself."""
        if self.file is not None and (found := self.file.load(self.problem.inputs.device)) is not None:
            self.restore(found)
        status = self.follow()
        self.save()  # its certificate may be broken off as well
        solution = self.trail.solution(status)
        if self.file is not None and solution.status not in ENDED_EARLY:
            self.file.remove()
        return solution

    def save(self) -> None:
        """As of the last place between two steps."""
        if self.file is not None and self.kept is not None:
            self.file.save(self.kept)

    def follow(self) -> str:
        """The status with which the steps ended."""
        try:
            return self._descend()
        except limits.STOPS as stop:
            if self.trail.network is None:
                raise
            return limits.status(stop)

    def _descend(self) -> str:
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
            self.kept = None if self.file is None else self.state()
            if late:
                return "max_seconds"
            if self.step == self.steps:
                return "max_iterations"
            if time.perf_counter() - saved >= self.state_seconds:
                self.save()
                saved = time.perf_counter()
            terms, flow = velocities.velocity(batch, self.network, self.masses) if pulled is None else pulled
            moved = self.method.propose(self.network, flow)
            following = self.batches.at(self.step + 1)
            pulled = velocities.velocity(following, moved, self.masses)
            if ranks.decided(self.method.judge(self.network, moved, pulled[0].total() - terms.total())):
                self.network, batch = moved, following
            elif not isinstance(self.method, GradientDescent) or self.method.step < torch.finfo(moved.dtype).eps:
                return "stalled"
            else:
                pulled = terms, flow
            self.step += 1
            self.trail.glimpse(self.step, self.step * self.batches.each)

    def _whole(self) -> tuple[Terms | UncertifiedTerms, Tangent]:
        """On all images; of the start whatever the time, as it is the least that can be returned."""
        with limits.grace(math.inf) if self.trail.network is None else nullcontext():
            return velocities.velocity(self.problem, self.network, self.masses)

    def _record(self, terms: Terms | UncertifiedTerms, flow: Tangent) -> float:
        speed = self.problem.ranks.decided(velocities.metric_speed(self.problem, self.network, flow))
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
        self,
        step: int,
        images: int,
        network: ParticleNetwork,
        terms: Terms | UncertifiedTerms,
        speed: float,
        method: Descent,
    ) -> float:
        row = {"step": step, "images": images, "seconds": self.seconds(), "time": method.time}
        row["value"] = self.problem.ranks.decided(float(terms.total()))
        if self.network is None:
            self.problem.require_finite(terms.total())
        row |= terms.figures() | {"speed": speed}
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
        own = self.problem.penalty.uncertified is not None
        try:
            with limits.grace():
                if not own:
                    certificate, multipliers = self._certified(self.network)
        except limits.STOPS as stop:
            ended = limits.status(stop)
            status = ended if status not in ENDED_EARLY else status
        return Solution(
            value=self.best if certificate is None else certificate.value,
            gap=math.inf if certificate is None else certificate.gap,
            status=status,
            message=message(
                status,
                f"metric speed {self.history[-1]['speed']:.2g}",
                certified=certificate is not None,
                reason=OWN_TERM if own else UNCERTIFIED,
            ),
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
