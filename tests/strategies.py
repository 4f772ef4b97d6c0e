"""Hypothesis strategies: random architectures, networks and problems of small sizes.

Structure is drawn by hypothesis, numbers by a seeded generator, so that shrinking acts on the structure.
"""

from dataclasses import dataclass, replace

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st

import meanfield as mf
from meanfield.architecture import POOLINGS, READOUTS
from meanfield.losses import make

SMOOTH = ("tanh", "softplus", "gelu", "identity")
ACTIVATIONS = ("relu", *SMOOTH)  # those with a slow twin in `reference`
NORMS = ("l2", "l1")
seeds = st.integers(0, 2**31 - 1)


def costly(examples):
    """Settings of tests that solve a program per example: few examples, no shrinking."""
    return settings(max_examples=examples, phases=(Phase.explicit, Phase.generate))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(shape, seed, dtype=torch.float64):
    return torch.randn(tuple(shape), generator=seeded(seed), dtype=torch.float64).to(dtype)


def random_masses(count, seed, dtype=torch.float64):
    raw = torch.rand(count, generator=seeded(seed), dtype=torch.float64) + 0.1
    return (raw / raw.sum()).to(dtype)


@st.composite
def convs(draw, size, activations, poolings=POOLINGS, biases=(False, True)):
    """A layer that fits an input of the given (height, width)."""
    padding = tuple(draw(st.integers(0, 1)) for _ in size)
    kernel = tuple(draw(st.integers(1, min(3, s + 2 * p))) for s, p in zip(size, padding))
    stride = tuple(draw(st.integers(1, 2)) for _ in size)
    output = [(s + 2 * p - k) // step + 1 for s, p, k, step in zip(size, padding, kernel, stride)]
    pool = tuple(draw(st.integers(1, min(2, s))) for s in output)
    choice = st.sampled_from
    return mf.Conv(
        kernel, padding, stride, draw(choice(list(activations))), draw(choice(poolings)), pool, draw(choice(biases))
    )


@st.composite
def architectures(
    draw,
    depths=(1, 2, 3),
    outputs=(1, 3),
    activations=ACTIVATIONS,
    poolings=POOLINGS,
    biases=(False, True),
    sides=(2, 5),
    readouts=READOUTS,
):
    shape = (draw(st.integers(1, 2)), draw(st.integers(*sides)), draw(st.integers(*sides)))
    size, layers = shape[1:], []
    for index in range(draw(st.sampled_from(depths))):
        layers.append(draw(convs(size, activations, poolings, biases)))
        size = layers[-1].sizes(*size, where=f"layers[{index}]")[1]
    return mf.Architecture(shape, tuple(layers), draw(st.sampled_from(readouts)), draw(st.sampled_from(outputs)))


def random_network(arch, widths, seed, dtype=torch.float64, zero_mass=False):
    """Gaussian kernels, biases and readout, random masses; with `zero_mass` the last particle of every wide layer has
    none.
    """
    masses = [random_masses(m, seed + index) for index, m in enumerate(widths)]
    if zero_mass:
        masses = [torch.cat([p[:-1] / p[:-1].sum(), p.new_zeros(1)]) if len(p) > 1 else p for p in masses]
    kernels = [normal(shape, seed + 10 + index, dtype) for index, shape in enumerate(arch.kernel_shapes(widths))]
    biases = [
        normal((m,), seed + 20 + index, dtype) if conv.bias else None
        for index, (m, conv) in enumerate(zip(widths, arch.layers))
    ]
    readout = normal(arch.readout_shape(widths[-1]), seed + 30, dtype)
    return mf.ParticleNetwork(arch, [p.to(dtype) for p in masses], kernels, readout, biases)


def random_inputs(arch, count, seed, dtype=torch.float64):
    return normal((count, *arch.input_shape), seed + 40, dtype)


def random_targets(loss, outputs, count, seed):
    """Checkable targets; of losses without a line of their own those of as many classes as the outputs tell apart."""
    if loss == "squared":
        return normal((count, outputs), seed + 50)
    if loss == "logistic":
        return torch.tensor([[(-1.0) ** (n + k) for k in range(outputs)] for n in range(count)])
    classes = max(outputs, 2)
    return make(loss).encode(torch.arange(count) % classes, classes)


@dataclass
class Case:
    """A problem and a network that meets its bounds."""

    problem: mf.Problem
    network: mf.ParticleNetwork
    seed: int

    @property
    def freeze(self):
        return mf.ConvexProgram.freeze(self.problem, self.network)


def bounded(penalty, network, amplitude_factor, input_factor):
    """The penalty with bounds at the given multiples of what the network reaches; None leaves a bound off."""
    amplitudes = []
    for layer in range(1, len(network.widths)):
        amplitudes.append(float(network.amplitudes(layer, penalty.norms(network.kernels[layer])).max()))
        if network.biases[layer] is not None:
            amplitudes.append(float(network.biases[layer].abs().max()))
    first = [network.kernels[0].flatten(1)] + ([] if network.biases[0] is None else [network.biases[0][:, None]])
    norms = torch.cat(first, 1).norm(dim=1)
    return replace(
        penalty,
        amplitude_bound=None if amplitude_factor is None else amplitude_factor * max(amplitudes, default=1.0),
        input_bound=None if input_factor is None else input_factor * float(norms.max()),
    )


@st.composite
def cases(
    draw,
    archs=None,
    losses=("squared", "logistic", "softmax"),
    norms=NORMS,
    bounds=(None, 1.3),
    max_width=4,
    images=(2, 4),
    zero_mass=(False,),
    dtype=torch.float64,
):
    arch = draw(archs if archs is not None else architectures())
    seed = draw(seeds)
    widths = [draw(st.integers(1, max_width)) for _ in arch.layers]
    network = random_network(arch, widths, seed, dtype, draw(st.sampled_from(zero_mass)))
    loss = draw(st.sampled_from([name for name in losses if name != "softmax" or arch.outputs > 1]))
    count = draw(st.integers(*images))
    penalty = mf.Penalty(source=0.03, readout=0.05, input=0.02, kernel_norm=draw(st.sampled_from(norms)))
    penalty = bounded(penalty, network, draw(st.sampled_from(bounds)), draw(st.sampled_from(bounds)))
    inputs, targets = random_inputs(arch, count, seed, dtype), random_targets(loss, arch.outputs, count, seed)
    return Case(mf.Problem(arch, inputs, targets, loss, penalty), network, seed)
