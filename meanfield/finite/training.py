"""Training of finite networks on the objective J of a Problem: SGD or Adam, batches, schedules, bounds by projection,
noise, resuming.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from meanfield import limits, validation
from meanfield.finite.network import FiniteCNN
from meanfield.finite.scaling import SCALINGS, Scaling, registered
from meanfield.network import ParticleNetwork
from meanfield.precision import full_float32
from meanfield.problem import Problem, project_bounds
from meanfield.signatures import Count, Nonnegative, Positive, Seed, checked
from meanfield.starts import normal
from meanfield.storage.states import StateFile, described, ended
from meanfield.storage.tensors import digest
from meanfield.validation import Misuse, choice, path

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}
TIME_TOLERANCE = 1e-9  # relative; the rounding of a sum of up to a million learning rates is below it
RECORDS = 100  # of a run, by default
BLOW_UP = 1e6  # a run whose J exceeds this many times its start (and 1) is taken as lost
STATUS_TEXTS = {
    "completed": "all steps were taken",
    "interrupted": "stopped by the user; the best network so far is kept",
    "max_seconds": "stopped at the time limit; the best network so far is kept",
    "diverged": "the objective left all bounds; the best network so far is kept, lower the learning rate",
}


@dataclass(frozen=True, eq=False)
class Training:
    """A trained finite network.

    network: the one of the smallest objective among those recorded, the start included.  value: its objective J_m on
    all images, at uniform masses.  history: one dict per record: step, value, the terms loss, source, readout, input,
    the learning rate of the next step and the seconds so far.  steps: optimiser steps taken.  status: a key of
    STATUS_TEXTS.  checkpoints: (flow time reached, network) for every time asked for that the run came to.
    """

    network: FiniteCNN
    value: float
    history: list[dict[str, Any]] = field(repr=False)
    steps: int
    seconds: float
    status: str
    message: str
    checkpoints: tuple[tuple[float, FiniteCNN], ...] = field(default=(), repr=False)


@checked
@torch.inference_mode(False)
@full_float32()
def train(
    problem: Problem,
    widths: Sequence[int],
    seed: Seed = 0,
    *,
    scaling: Annotated[str | Scaling, registered] = "mean_field",
    optimiser: Annotated[str, choice(OPTIMISERS)] = "adam",
    learning_rate: Positive | None = None,
    steps: Count = 2000,
    batch_size: Count | None = None,
    shuffle: bool = True,
    schedule: Annotated[str, choice(SCHEDULES)] = "cosine",
    noise: Nonnegative = 0.0,
    start: str | ParticleNetwork | FiniteCNN = "random",
    checkpoints: Sequence[float] = (),
    state: Annotated[str | Path, path] | None = None,
    state_every: Count = 1000,
    record_every: Count | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> Training:
    """Train a finite CNN of the given widths on problem's J, its penalties taken at uniform masses.

    scaling: "mean_field", "ntk", "standard", "mup" or a Scaling, see FiniteCNN.  In the mean-field scaling gradients
        are divided by the masses 1/m of their particles (the metric of the particle flow), so that a step does not
        vanish with the width; in "mup" every layer has its own learning rate, see `layer_rates`.
    learning_rate: default that of the scaling: 0.05, 0.03, 0.01, 0.01 for Adam in these four, 0.5, 0.5, 0.05, 0.2 for
        SGD.
    batch_size: images per step, None for all; shuffled anew every epoch, or in file order with shuffle=False.
    schedule: "cosine" (to zero over `steps`) or "constant".
    noise: temperature tau of noisy SGD in the mean-field scaling: after a step every kernel, bias and readout entry
    gets
        an independent normal of variance 2 tau learning_rate (Mei, Montanari & Nguyen 2018, noisy SGD with 1/beta =
        tau).
    start: "random" (`FiniteCNN.random` from `seed`), or a network of these widths with uniform masses.
    checkpoints: increasing flow times at which a copy of the network is kept, at the first step that reaches them.
    Flow
        time is the sum of the learning rates of the steps taken, 0 at the start: for SGD in the mean-field scaling the
        time of the particle gradient flow, whatever the schedule; otherwise a clock only.
    state: file (.safetensors) to which the whole state of the run is written every `state_every` steps.  A call with
    the
        same arguments continues from it and ends, on the same machine and as many threads, with the same bits as a run
        without a pause (seconds excepted).  It is removed when the run ends by itself, and refused (ValueError) where
        it is damaged or of other arguments or data.
    record_every: steps between two records, each of which evaluates J on all images (default: 100 records a run).
    callback: called with every record of the history; after a resumption from the saved step on.

    The bounds of the penalty hold at every step: parameters are projected on them, in the metric of SGD in the scaling
    at hand, so that SGD rests where no direction within the bounds lowers J.  Adam, whose steps have a metric of their
    own for every entry, keeps the bounds and may rest elsewhere on them.  A start that breaks a bound is projected if
    it is random and refused (ValueError) if it was given.  Divergence, an interrupt from the keyboard and a limit
    (`limits.within`) end the run with a status.  dtype and device are those of the inputs.
    """
    rule = registered(scaling)
    settings = _Settings(optimiser, rule, learning_rate, steps, schedule, noise, checkpoints, record_every)
    problem.require_whole("finite.train")
    generator = torch.Generator().manual_seed(seed)
    batches = _Batches(len(problem.inputs), batch_size, shuffle, generator)
    run = _Run(problem, _start(problem, widths, generator, rule, start), settings, batches, callback)
    choices = {
        "seed": seed,
        "widths": run.network.widths,
        "scaling": rule.described(problem.architecture, run.network.widths, optimiser),
        "batch_size": batches.size,
        "shuffle": shuffle,
        "start": _named(start),
    }
    file = None if state is None else StateFile(state, {**described(problem), **settings.described, **choices})
    run.restore(None if file is None else file.load())
    return run.result(ended(file, lambda: _descend(run, file, state_every)))


def log_spaced_times(first: float, last: float, count: int) -> tuple[float, ...]:
    """`count` >= 2 times from `first` to `last`, both included, each the same multiple of the one before."""
    first, last, count = (
        validation.positive(first, "first"),
        validation.positive(last, "last"),
        validation.integer(count, "count", minimum=2),
    )
    if last <= first:
        raise Misuse("last", last, f"must be greater than first={first:g}")
    return (*(first * (last / first) ** (k / (count - 1)) for k in range(count - 1)), last)


class _Settings:
    """What decides the course of a run, checked: optimiser, learning rate at every step, steps, noise, checkpoints."""

    def __init__(
        self,
        optimiser: str,
        scaling: Scaling,
        learning_rate: float | None,
        steps: int,
        schedule: str,
        noise: float = 0.0,
        checkpoints: Sequence[float] = (),
        record_every: int | None = None,
    ) -> None:
        self.optimiser, self.shape = OPTIMISERS[optimiser], SCHEDULES[schedule]
        self.peak = scaling.rates[optimiser] if learning_rate is None else learning_rate
        self.steps, self.noise = steps, noise
        if self.noise and (optimiser, scaling) != ("sgd", SCALINGS["mean_field"]):
            raise Misuse(
                "noise",
                noise,
                f"needs optimiser='sgd' and scaling='mean_field', not {optimiser!r} and {scaling.name!r}: only there "
                "is it the temperature of the particle flow",
            )
        times = _increasing(checkpoints)
        self.checkpoints = _checkpoint_steps(times, self)
        self.described = {
            "optimiser": optimiser,
            "scaling": scaling.name,
            "learning_rate": self.peak,
            "steps": self.steps,
            "schedule": schedule,
        }
        self.record_every = max(1, self.steps // RECORDS) if record_every is None else record_every
        self.described |= {"noise": self.noise, "checkpoints": times, "record_every": self.record_every}

    def rate(self, step: int) -> float:
        return self.peak * self.shape(step / self.steps)


def _increasing(times: Sequence[float]) -> list[float]:
    if isinstance(times, str) or not isinstance(times, Iterable):
        raise Misuse("checkpoints", times, "must be a sequence of flow times")
    found = [validation.nonnegative(moment, "checkpoints") for moment in times]
    if any(later <= earlier for earlier, later in itertools.pairwise(found)):
        raise Misuse("checkpoints", tuple(found), "must be increasing flow times")
    return found


def _checkpoint_steps(times: Sequence[float], settings: _Settings) -> list[tuple[int, float]]:
    """(k, t_k) for every time t: the first step k with t_k = sum_(s < k) rate(s) >= t, up to rounding."""
    if not times:
        return []
    reached = list(itertools.accumulate(map(settings.rate, range(settings.steps)), initial=0.0))
    # 0.1 + 0.1 + 0.1 is not 3 * 0.1: without the tolerance an exact multiple of the rate could miss its step
    found = [bisect.bisect_left(reached, moment * (1 - TIME_TOLERANCE)) for moment in times]
    if found[-1] > settings.steps:
        raise Misuse(
            "checkpoints",
            tuple(times),
            f"go beyond the total flow time {reached[-1]:.6g} of the {settings.steps} steps: choose times up to it, "
            f"more steps or a larger learning_rate than {settings.peak:g}",
        )
    return [(step, reached[step]) for step in found]


class _Run:
    """A network in training with all that its course depends on, the best network so far and the history."""

    def __init__(
        self,
        problem: Problem,
        network: FiniteCNN,
        settings: _Settings,
        batches: _Batches,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.problem, self.network, self.settings, self.batches, self.callback = (
            problem,
            network,
            settings,
            batches,
            callback,
        )
        self.optimiser = _optimiser(network, settings)
        self.history: list[dict[str, Any]] = []
        self.checkpoints: list[tuple[float, FiniteCNN]] = []
        self.steps, self.began = 0, time.perf_counter()
        self.best, self.best_value = copy.deepcopy(network), math.inf

    @torch.no_grad()
    def record(self) -> float:
        """Append J on all images and its terms to the history, keep the network if it is the best; returns J."""
        terms = self.problem.terms(self.network.particles())
        value = float(terms.total())
        if value < self.best_value:
            self.best_value, self.best = value, copy.deepcopy(self.network)
        figures = terms.figures()
        rate = self.settings.rate(self.steps)
        self.history.append(
            {"step": self.steps, "value": value, **figures, "learning_rate": rate, "seconds": self.seconds}
        )
        if self.callback is not None:
            self.callback(self.history[-1])
        return value

    def keep(self) -> None:
        """Copy the network for every checkpoint that falls on this step."""
        for step, moment in self.settings.checkpoints:
            if step == self.steps:
                self.checkpoints.append((moment, copy.deepcopy(self.network)))

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def result(self, status: str) -> Training:
        with torch.no_grad(), limits.grace(math.inf):
            value = float(self.problem.value(self.best.particles()))
        message = f"J = {value:.6g} after {self.steps} steps: {STATUS_TEXTS[status]}"
        return Training(
            self.best, value, self.history, self.steps, self.seconds, status, message, tuple(self.checkpoints)
        )

    def state(self) -> dict[str, Any]:
        """What `restore` continues from; gradients are not kept, they are taken anew at every step."""
        return {
            "network": self.network.state_dict(),
            "best": self.best.state_dict(),
            "best_value": self.best_value,
            "checkpoints": [(moment, kept.state_dict()) for moment, kept in self.checkpoints],
            "optimiser": self.optimiser.state_dict()["state"],
            "generator": self.batches.generator.get_state(),
            "order": self.batches.order,
            "position": self.batches.position,
            "steps": self.steps,
            "history": self.history,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from what `state` returned; from the start if None."""
        if state is None:
            return
        self.network.load_state_dict(state["network"])
        self.best.load_state_dict(state["best"])
        self.checkpoints = [(moment, copy.deepcopy(self.network)) for moment, _ in state["checkpoints"]]
        for (_, checkpoint), (_, kept) in zip(self.checkpoints, state["checkpoints"]):
            checkpoint.load_state_dict(kept)
        moments = {int(index): entry for index, entry in state["optimiser"].items()}
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": moments})
        self.batches.order, self.batches.position = state["order"], state["position"]
        self.batches.generator.set_state(state["generator"])
        self.steps, self.best_value, self.history = state["steps"], state["best_value"], state["history"]
        self.began -= state["seconds"]


