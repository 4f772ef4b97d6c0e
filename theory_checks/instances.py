"""The random and the real instances that claims are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

import meanfield as mf
from meanfield import measures, starts
from meanfield.architecture import POOLINGS, READOUTS
from meanfield.penalties import KERNEL_NORMS, input_norms
from meanfield.problem import project_bounds
from meanfield.starts import normal
from theory_checks.claim import Setting

LOSSES = ("squared", "logistic", "softmax")
ACTIVATIONS = ("relu", "tanh", "softplus", "gelu")
SMOOTH = ("tanh", "softplus", "gelu")
T = TypeVar("T")


def random_problem(
    generator: torch.Generator,
    depth: int,
    *,
    side: int = 3,
    images: int = 3,
    activation: str | None = None,
    loss: str | None = None,
    kernel_size: int = 3,
    bias: bool = False,
    kernel_norm: str = "l2",
    device: str = "cpu",
) -> mf.Problem:
    """Gaussian images and targets; activation and loss are drawn where they are not given."""
    activation = activation if activation is not None else _choice(ACTIVATIONS, generator)
    loss = loss if loss is not None else _choice(LOSSES, generator)
    channels, outputs = 2, 3 if loss == "softmax" else 1
    layers = tuple(
        mf.Conv(kernel_size, padding=kernel_size // 2, activation=activation, bias=bias) for _ in range(depth)
    )
    architecture = mf.Architecture((channels, side, side), layers, "average", outputs)
    inputs = torch.randn(images, channels, side, side, generator=generator, dtype=torch.float64)
    penalty = mf.Penalty(source=0.03, readout=0.05, input=0.02, kernel_norm=kernel_norm)
    return mf.Problem(architecture, inputs, _targets(loss, images, outputs, generator), loss, penalty).to(device=device)


def _choice(options: Sequence[str], generator: torch.Generator) -> str:
    return options[int(torch.randint(len(options), (), generator=generator))]


def _targets(loss: str, images: int, outputs: int, generator: torch.Generator) -> Tensor:
    if loss == "squared":
        return torch.randn(images, outputs, generator=generator, dtype=torch.float64)
    order = torch.randperm(images, generator=generator)
    if loss == "softmax":
        return order % outputs
    return 2.0 * ((order[:, None] + torch.arange(outputs)) % 2).double() - 1


@dataclass(frozen=True)
class Variety:
    """Everything that an architecture, a loss and a penalty can be, drawn for the instances of a claim one after the
    other.

    Of every list of options each comes up once in as many instances as the list is long, in a random order of its own:
    no option is left out by chance, and no two lists go in step.
    """

    setting: Setting
    place: int

    def pick(self, options: Sequence[T], number: int, index: int) -> T:
        """The option of list `number` for instance `index`."""
        turn, position = divmod(index, len(options))
        order = torch.randperm(len(options), generator=self.setting.generator(self.place, number, turn))
        return options[int(order[position])]

    def problem(
        self,
        index: int,
        depth: int,
        *,
        activations: Sequence[str] = ACTIVATIONS,
        poolings: Sequence[str] = POOLINGS,
        norms: Sequence[str] = KERNEL_NORMS,
        losses: Sequence[str] = LOSSES,
        side: int = 5,
        images: int = 3,
    ) -> mf.Problem:
        """Gaussian images of uneven sides up to `side`; every layer with a kernel, padding, stride, activation, pooling
        and bias of its own; a readout, a loss with its outputs, a kernel norm and strengths.
        """
        generator = self.setting.generator(self.place, index)
        shape = (self.pick((1, 2, 3), 0, index), side, self.pick((side, side - 1), 1, index))
        size, layers = shape[1:], []
        for layer in range(depth):
            layers.append(self._layer(size, 10 * (layer + 1), index, activations, poolings))
            size = layers[-1].sizes(*size, where="a drawn layer")[1]
        loss = self.pick(losses, 2, index)
        outputs = 3 if loss == "softmax" else self.pick((1, 2), 3, index)
        architecture = mf.Architecture(shape, tuple(layers), self.pick(READOUTS, 4, index), outputs)
        source, readout, first = (torch.exp(torch.randn(3, generator=generator)) * 0.03).tolist()
        penalty = mf.Penalty(source=source, readout=readout, input=first, kernel_norm=self.pick(norms, 5, index))
        inputs = torch.randn(images, *shape, generator=generator, dtype=torch.float64)
        targets = _targets(loss, images, outputs, generator)
        return mf.Problem(architecture, inputs, targets, loss, penalty).to(device=self.setting.device)

    def _layer(
        self, size: tuple[int, ...], number: int, index: int, activations: Sequence[str], poolings: Sequence[str]
    ) -> mf.Conv:
        """A layer that fits its input."""
        pick = lambda options, place: self.pick(options, number + place, index)  # noqa: E731
        padding = pick(((0, 0), (1, 1), (1, 0)), 0)
        kernel = tuple(min(k, s + 2 * p) for k, s, p in zip(pick(((3, 3), (2, 3), (2, 2), (1, 2)), 1), size, padding))
        stride = pick(((1, 1), (2, 1), (1, 1), (2, 2)), 2)
        output = [(s + 2 * p - k) // step + 1 for s, p, k, step in zip(size, padding, kernel, stride)]
        pool = (min(2, output[0]), min(2, output[1]))
        return mf.Conv(
            kernel, padding, stride, pick(activations, 3), pick(poolings, 4), pool, bias=pick((False, True), 5)
        )

    def bounded(
        self, problem: mf.Problem, network: mf.ParticleNetwork, factor: float, index: int
    ) -> tuple[mf.Problem, mf.ParticleNetwork]:
        """The problem with an amplitude bound, an input bound or both, at `factor` times what the network reaches, and
        the network moved inside.
        """
        kinds = ("amplitude", "both", "input") if problem.architecture.depth > 1 else ("input",)
        kind = self.pick(kinds, 6, index)
        amplitude, size = reached(problem, network)
        penalty = replace(
            problem.penalty,
            amplitude_bound=None if kind == "input" else factor * amplitude,
            input_bound=None if kind == "amplitude" else factor * size,
        )
        problem = with_penalty(problem, penalty)
        return problem, project_bounds(problem, network)


def with_penalty(problem: mf.Problem, penalty: mf.Penalty) -> mf.Problem:
    """The same data and architecture under another penalty."""
    return mf.Problem(problem.architecture, problem.inputs, problem.targets, problem.loss.name, penalty)


def reached(problem: mf.Problem, network: mf.ParticleNetwork) -> tuple[float, float]:
    """max of int |w| d rho and |b| over features of layers >= 2, and max |(z, b)|."""
    amounts = [0.0]
    for layer in range(1, problem.architecture.depth):
        norms, bias = problem.penalty.norms(network.kernels[layer]), network.biases[layer]
        amounts.append(float(network.amplitudes(layer, norms).max()))
        amounts.append(0.0 if bias is None else float(bias.abs().max()))
    return max(amounts), float(input_norms(network.kernels[0], network.biases[0]).max())


def random_network(problem: mf.Problem, widths: Sequence[int], generator: torch.Generator) -> mf.ParticleNetwork:
    """Gaussian kernels and readout, masses drawn uniformly on the simplex."""
    architecture, like = problem.architecture, problem.inputs
    masses = [random_masses(m, generator).to(like) for m in widths]
    kernels = [normal(shape, generator, like) for shape in architecture.kernel_shapes(widths)]
    biases = [normal((m,), generator, like) if layer.bias else None for m, layer in zip(widths, architecture.layers)]
    return mf.ParticleNetwork(
        architecture, masses, kernels, normal(architecture.readout_shape(widths[-1]), generator, like), biases
    )


def permuted(network: mf.ParticleNetwork, generator: torch.Generator) -> mf.ParticleNetwork:
    """The same function, the particles of every layer in a random order."""
    orders = [torch.randperm(m, generator=generator).to(network.device) for m in network.widths]
    return measures.permute(network, orders)


def random_masses(count: int, generator: torch.Generator) -> Tensor:
    """Uniform on the simplex."""
    raw = -torch.rand(count, generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
    return raw / raw.sum()


def random_start(problem: mf.Problem, widths: Sequence[int], seed: int, kind: str = "low_rank") -> mf.ParticleNetwork:
    """`starts.draw` from a seed."""
    return starts.draw(problem, widths, torch.Generator().manual_seed(seed), kind)


def digits_problem(
    setting: Setting,
    depth: int,
    *,
    classes: tuple[int, int] = (3, 5),
    samples: int = 12,
    pool: int = 2,
    activation: str = "tanh",
    kernel_size: int = 3,
    penalty: mf.Penalty | None = None,
) -> mf.Problem:
    """Real digits of two classes, averaged to smaller images; the squared loss on targets -1 and 1."""
    data = mf.data.load("digits", classes=classes, samples=samples, pool=pool)
    layer = mf.Conv(kernel_size, padding=kernel_size // 2, activation=activation)
    architecture = mf.Architecture(data.input_shape, (layer,) * depth, "average", 1)
    penalty = penalty if penalty is not None else mf.Penalty(source=3e-4, readout=3e-3, input=3e-4)
    return mf.Problem(architecture, data.inputs, data.targets("squared"), "squared", penalty).to(device=setting.device)
