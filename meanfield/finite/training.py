"""Training of finite networks on the objective J of a Problem: SGD or Adam, batches, schedules, bounds by projection."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from meanfield import validation
from meanfield.finite.network import SCALINGS, FiniteCNN
from meanfield.network import ParticleNetwork
from meanfield.penalties import input_norms, shrinkage_root
from meanfield.problem import Problem

OPTIMISERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
LEARNING_RATES = {
    ("adam", "mean_field"): 5e-2,
    ("adam", "ntk"): 3e-2,
    ("adam", "standard"): 1e-2,
    ("sgd", "mean_field"): 5e-1,
    ("sgd", "ntk"): 5e-1,
    ("sgd", "standard"): 5e-2,
}
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}
RECORDS = 100  # J on all images is evaluated about this many times in a run
BLOW_UP = 1e6  # a run whose J exceeds this many times its start (and 1) is taken as lost
STATUS_TEXTS = {
    "completed": "all steps were taken",
    "interrupted": "stopped by the user; the best network so far is kept",
    "diverged": "the objective left all bounds; the best network so far is kept, lower the learning rate",
}


@dataclass(frozen=True, eq=False)
class Training:
    """A trained finite network.

    network: the one of the smallest objective among those recorded, the start included.  value: its objective J_m on
    all images, at uniform masses.  history: one dict per record: step, value, the terms loss, source, readout, input,
    the learning rate of the next step and the seconds so far.  steps: optimiser steps taken.  status: a key of
    STATUS_TEXTS.
    """

    network: FiniteCNN
    value: float
    history: list[dict[str, Any]] = field(repr=False)
    steps: int
    seconds: float
    status: str
    message: str


def train(
    problem: Problem,
    widths: Sequence[int],
    seed: int = 0,
    *,
    scaling: str = "mean_field",
    optimiser: str = "adam",
    learning_rate: float | None = None,
    steps: int = 2000,
    batch_size: int | None = None,
    shuffle: bool = True,
    schedule: str = "cosine",
    start: str | ParticleNetwork | FiniteCNN = "random",
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Training:
    """Train a finite CNN of the given widths on problem's J, its penalties taken at uniform masses.

    scaling: "mean_field", "ntk" or "standard", see FiniteCNN.  In the mean-field scaling gradients are divided by the
        masses 1/m of their particles (the metric of the particle flow), so that a step does not vanish with the width.
    learning_rate: default 0.05, 0.03, 0.01 for Adam in the three scalings and 0.5, 0.5, 0.05 for SGD.
    batch_size: images per step, None for all; shuffled anew every epoch, or in file order with shuffle=False.
    schedule: "cosine" (to zero over `steps`) or "constant".
    start: "random" (`FiniteCNN.random` from `seed`), or a network of these widths with uniform masses.
    callback: called with every record of the history.

    The bounds of the penalty hold at every step: parameters are projected on them.  A start that breaks a bound is
    projected if it is random and refused (ValueError) if it was given.  Divergence and an interrupt from the keyboard
    end the run with a status.  dtype and device are those of the problem's inputs.
    """
    settings = _Settings(optimiser, scaling, learning_rate, steps, schedule)
    generator = torch.Generator().manual_seed(validation.integer(seed, "seed", minimum=0))
    batches = _batches(len(problem.inputs), batch_size, shuffle, generator)
    network = _start(problem, widths, generator, scaling, start)
    run = _Run(problem, network, callback)
    try:
        status = _descend(run, settings, batches)
    except KeyboardInterrupt:
        status = "interrupted"
    return run.result(status)


class _Settings:
    """The optimiser, its learning rate at every step and the number of steps, checked."""

    def __init__(self, optimiser: str, scaling: str, learning_rate: float | None, steps: int, schedule: str) -> None:
        self.optimiser = OPTIMISERS[validation.one_of(optimiser, OPTIMISERS, "optimiser")]
        validation.one_of(scaling, SCALINGS, "scaling")
        self.peak = LEARNING_RATES[optimiser, scaling] if learning_rate is None else validation.positive(learning_rate, "learning_rate")
        self.steps = validation.integer(steps, "steps")
        self.shape = SCHEDULES[validation.one_of(schedule, SCHEDULES, "schedule")]

    def rate(self, step: int) -> float:
        return self.peak * self.shape(step / self.steps)


class _Run:
    """A network in training, the best one so far and the history."""

    def __init__(self, problem: Problem, network: FiniteCNN, callback: Callable[[dict[str, Any]], None] | None) -> None:
        self.problem, self.network, self.callback = problem, network, callback
        self.history: list[dict[str, Any]] = []
        self.steps, self.began = 0, time.perf_counter()
        self.best, self.best_value = copy.deepcopy(network), math.inf

    @torch.no_grad()
    def record(self, rate: float) -> float:
        """Append J on all images and its terms to the history, keep the network if it is the best; returns J."""
        terms = self.problem.terms(self.network.particles())
        value = float(terms.total())
        if value < self.best_value:
            self.best_value, self.best = value, copy.deepcopy(self.network)
        figures = {name: float(term) for name, term in terms._asdict().items()}
        self.history.append({"step": self.steps, "value": value, **figures, "learning_rate": rate, "seconds": self.seconds})
        if self.callback is not None:
            self.callback(self.history[-1])
        return value

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def result(self, status: str) -> Training:
        value = float(self.problem.value(self.best.particles()))
        message = f"J = {value:.6g} after {self.steps} steps: {STATUS_TEXTS[status]}"
        return Training(self.best, value, self.history, self.steps, self.seconds, status, message)


def _descend(run: _Run, settings: _Settings, batches: Iterator[Tensor | None]) -> str:
    """All steps; returns the status."""
    optimiser = settings.optimiser(run.network.parameters(), lr=settings.peak)  # type: ignore[call-arg]
    every = max(1, settings.steps // RECORDS)
    ceiling = BLOW_UP * max(1.0, run.record(settings.rate(0)))
    for step in range(settings.steps):
        optimiser.param_groups[0]["lr"] = settings.rate(step)
        _step(run, optimiser, next(batches))
        run.steps = step + 1
        # J is watched only where it is recorded: reading it at every step would wait for the device
        if run.steps % every == 0 or run.steps == settings.steps:
            value = run.record(settings.rate(run.steps))
            if not value <= ceiling:  # also true for NaN
                return "diverged"
    return "completed"


def _step(run: _Run, optimiser: torch.optim.Optimizer, indices: Tensor | None) -> None:
    """One gradient step on the images `indices` (all for None), then the projection on the bounds."""
    batch = run.problem if indices is None else run.problem.batch(indices.to(run.problem.inputs.device))
    optimiser.zero_grad(set_to_none=True)
    batch.terms(run.network.particles(attached=True)).total().backward()
    if run.network.scaling == "mean_field":
        _divide_by_masses(run.network)
    optimiser.step()
    _project(run.network, run.problem)


def _divide_by_masses(network: FiniteCNN) -> None:
    """The metric of the particle gradient flow (Chizat & Bach 2018) at masses p = 1/m:

    dz_i/dt = -(1/p_i) dJ/dz_i,  dw_ij/dt = -(1/(p_i p_j)) dJ/dw_ij,  du_j/dt = -(1/p_j) dJ/du_j.
    """
    sources = (1, *network.widths[:-1])
    for kernel, bias, source, target in zip(network.kernels, network.biases, sources, network.widths):
        for parameter, factor in ((kernel, source * target), (bias, target)):
            if parameter is not None and parameter.grad is not None:
                parameter.grad.mul_(factor)
    if network.readout.grad is not None:
        network.readout.grad.mul_(network.widths[-1])


@torch.no_grad()
def _project(network: FiniteCNN, problem: Problem) -> None:
    """Nearest network, in the metric of the particle flow, that keeps the bounds of the penalty."""
    penalty = problem.penalty
    if penalty.input_bound is None and penalty.amplitude_bound is None:
        return
    particles = network.particles()
    if penalty.input_bound is not None:
        norms = input_norms(particles.kernels[0], particles.biases[0])
        factors = penalty.input_bound / norms.clamp_min(penalty.input_bound)
        network.kernels[0].mul_(factors[:, None, None, None])
        if network.biases[0] is not None:
            network.biases[0].mul_(factors)
    if penalty.amplitude_bound is not None:
        for layer in range(1, problem.architecture.depth):
            _project_amplitudes(network, particles, layer, problem)


def _project_amplitudes(network: FiniteCNN, particles: ParticleNetwork, layer: int, problem: Problem) -> None:
    """min sum_i p_i |w_ij - .|^2 subject to sum_i p_i |w_ij| <= B shrinks every |w_ij| by one threshold per target j."""
    bound = float(problem.penalty.amplitude_bound or 0)
    kernels, bias = particles.kernels[layer], network.biases[layer]
    masses = particles.masses[layer - 1][None, :, None]
    threshold = shrinkage_root(problem.penalty.atoms(kernels), 1.0, masses, (1, 2), level=bound)
    shrunk = problem.penalty.shrink(kernels, threshold)
    network.kernels[layer].copy_(shrunk / network.mean_field_factors[layer])
    if bias is not None:
        bias.clamp_(-bound, bound)


def _start(
    problem: Problem, widths: Sequence[int], generator: torch.Generator, scaling: str, start: str | ParticleNetwork | FiniteCNN
) -> FiniteCNN:
    widths = validation.widths(widths, problem.architecture.depth)
    if isinstance(start, str):
        validation.one_of(start, ("random",), "start")
        network = FiniteCNN.random(problem.architecture, widths, problem.inputs, generator, scaling)
        _project(network, problem)
        return network
    if not isinstance(start, (ParticleNetwork, FiniteCNN)):
        raise TypeError(f"start must be 'random', a ParticleNetwork or a FiniteCNN, not {type(start).__name__}")
    if start.widths != widths:
        raise ValueError(f"widths={widths} differ from those of start, {start.widths}")
    particles = start.particles() if isinstance(start, FiniteCNN) else start
    problem.require_feasible(particles)
    return FiniteCNN.from_particles(particles, scaling)


def _batches(count: int, batch_size: int | None, shuffle: bool, generator: torch.Generator) -> Iterator[Tensor | None]:
    """Endless batches of indices, epoch after epoch, the last of an epoch shorter where need be; None means all images."""
    if not isinstance(shuffle, bool):
        raise ValueError(f"shuffle={shuffle!r} must be True or False")
    if batch_size is not None and validation.integer(batch_size, "batch_size") > count:
        raise ValueError(f"batch_size={batch_size} is more than the {count} images; use None for all of them")
    return _epochs(count, batch_size, shuffle, generator)


def _epochs(count: int, batch_size: int | None, shuffle: bool, generator: torch.Generator) -> Iterator[Tensor | None]:
    while True:
        if batch_size is None:
            yield None
        else:
            yield from (torch.randperm(count, generator=generator) if shuffle else torch.arange(count)).split(batch_size)
