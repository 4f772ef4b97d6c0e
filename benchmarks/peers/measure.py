"""Classifiers of the same images, from linear to continuous: accuracy on images held out, and CPU seconds.

What the linear classifier and the kernel are free to choose, their strength of regularisation, is chosen by the last
fifth of the training images; then they are fitted to all of them.  The three networks share layers, objective, start
and number of minibatches and choose nothing.  The kernel is that of one ReLU layer, 3x3, averaged over 2x2 positions
and flattened, on images averaged over KERNEL_POOL^2 pixels: N^2 pairs of images times pairs of positions is what it
costs.  One thread; the program's seconds are on top of the flow's, which it starts from.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

import meanfield as mf
from benchmarks import machine
from benchmarks.options import BenchmarkOptions
from meanfield import starts
from meanfield.bench import reading
from meanfield.bench.options import DATA, MODEL, WORK, Data, Seed, at_least, option
from meanfield.bench.task import Task
from meanfield.data import Dataset
from meanfield.finite import kernel
from meanfield.losses import accuracy
from meanfield.network import ParticleNetwork
from meanfield.solvers import flow, splitting
from meanfield.validation import Misuse

# objective and Adam's rate are those of `meanfield solve`
SOURCE, READOUT, INPUT, BATCH, ADAM_RATE = 3e-5, 5e-4, 3e-5, 100, 0.15
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C of the linear classifier
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2)  # times the mean of the kernel's diagonal
KERNEL_POOL = 2


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    data: Data = "mnist"
    samples: Annotated[int, option("Training images; the others are held out.", DATA), at_least(20)] = 4000
    width: Annotated[int, option("Particles or channels in each of the two layers.", MODEL), at_least(1)] = 64
    steps: Annotated[int, option("Minibatches of 100 images that each network learns from.", WORK), at_least(1)] = 1500
    seed: Seed = 0


def run(options: Options, report: Callable[[str], None]) -> dict[str, Any]:
    """Every figure of the benchmark, ready for JSON."""
    images = reading.images(options.data, None, options.samples)
    held_out = len(_held_out(images))
    small = reading.images(options.data, None, options.samples, KERNEL_POOL)
    rows = []
    with machine.one_thread():
        for measure in (
            lambda: [linear(images)],
            lambda: [tangent_kernel(small)],
            lambda: [finite_network(images, options)],
            lambda: continuous(images, options),
        ):
            for row in measure():
                report(f"{row['contender']}: {row['held_out']:.1%} in {row['cpu_seconds']:.0f} CPU s")
                rows.append(row)
    return {"images": len(images), "held_out_images": held_out, "rows": rows}


def linear(images: Dataset) -> dict[str, Any]:
    """Multinomial logistic regression with an l2 penalty."""
    began = time.process_time()
    first, last = _parted(len(images))
    rows, labels = images.inputs.flatten(1).numpy(), images.labels.numpy()
    fit = lambda strength, part: LogisticRegression(C=strength, max_iter=1000).fit(rows[part], labels[part])  # noqa: E731
    best = max(STRENGTHS, key=lambda strength: fit(strength, first).score(rows[last], labels[last]))
    found = fit(best, slice(None))
    seconds = time.process_time() - began
    held_out = _held_out(images).inputs.flatten(1).numpy(), _held_out(images).labels.numpy()
    return _row("linear", images, seconds, found.score(rows, labels), found.score(*held_out), strength=best)


def tangent_kernel(images: Dataset) -> dict[str, Any]:
    """Ridge regression of one-hot labels on the convolutional tangent kernel of infinite width."""
    began = time.process_time()
    layer = mf.Conv(3, padding=1, activation="relu", pooling="average")
    architecture = mf.Architecture(images.input_shape, (layer,), readout="flatten", outputs=1)
    count = len(images)
    gram = kernel.infinite(architecture, torch.cat([images.inputs, _held_out(images).inputs]))
    labels = torch.cat([images.indices, _held_out(images).indices])

    def score(ridge: float, fitted: slice, judged: slice) -> float:
        return float((_regressed(gram, labels, ridge, fitted)[judged].argmax(1) == labels[judged]).double().mean())

    first, last = _parted(count)
    best = max(RIDGES, key=lambda ridge: score(ridge, first, last))
    whole = slice(0, count)
    held_out = score(best, whole, slice(count, None))
    seconds = time.process_time() - began
    name = "convolutional tangent kernel, infinite width"
    return _row(name, images, seconds, score(best, whole, whole), held_out, strength=best)


def _regressed(gram: Tensor, labels: Tensor, ridge: float, fitted: slice) -> Tensor:
    """Scores (all images, classes) of the regression on the images `fitted`."""
    targets = functional.one_hot(labels[fitted]).to(gram)
    square = gram[fitted, fitted]
    square = square + ridge * square.diagonal().mean() * torch.eye(len(square), dtype=gram.dtype)
    mean = targets.mean(0)
    return mean + gram[:, fitted] @ torch.cholesky_solve(targets - mean, torch.linalg.cholesky(square))


def finite_network(images: Dataset, options: Options) -> dict[str, Any]:
    """The layers of the continuous network with as many channels of equal mass, trained by Adam on the same J."""
    problem, start = _problem(images), _start(images, options)
    began = time.process_time()
    training = mf.finite.train(
        problem.to(dtype=torch.float32),
        start.widths,
        options.seed,
        start=start.map(Tensor.float),
        steps=options.steps,
        batch_size=min(BATCH, len(images)),
        learning_rate=ADAM_RATE,
    )
    seconds = time.process_time() - began
    return _network_row("finite CNN, Adam", images, seconds, training.network.particles().map(Tensor.double))


def continuous(images: Dataset, options: Options) -> list[dict[str, Any]]:
    """After the particle flow, and after the convex program frozen at its end."""
    problem, start = _problem(images), _start(images, options)
    began = time.process_time()
    flowed = flow.solve(problem, start, steps=options.steps, batch_size=min(BATCH, len(images)), seed=options.seed)
    seconds = time.process_time() - began
    rows = [_network_row("continuous CNN, flow", images, seconds, flowed.network, gap=flowed.gap)]
    program = mf.ConvexProgram.freeze(problem, flowed.network)
    solved = splitting.solve(program, 2e-5)
    seconds = time.process_time() - began
    last = _network_row("continuous CNN, flow and program", images, seconds, solved.network, gap=solved.gap)
    return [*rows, last]


def _held_out(images: Dataset) -> Dataset:
    if images.rest is None:
        raise Misuse("samples", len(images), "leaves no image to be held out")
    return images.rest


def _problem(images: Dataset) -> mf.Problem:
    task = Task(pooling="average", readout="flatten", loss="softmax", source_penalty=SOURCE, input_penalty=INPUT)
    positions = task.architecture(images).readout_positions
    return task.variant(readout_penalty=READOUT / positions**2).problem(images)


def _start(images: Dataset, options: Options) -> ParticleNetwork:
    generator = torch.Generator().manual_seed(options.seed)
    return starts.draw(_problem(images), (options.width, options.width), generator, "low_rank")


def _parted(count: int) -> tuple[slice, slice]:
    """The images that a strength is fitted to, and those that choose it."""
    return slice(0, count - count // 5), slice(count - count // 5, count)


def _network_row(name: str, images: Dataset, seconds: float, network: ParticleNetwork, **more: Any) -> dict[str, Any]:
    problem = _problem(images)
    scores = [
        accuracy(problem.loss, network(each.inputs), each.targets("softmax")) for each in (images, _held_out(images))
    ]
    return _row(name, images, seconds, *scores, value=float(problem.value(network)), **more)


def _row(name: str, images: Dataset, seconds: float, training: float, held_out: float, **more: Any) -> dict[str, Any]:
    size = f"{images.input_shape[1]}x{images.input_shape[2]}"
    return {
        "contender": name,
        "pixels": size,
        "cpu_seconds": seconds,
        "training": float(training),
        "held_out": float(held_out),
        **more,
    }
