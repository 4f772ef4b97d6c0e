"""The random and the real instances that claims are measured on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import meanfield as mf
from meanfield import measures, starts
from meanfield.starts import normal
from theory_checks.claim import Setting

LOSSES = ("squared", "logistic", "softmax")
ACTIVATIONS = ("relu", "tanh", "softplus", "gelu")


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
    return order % outputs if loss == "softmax" else 2.0 * (order % 2)[:, None].double() - 1


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
