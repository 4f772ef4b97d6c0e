"""One step of the particle flow against one training step of a plain torch CNN of the same sizes.

The flow's step is the one that `solvers.flow.solve` takes with masses on: propose, velocity (value and gradient of J),
judge.  The plain step is forward, cross-entropy, backward and torch.optim.Adam over nn.Conv2d layers without biases.
Both run in one process on one thread, in alternating blocks, and are timed in CPU seconds; the medians are compared.
Memory is measured in a fresh process per contender: the peak of resident memory over its steps minus what is resident
before them, with the data loaded and after one step of BOTH contenders on a few images.  That step is there because
torch imports tens of MiB of its own modules at the first step of an optimiser, which are not memory of the training.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import meanfield as mf
from benchmarks import machine
from benchmarks.blocks import alternating, cpu_seconds
from benchmarks.machine import forget_peak, peak_bytes
from meanfield import starts
from meanfield.losses import accuracy
from meanfield.solvers import flow

DTYPES = {"float32": torch.float32, "float64": torch.float64}
CONTENDERS = ("flow", "plain")
SPEED_REQUIRED, MEMORY_ALLOWED = 0.7, 2.0
WARM_UP_SAMPLES = 20


@dataclass(frozen=True)
class Settings:
    """Sizes and lengths of the benchmark; penalties are source, readout and input."""

    samples: int = 200
    widths: tuple[int, int] = (64, 64)
    dtypes: tuple[str, ...] = ("float32", "float64")
    repetitions: int = 15
    block: int = 4
    warm_up: int = 10
    memory_steps: int = 20
    training_steps: int = 300
    penalties: tuple[float, float, float] = (3e-5, 3e-5, 3e-5)
    plain_rate: float = 3e-3
    seed: int = 0


class Contender(Protocol):
    def step(self) -> None: ...

    def predict(self, inputs: Tensor) -> Tensor: ...


def load(settings: Settings, dtype: str) -> tuple[mf.Problem, mf.data.Dataset]:
    """The problem on the first images of the ten digits, and the images that are left."""
    chosen, rest = mf.data.load("digits", samples=settings.samples).split()
    layer = mf.Conv(kernel_size=3, padding=1, activation="tanh")
    architecture = mf.Architecture(
        chosen.input_shape, (layer, layer), readout="average", outputs=chosen.outputs_for("softmax")
    )
    source, readout, first = settings.penalties
    penalty = mf.Penalty(source=source, readout=readout, input=first)
    return mf.Problem(
        architecture, chosen.inputs.to(DTYPES[dtype]), chosen.targets("softmax"), "softmax", penalty
    ), rest


class FlowContender:
    """The loop of `solvers.flow.solve` with the preconditioned descent, one step at a time."""

    def __init__(self, problem: mf.Problem, settings: Settings, total: int):
        generator = torch.Generator().manual_seed(settings.seed)
        self.problem = problem
        self.network = starts.start(problem.architecture, settings.widths, problem.inputs, generator, "low_rank")
        self.method = flow.PreconditionedDescent(problem, 0.1, total)
        self.terms, self.velocity = flow.velocity(problem, self.network)

    def step(self) -> None:
        moved = self.method.propose(self.network, self.velocity)
        terms, velocity = flow.velocity(self.problem, moved)
        if not self.method.judge(self.network, moved, float(terms.total() - self.terms.total())):
            raise RuntimeError("the flow's value is not finite")
        self.network, self.terms, self.velocity = moved, terms, velocity

    def predict(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)


class PlainContender:
    """nn.Conv2d, tanh, nn.Conv2d, tanh, mean over positions, nn.Linear; Adam."""

    def __init__(self, problem: mf.Problem, settings: Settings, total: int):
        torch.manual_seed(settings.seed)
        first, second = settings.widths
        self.inputs, self.targets = problem.inputs, problem.targets
        self.network = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1, bias=False),
            nn.Tanh(),
            nn.Conv2d(first, second, 3, padding=1, bias=False),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(second, problem.architecture.outputs, bias=False),
        ).to(self.inputs.dtype)
        self.optimizer = torch.optim.Adam(self.network.parameters(), settings.plain_rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, total)

    def step(self) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.network(self.inputs), self.targets).backward()
        self.optimizer.step()

    def predict(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)


def contender(name: str, problem: mf.Problem, settings: Settings, total: int) -> Contender:
    return {"flow": FlowContender, "plain": PlainContender}[name](problem, settings, total)


def speed(settings: Settings, dtype: str) -> dict[str, Any]:
    """CPU seconds per step of both, in alternating blocks; medians over the blocks and the ratio plain / flow."""
    problem, _ = load(settings, dtype)
    total = settings.warm_up + settings.repetitions * settings.block
    both = {name: contender(name, problem, settings, total) for name in CONTENDERS}
    blocks = alternating(
        {name: each.step for name, each in both.items()}, settings.warm_up, settings.repetitions, settings.block
    )
    medians = {name: statistics.median(seconds) for name, seconds in blocks.items()}
    ratios = [plain / flowed for plain, flowed in zip(blocks["plain"], blocks["flow"])]
    return {
        "seconds_per_step": medians,
        "speed_ratio": medians["plain"] / medians["flow"],
        "block_ratios": sorted(ratios),
    }


def own_memory(name: str, settings: Settings, dtype: str) -> int:
    """Growth of the peak, in bytes, over the steps of one contender; for a process that has done nothing else."""
    torch.set_num_threads(1)
    problem, _ = load(settings, dtype)
    few = replace(settings, samples=WARM_UP_SAMPLES, widths=(2, 2))
    for each in CONTENDERS:
        contender(each, load(few, dtype)[0], few, 1).step()
    gc.collect()
    forget_peak()
    before = peak_bytes()
    cpu_seconds(contender(name, problem, settings, settings.memory_steps).step, settings.memory_steps)
    return peak_bytes() - before


def memory(settings: Settings, dtype: str) -> dict[str, Any]:
    """Peak memory of each in its own process, and the ratio flow / plain."""
    grown = {name: _memory_of(name, settings, dtype) for name in CONTENDERS}
    return {"peak_bytes": grown, "memory_ratio": grown["flow"] / max(1, grown["plain"])}


def _memory_of(name: str, settings: Settings, dtype: str) -> int:
    code = (
        "import json, sys; from benchmarks import flow_step as f; s = json.loads(sys.argv[1]); "
        "print(f.own_memory(s[0], f.from_dict(s[1]), s[2]))"
    )
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    order = json.dumps([name, asdict(settings), dtype])
    done = subprocess.run([sys.executable, "-c", code, order], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the memory measurement of {name!r} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout)


def from_dict(description: dict[str, Any]) -> Settings:
    """Settings from their JSON form."""
    return replace(
        Settings(), **{name: tuple(value) if isinstance(value, list) else value for name, value in description.items()}
    )


def training(settings: Settings, dtype: str) -> dict[str, Any]:
    """Both trained on the same images for the same number of steps, the rate annealed to zero; accuracy on the images
    that are left.
    """
    problem, rest = load(settings, dtype)
    held_out = problem.loss.check_targets(
        rest.targets("softmax"), len(rest), problem.architecture.outputs, like=problem.inputs
    )
    found: dict[str, Any] = {"steps": settings.training_steps, "held_out_images": len(rest)}
    for name in CONTENDERS:
        each = contender(name, problem, settings, settings.training_steps)
        for _ in range(settings.training_steps):
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


def run(settings: Settings) -> dict[str, Any]:
    """Every figure of the benchmark, ready for JSON; training in the first dtype only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        figures = {dtype: {**speed(settings, dtype), **memory(settings, dtype)} for dtype in settings.dtypes}
        trained = training(settings, settings.dtypes[0]) if settings.training_steps else None
    finally:
        torch.set_num_threads(threads)
    for each in figures.values():
        each["fast_enough"] = each["speed_ratio"] >= SPEED_REQUIRED
        each["small_enough"] = each["memory_ratio"] <= MEMORY_ALLOWED
    return {
        "benchmark": "flow_step",
        "settings": asdict(settings),
        "machine": machine.description(),
        "figures": figures,
        "training": trained,
    }