def _named(start: str | ParticleNetwork | FiniteCNN) -> str:
    """A given start by its entries: equal networks are the same argument."""
    if isinstance(start, str):
        return start
    return digest((start.particles() if isinstance(start, FiniteCNN) else start).tensors())


def _descend(run: _Run, file: StateFile | None, state_every: int) -> str:
    """All steps that are left; returns the status."""
    settings = run.settings
    if not run.history:
        run.record()
        run.keep()
    ceiling = BLOW_UP * max(1.0, run.history[0]["value"])
    while run.steps < settings.steps:
        limits.look()
        _step(run)
        run.keep()
        # J is watched only where it is recorded: reading it at every step would wait for the device
        if run.steps % settings.record_every == 0 or run.steps == settings.steps:
            value = run.record()
            if not value <= ceiling:  # also true for NaN
                return "diverged"
        if file is not None and run.steps % state_every == 0 and run.steps < settings.steps:
            file.save(run.state())
    return "completed"


def layer_rates(network: FiniteCNN, optimiser: str) -> dict[str, float]:
    """Learning rates of the parameters, by name, as multiples of the one given: 1 in the named scalings except "mup".

    Yang & Hu 2021 at base width B = BASE_WIDTH, for hidden kernels from m' to m channels:

                 first kernel   bias of width m   hidden kernel   readout
        "adam"   1              1                 B/m'            B/m_L
        "sgd"    m_1/B          m/B               m/m'            B/m_L

    Every layer then changes features and output by order one at every width.  Adam changes every entry by about its
    rate, and g_j and F sum m' and m_L entries that change with the same sign as their features.  For SGD write
    v_ij = m' w_ij for the parameters of the same function in the mean-field scaling, so dJ/dw = m' dJ/dv and
    dv = -m'^2 rate dJ/dv.  The particle flow, whose course depends on the measures only, is dv = -m m' dJ/dv, hence
    rate = m/m'.  So too the others: dz = -m_1 dJ/dz and db = -m dJ/db (nothing is summed over a width), and with
    v = m_L u, dv = -m_L dJ/dv: rate = 1/m_L.  The powers of B make all factors 1 at widths B.
    """
    return network.scaling.layer_rates(network.architecture, network.widths, optimiser)


