"""One step of the particle flow against one training step of a plain torch CNN of the same sizes.

The flow's step is the one that `solvers.flow.solve` takes with masses on: propose, velocity (value and gradient of J),
judge.  The plain step is forward, cross-entropy, backward and torch.optim.Adam over nn.Conv2d layers without biases.
Both run in one process on one thread, in alternating blocks, and are timed in CPU seconds; the medians are compared.
Memory is measured in a fresh process per contender: the peak of resident memory over its steps minus what is resident
before them, with the data loaded and after one step of BOTH contenders on a few images.  That step is there because
torch imports tens of MiB of its own modules at the first step of an optimiser, which are not memory of the training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor, nn

import meanfield as mf
from benchmarks import isolated, plain
from benchmarks.blocks import alternating, cpu_seconds, medians, ratios
from benchmarks.machine import fresh_peak, one_thread, peak_bytes
from benchmarks.options import BenchmarkOptions
from meanfield import starts, validation
from meanfield.bench.options import DTYPES, MODEL, WORK, Samples, Seed, at_least, listing, option
from meanfield.losses import accuracy
from meanfield.solvers import descents, velocities
from meanfield.validation import choices

CONTENDERS = ("flow", "plain")
SPEED_REQUIRED, MEMORY_ALLOWED = 0.7, 2.0
WARM_UP, MEMORY_STEPS = 10, 20  # steps before the timed blocks; steps over which memory is measured
WARM_UP_SAMPLES, WARM_UP_WIDTHS = 20, (2, 2)  # of the steps before memory is measured
PLAIN_RATE = 3e-3


def _two(value: Any, argument: str) -> tuple[int, ...]:
    return validation.widths(value, plain.DEPTH, argument)


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    samples: Samples = 200
    widths: Annotated[tuple[int, ...], listing("Channels of the two layers, separated by a comma.", MODEL), _two] = (
        64,
        64,
    )
    dtypes: Annotated[
        tuple[str, ...],
        listing(
            f"What to measure in: {', '.join(DTYPES)} or both, separated by a comma; accuracies in the first.",
            WORK,
        ),
        choices(DTYPES),
    ] = ("float32", "float64")
    repetitions: Annotated[int, option("Timed blocks of each contender.", WORK), at_least(1)] = 15
    block: Annotated[int, option("Steps in a timed block.", WORK), at_least(1)] = 4
    training_steps: Annotated[
        int, option("Steps before the accuracies are taken; 0: they are left out.", WORK), at_least(0)
    ] = 300
    seed: Seed = 0


class Contender(Protocol):
    def step(self) -> None: ...

    def predict(self, inputs: Tensor) -> Tensor: ...


class FlowContender:
    """The loop of `solvers.flow.solve` with the preconditioned descent, one step at a time."""

    def __init__(self, problem: mf.Problem, options: Options, total: int):
        generator = torch.Generator().manual_seed(options.seed)
        self.problem = problem
        self.network = starts.start(problem.architecture, options.widths, problem.inputs, generator, "low_rank")
        self.method = descents.PreconditionedDescent(problem, 0.1, total)
        self.terms, self.velocity = velocities.velocity(problem, self.network)

    def step(self) -> None:
        moved = self.method.propose(self.network, self.velocity)
        terms, velocity = velocities.velocity(self.problem, moved)
        if not self.method.judge(self.network, moved, terms.total() - self.terms.total()):
            raise RuntimeError("the flow's value is not finite")
        self.network, self.terms, self.velocity = moved, terms, velocity

    def predict(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)


class PlainContender:
    """The same network in torch; Adam."""

    def __init__(self, problem: mf.Problem, options: Options, total: int):
        torch.manual_seed(options.seed)
        self.inputs, self.targets = problem.inputs, problem.targets
        self.network = plain.network(problem, options.widths)
        self.optimizer = torch.optim.Adam(self.network.parameters(), PLAIN_RATE)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, total)

    def step(self) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.network(self.inputs), self.targets).backward()
        self.optimizer.step()

    def predict(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)


def contender(name: str, problem: mf.Problem, options: Options, total: int) -> Contender:
    return {"flow": FlowContender, "plain": PlainContender}[name](problem, options, total)


def speed(options: Options, dtype: str) -> dict[str, Any]:
    """CPU seconds per step of both, in alternating blocks; medians over the blocks and the ratio plain / flow."""
    problem, _ = plain.problem(options.samples, dtype)
    total = WARM_UP + options.repetitions * options.block
    steps = {name: contender(name, problem, options, total).step for name in CONTENDERS}
    blocks = alternating(steps, WARM_UP, options.repetitions, options.block)
    seconds = medians(blocks)
    return {
        "seconds_per_step": seconds,
        "speed_ratio": seconds["plain"] / seconds["flow"],
        "block_ratios": sorted(ratios(blocks, "plain", "flow")),
    }


def memory(options: Options, dtype: str) -> dict[str, Any]:
    """Peak memory of each in its own process, and the ratio flow / plain."""
    order = {"dtype": dtype, "options": options.to_dict()}
    grown = {
        name: isolated.call("benchmarks.flow.measure:own_memory", {"contender": name, **order})["peak_bytes"]
        for name in CONTENDERS
    }
    return {"peak_bytes": grown, "memory_ratio": grown["flow"] / max(1, grown["plain"])}


def own_memory(order: dict[str, Any]) -> dict[str, int]:
    """Growth of the peak, in bytes, over the steps of one contender; for a process that has done nothing else."""
    options, dtype = Options.from_dict(order["options"]), order["dtype"]
    problem, _ = plain.problem(options.samples, dtype)
    few, _ = plain.problem(WARM_UP_SAMPLES, dtype)
    for each in CONTENDERS:
        contender(each, few, options.variant(widths=WARM_UP_WIDTHS), 1).step()
    before = fresh_peak()
    cpu_seconds(contender(order["contender"], problem, options, MEMORY_STEPS).step, MEMORY_STEPS)
    return {"peak_bytes": peak_bytes() - before}


def training(options: Options, dtype: str) -> dict[str, Any]:
    """Both trained on the same images for the same number of steps, the rate annealed to zero; accuracy on the images
    that are left.
    """
    problem, rest = plain.problem(options.samples, dtype)
    held_out = problem.loss.check_targets(
        rest.targets("softmax"), len(rest), problem.architecture.outputs, like=problem.inputs
    )
    found: dict[str, Any] = {"steps": options.training_steps, "held_out_images": len(rest)}
    for name in CONTENDERS:
        each = contender(name, problem, options, options.training_steps)
        for _ in range(options.training_steps):
            each.step()
            if isinstance(each, PlainContender):
                each.schedule.step()
        with torch.no_grad():
            found[name] = {
                "training_accuracy": accuracy(problem.loss, each.predict(problem.inputs), problem.targets),
                "held_out_accuracy": accuracy(
                    problem.loss, each.predict(rest.inputs.to(problem.inputs.dtype)), held_out
                ),
            }
        if isinstance(each, FlowContender):
            found[name]["value"] = float(each.terms.total())
    return found


def run(options: Options, report: Callable[[str], None]) -> dict[str, Any]:
    """Every figure of the benchmark, ready for JSON; training in the first dtype only."""
    figures: dict[str, Any] = {}
    with one_thread():
        for dtype in options.dtypes:
            figures[dtype] = {**speed(options, dtype), **memory(options, dtype)}
            report(f"{dtype}: a step is measured")
        trained = training(options, options.dtypes[0]) if options.training_steps else None
    for each in figures.values():
        each["required"] = {"speed_ratio": SPEED_REQUIRED, "memory_ratio": MEMORY_ALLOWED}
        each["fast_enough"] = each["speed_ratio"] >= SPEED_REQUIRED
        each["small_enough"] = each["memory_ratio"] <= MEMORY_ALLOWED
    return {"figures": figures, "training": trained}
