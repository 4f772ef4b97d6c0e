"""Random starting measures that have a limit as the widths grow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated

import torch
from torch import Tensor

from meanfield import limits, validation
from meanfield.architecture import Architecture, Conv
from meanfield.network import ParticleNetwork, propagate
from meanfield.problem import Problem, project_bounds
from meanfield.signatures import checked
from meanfield.validation import Misuse, choice

__all__ = ["STARTS", "draw", "start"]

ANCHOR_ROWS = 1024
START_IMAGES = 1024  # that a start looks at, drawn from all
STARTS = ("anchored", "low_rank")


def normal(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Gaussian draws on the generator's device, so that a seed gives one start on every device."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device=generator.device).to(like)


def salted(text: str) -> torch.Generator:
    """Of random numbers that no start has: drawn from the seed of its network, they would be its own weights.

    text: what they are for, and a seed.
    """
    return torch.Generator().manual_seed(int.from_bytes(sha256(text.encode()).digest()[:7]))


@checked
def draw(
    problem: Problem,
    widths: Sequence[int],
    generator: torch.Generator,
    kind: Annotated[str, choice(STARTS)] = "anchored",
) -> ParticleNetwork:
    """A random start (see `start`) moved inside the bounds of the problem."""
    problem.require_whole("a start")
    return project_bounds(problem, start(problem.architecture, widths, problem.inputs, generator, kind))


@checked
def start(
    architecture: Architecture,
    widths: Sequence[int],
    inputs: Tensor,
    generator: torch.Generator,
    kind: Annotated[str, choice(STARTS)] = "anchored",
) -> ParticleNetwork:
    """A random start with uniform masses that has a limit as the widths grow.

    kind "anchored": pre-activations as a wide standard network would draw them, realised by the least-norm kernels on
    the inputs (at most ANCHOR_ROWS image positions of them serve as anchors); "low_rank": kernels
    w(z', z) = sum_r a_r(z) phi_r(z') with random functions phi_r.  Both are scaled to pre-activations of unit root mean
    square on the inputs, on START_IMAGES of them where there are more.  First-layer kernels, biases and readout are
    standard normal (biases of later layers start at zero).
    dtype and device are those of `inputs`, (N, C_0, H, W).
    """
    widths = validation.widths(widths, architecture.depth)
    validation.working(architecture.check_inputs(inputs).dtype, "inputs.dtype")
    _require_memory(architecture, widths, inputs)
    masses = [inputs.new_full((m,), 1 / m) for m in widths]
    shapes = architecture.kernel_shapes(widths)
    kernels = [normal(shapes[0], generator, inputs) * math.sqrt(architecture.input_shape[0])]
    biases = [inputs.new_zeros(m) if layer.bias else None for m, layer in zip(widths, architecture.layers)]
    if biases[0] is not None:
        biases[0] = normal((widths[0],), generator, inputs)
    coordinates = kernels[0].flatten(1)
    built = _Built(architecture, widths, _some(inputs, generator), [kernels[0] / architecture.input_shape[0]], biases)
    for layer, shape, mass in zip(architecture.layers[1:], shapes[1:], masses[:-1]):
        if kind == "anchored":
            kernel = _anchored(layer, built, shape, mass, generator)
        else:
            kernel, coordinates = _low_rank(coordinates, shape, generator, inputs)
        flow = kernel * mass[None, :, None, None]
        size = built.size(layer, flow)
        scale = torch.where(size > 0, 1 / size, 1.0)  # black images have no response
        kernels.append(kernel * scale)
        built.flows.append(flow * scale)
    readout = normal(architecture.readout_shape(widths[-1]), generator, inputs)
    return ParticleNetwork(architecture, masses, kernels, readout, biases)


def _some(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """At most START_IMAGES of the images."""
    if len(inputs) <= START_IMAGES:
        return inputs
    order = torch.randperm(len(inputs), generator=generator, device=generator.device)
    return inputs[order[:START_IMAGES].to(inputs.device)]


@dataclass
class _Built:
    """The layers of a start so far, as many as there are flows, and the images that it looks at."""

    architecture: Architecture
    widths: Sequence[int]
    inputs: Tensor
    flows: list[Tensor]
    biases: list[Tensor | None]

    def signals(self) -> Iterator[Tensor]:
        """The features of the last layer, in blocks of images."""
        rows = map(math.prod, self.architecture.row_shapes(self.widths))
        each = self.inputs.element_size() * (self.architecture.entries(self.widths) + max(rows, default=0))
        for block in limits.blocks(len(self.inputs), each):
            yield propagate(self.architecture, self.flows, self.biases, self.inputs[block])[1][-1]

    def positions(self) -> int:
        """Of the next layer, on all images."""
        return len(self.inputs) * math.prod(self.architecture.geometry[len(self.flows)].output)

    def size(self, layer: Conv, flow: Tensor) -> Tensor:
        """Root mean square of the next layer's pre-activations by that flow."""
        squares = [layer.convolve(signal, flow).square().sum() for signal in self.signals()]
        return (torch.stack(squares).sum() / (self.positions() * len(flow))).sqrt()


def _require_memory(architecture: Architecture, widths: tuple[int, ...], inputs: Tensor) -> None:
    """Refuse kernels that cannot be held before any is drawn."""
    need = sum(map(math.prod, architecture.kernel_shapes(widths))) * inputs.element_size()
    most = limits.available(inputs.device)
    if need > most:
        sizes = ", ".join(str(layer.kernel_size) for layer in architecture.layers)
        raise Misuse(
            "widths",
            widths,
            f"with kernel_size {sizes} takes {need / 2**30:.3g} GiB for the kernels alone, and {most / 2**30:.3g} GiB "
            "may be taken; take fewer particles or smaller kernels",
        )


def _anchored(layer: Conv, built: _Built, shape: Sequence[int], mass: Tensor, generator: torch.Generator) -> Tensor:
    """w_j = A^T K^+ g_j on anchor rows, K = A diag(p) A^T, g_j = M^{-1/2} sum_i omega_ij * f_i."""
    omega, count = normal(shape, generator, mass).flatten(1), built.positions()  # (M', M S)
    chosen = torch.arange(count)
    if count > ANCHOR_ROWS:
        chosen = torch.randperm(count, generator=generator, device=generator.device)[:ANCHOR_ROWS]
    rows = layer.chosen_patches(built.signals(), chosen.to(mass.device))
    target = rows @ omega.T / math.sqrt(shape[1])
    weight = mass.repeat_interleave(layer.offsets)
    gram = (rows * weight) @ rows.T
    return (torch.linalg.pinv(gram, hermitian=True) @ target).T.matmul(rows).reshape(shape)


def _low_rank(
    coordinates: Tensor, shape: tuple[int, ...], generator: torch.Generator, like: Tensor, rank: int = 8
) -> tuple[Tensor, Tensor]:
    """w_ij = sum_r a_rj phi_r(i), phi_r = tanh of a random linear map of the source's own
    coordinates, kernel-valued.
    """
    offsets = shape[2] * shape[3]
    maps = normal((coordinates.shape[1], rank * offsets), generator, like) / math.sqrt(coordinates.shape[1])
    functions = torch.tanh(coordinates @ maps).reshape(shape[1], rank, offsets)
    coefficients = normal((shape[0], rank), generator, like)
    return torch.einsum("jr,irs->jis", coefficients, functions).reshape(shape), coefficients