def _optimiser(network: FiniteCNN, settings: _Settings) -> torch.optim.Optimizer:
    """One group of parameters per learning rate, its multiple of the common one under "factor"."""
    groups: dict[float, list[Tensor]] = {}
    factors = layer_rates(network, settings.described["optimiser"])
    for name, parameter in network.named_parameters():
        groups.setdefault(factors[name], []).append(parameter)
    tuned = [{"params": found, "factor": factor} for factor, found in groups.items()]
    return settings.optimiser(tuned, lr=settings.peak)


def _step(run: _Run) -> None:
    """One gradient step on the next batch, the noise, then the projection on the bounds."""
    rate, indices, optimiser = run.settings.rate(run.steps), next(run.batches), run.optimiser
    batch = run.problem if indices is None else run.problem.batch(indices.to(run.problem.inputs.device))
    for group in optimiser.param_groups:
        group["lr"] = rate * group["factor"]
    optimiser.zero_grad(set_to_none=True)
    _pull_back(batch, run.network)
    _scale_gradients(run.network)
    optimiser.step()
    if run.settings.noise:
        _disturb(run.network, math.sqrt(2 * run.settings.noise * rate), run.batches.generator)
    _project(run.network, run.problem)
    run.steps += 1


def _pull_back(problem: Problem, network: FiniteCNN) -> None:
    """The gradient of J in the parameters, in blocks of images."""
    particles = network.particles(attached=True)
    _, slopes = problem.pulled_back(particles)
    moved = [pair for pair in zip(particles.tensors(), slopes) if pair[0].requires_grad]
    penalties = torch.stack(problem.prices(particles)).sum()
    torch.autograd.backward([penalties, *(tensor for tensor, _ in moved)], [None, *(slope for _, slope in moved)])


