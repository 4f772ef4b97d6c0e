"""What a graft costs: large layers against the matrix products they need, the number of images, and the whole design
matrix.

Every large graft runs in a process of its own, `threads` threads, images made batch by batch: wall and CPU seconds,
peak memory.  The floor is the time of the products alone, rows x (1 + d + K)^2 x 10/16 multiply-adds in float64 (a
symmetric product in four stripes) at the speed of one large product measured in the same process.  The peer is
numpy.linalg.lstsq on the whole design matrix, made by unfold, on a size that fits; both in alternating blocks in one
process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import isolated
from benchmarks.blocks import alternating, medians
from benchmarks.machine import peak_bytes
from benchmarks.options import BenchmarkOptions, InProcess, Quick
from meanfield.bench.options import DATA, WORK, Device, at_least, option
from meanfield.finite import vgg
from meanfield.grafting import graft

CPU_ALLOWED, GPU_ALLOWED = 300.0, 10.0  # wall seconds of one layer's graft
GROWTH_ALLOWED = 0.02  # of the peak memory, from the first number of images to the last
BATCH = 250


@dataclass(frozen=True)
class Sizes:
    """layers: of VGG-16 at 32x32 with `width` channels first; images of the large runs; memory at each of
    `memory_images`; images and timed blocks of the comparison with the peer.
    """

    layers: tuple[str, ...] = ("conv2", "conv4", "conv9", "conv12")
    images: int = 10_000
    width: int = 64
    memory_layer: str = "conv4"
    memory_images: tuple[int, ...] = (1000, 2000, 4000)
    peer_images: int = 60
    repetitions: int = 5


DEFAULT = Sizes()
QUICK = Sizes(("conv4",), 500, 4, "conv4", (500, 1000), peer_images=10, repetitions=2)


@dataclass(frozen=True, kw_only=True)
class Options(BenchmarkOptions):
    samples: Annotated[
        int | None,
        option(f"Images of the large grafts. Without it: {DEFAULT.images}; with --quick {QUICK.images}.", DATA),
        at_least(1),
    ] = None
    threads: Annotated[int, option("Threads of every graft.", WORK), at_least(1)] = 2
    device: Device = "cpu"
    quick: Quick = False
    in_process: InProcess = False

    @property
    def sizes(self) -> Sizes:
        base = QUICK if self.quick else DEFAULT
        return replace(base, images=self.samples or base.images)


def networks(width: int, device: str = "cpu") -> tuple[nn.Sequential, nn.Sequential]:
    """Two starts: what a graft costs does not depend on training."""
    lower, upper = (
        vgg(16, (3, 32, 32), 10, width=width, generator=torch.Generator().manual_seed(seed)).to(device)
        for seed in (0, 1)
    )
    return lower, upper


def images(count: int, device: str) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(2)
    for first in range(0, count, BATCH):
        yield torch.randn(min(BATCH, count - first), 3, 32, 32, generator=generator).to(device)


def one(order: dict[str, Any]) -> dict[str, Any]:
    """A graft of the order's layer; for `isolated`."""
    torch.set_num_threads(order["threads"])
    device, (lower, upper) = order["device"], networks(order["width"], order["device"])
    began, cpu = time.perf_counter(), time.process_time()
    found = graft(lower, upper, order["layer"], images(order["images"], device))
    figures = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "error": found.error,
        "rank": found.rank,
    }
    peak = peak_bytes() if device == "cpu" else torch.cuda.max_memory_allocated(device)
    figures |= {"unknowns": found.unknowns, "rows": found.samples, "peak_bytes": peak}
    columns = 1 + found.unknowns + len(found.network.connection.layer.weight)
    return {**order, **figures, "floor_seconds": 10 / 16 * 2 * found.samples * columns**2 / _speed(columns, device)}


def _speed(columns: int, device: str) -> float:
    """Float operations a second of A A' in float64, A of as many rows as there are columns in a
    graft, at most 2,000.
    """
    a = torch.randn(min(columns, 2000), 20_000, dtype=torch.float64, device=device)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        float((a @ a.T)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - began)
    return 2 * a.shape[1] * a.shape[0] ** 2 / min(seconds)


def whole(lower: nn.Sequential, upper: nn.Sequential, layer: str, inputs: Tensor) -> np.ndarray:
    """The same connecting kernel from the whole design matrix, (1 + d, K)."""
    place = list(dict(upper.named_children())).index(layer)
    signal, goal = lower[:place](inputs), upper[: place + 1](inputs)
    design = functional.unfold(signal, 3, padding=1).transpose(1, 2).flatten(0, 1).detach().double()
    design = torch.cat([torch.ones(len(design), 1, dtype=torch.float64), design], 1)
    return np.linalg.lstsq(design.numpy(), goal.detach().double().movedim(1, -1).flatten(0, 2).numpy(), rcond=None)[0]


def peer(sizes: Sizes) -> dict[str, Any]:
    """Median CPU seconds of both on a narrower network, and the largest difference of their kernels in units of the
    largest entry.
    """
    lower, upper = networks(max(2, sizes.width // 4))
    inputs, layer = torch.cat(list(images(sizes.peer_images, "cpu"))), sizes.memory_layer
    answers: dict[str, np.ndarray] = {}

    def ours() -> None:
        answers["graft"] = (
            graft(lower, upper, layer, inputs).network.connection.layer.weight.flatten(1).T.double().numpy()
        )

    def theirs() -> None:
        answers["whole matrix"] = whole(lower, upper, layer, inputs)[1:]

    blocks = alternating({"graft": ours, "whole matrix": theirs}, 1, sizes.repetitions, 1)
    kernel, solution = answers["graft"], answers["whole matrix"]
    seconds = medians(blocks)
    difference = float(np.abs(kernel - solution).max() / np.abs(solution).max())
    return {
        "cpu_seconds": seconds,
        "ratio": seconds["graft"] / seconds["whole matrix"],
        "largest_difference": difference,
        "layer": layer,
    }


def run(options: Options, report: Callable[[str], None]) -> dict[str, Any]:
    """Every figure of the benchmark, ready for JSON."""
    sizes, grafts, memory = options.sizes, [], []
    base = {"width": sizes.width, "threads": options.threads, "device": options.device}

    def ask(layer: str, count: int) -> dict[str, Any]:
        order = {**base, "layer": layer, "images": count}
        return isolated.call("benchmarks.grafting.measure:one", order, fresh=not options.in_process)

    for layer in sizes.layers:
        grafts.append(ask(layer, sizes.images))
        report(f"{layer}, {sizes.images} images: {grafts[-1]['seconds']:.1f} s")
    for count in sizes.memory_images:
        memory.append(ask(sizes.memory_layer, count))
        report(f"{sizes.memory_layer}, {count} images: peak {memory[-1]['peak_bytes'] / 2**20:.0f} MiB")
    growth = memory[-1]["peak_bytes"] / memory[0]["peak_bytes"] - 1
    allowed = CPU_ALLOWED if options.device == "cpu" else GPU_ALLOWED
    return {
        "width": sizes.width,
        "grafts": grafts,
        "memory": memory,
        "memory_growth": growth,
        "memory_flat": growth <= GROWTH_ALLOWED,
        "fast_enough": max(each["seconds"] for each in grafts) <= allowed,
        "allowed_seconds": allowed,
        "peer": peer(sizes),
    }