@torch.no_grad()
def _disturb(network: FiniteCNN, deviation: float, generator: torch.Generator) -> None:
    """Independent normals of the given deviation on every parameter (one Euler-Maruyama step of the Langevin
    diffusion).
    """
    for parameter in network.parameters():
        parameter.add_(normal(parameter.shape, generator, parameter), alpha=deviation)


def _scale_gradients(network: FiniteCNN) -> None:
    """Gradients as the optimiser is to see them."""
    factors = network.scaling.gradient_factors(network.architecture, network.widths)
    for name, parameter in network.named_parameters():
        if parameter.grad is not None and factors[name] != 1:
            parameter.grad.mul_(factors[name])


@torch.no_grad()
def _project(network: FiniteCNN, problem: Problem) -> None:
    """Nearest network that keeps the bounds of the penalty, in the metric whose gradient descent SGD is.

    A step of rate r on a parameter w = z / c moves z by r c^2 dJ/dz, so that it is one of length r c^2 on z.  All
    kernels into a feature share one length, by which no nearest point changes; a bias of the first layer has another.
    """
    penalty = problem.penalty
    if penalty.input_bound is None and penalty.amplitude_bound is None:
        return
    lengths = _step_lengths(network)
    kernel = lengths["kernels.0"] * network.mean_field_factors[0] ** 2
    bias_steps = lengths.get("bias_parameters.0", 1.0) / kernel
    nearest = project_bounds(problem, network.particles(), input_bias_steps=bias_steps)
    for parameter, kernel, factor in zip(network.kernels, nearest.kernels, network.mean_field_factors):
        parameter.copy_(kernel / factor)
    for parameter, bias in zip(network.biases, nearest.biases):
        if parameter is not None and bias is not None:
            parameter.copy_(bias)


def _step_lengths(network: FiniteCNN) -> dict[str, float]:
    """By how much a step of SGD at rate 1 multiplies the gradient of each parameter."""
    factors = network.scaling.gradient_factors(network.architecture, network.widths)
    return {name: rate * factors[name] for name, rate in layer_rates(network, "sgd").items()}


def _start(
    problem: Problem,
    widths: Sequence[int],
    generator: torch.Generator,
    scaling: Scaling,
    start: str | ParticleNetwork | FiniteCNN,
) -> FiniteCNN:
    widths = validation.widths(widths, problem.architecture.depth)
    if isinstance(start, str):
        validation.one_of(start, "start", ("random",))
        network = FiniteCNN.random(problem.architecture, widths, problem.inputs, generator, scaling)
        _project(network, problem)
        return network
    if not isinstance(start, (ParticleNetwork, FiniteCNN)):
        raise TypeError(f"start must be 'random', a ParticleNetwork or a FiniteCNN, not {type(start).__name__}")
    if start.widths != widths:
        raise Misuse("widths", widths, f"differ from those of start, {start.widths}")
    particles = start.particles() if isinstance(start, FiniteCNN) else start
    problem.require_feasible(particles)
    return FiniteCNN.from_particles(particles, scaling)


class _Batches:
    """Endless batches of indices, epoch after epoch, the last of an epoch shorter where need be;
    None means all images.
    """

    def __init__(self, count: int, batch_size: int | None, shuffle: bool, generator: torch.Generator) -> None:
        if batch_size is not None and batch_size > count:
            raise Misuse("batch_size", batch_size, f"is more than the {count} images; use None for all of them")
        self.size = batch_size
        self.shuffle, self.generator = shuffle, generator
        self.order, self.position = torch.arange(count), count  # as if an epoch had just ended

    def __next__(self) -> Tensor | None:
        if self.size is None:
            return None
        if self.position >= len(self.order):
            self.position = 0
            self.order = torch.randperm(len(self.order), generator=self.generator) if self.shuffle else self.order
        indices = self.order[self.position : self.position + self.size]
        self.position += self.size
        return indices
