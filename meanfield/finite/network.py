"""Convolutional networks of finite width, in any scaling, and finite networks sampled from a continuous one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from meanfield import limits, measures, starts, validation
from meanfield.architecture import Architecture, Conv
from meanfield.finite.scaling import Scaling, registered
from meanfield.network import MASS_TOLERANCE, ParticleNetwork, along_axis
from meanfield.signatures import checked
from meanfield.starts import STARTS, normal


class FiniteCNN(nn.Module):
    """A CNN of widths m_1..m_L with m_l channels in layer l, m_0 = C_0.

    g^l_j = s_l sum_i w_ij * f^{l-1}_i + b_j and F = s_{L+1} sum_j <u_j, f^L_j>, with the multipliers s of a Scaling or
    of one that has a name: 1/m of the m channels that are read ("mean_field"), 1/sqrt(m) ("ntk", Jacot et al. 2018) or
    1 ("standard", and "mup", the maximal update parameterisation of Yang & Hu 2021, which differs from "standard" in
    the readout of its start and in the learning rates of its layers).  In the mean-field scaling this is the
    ParticleNetwork of the same kernels with uniform masses.
    Shapes of kernels, readout and biases as in ParticleNetwork; they become
    parameters, and dtype and device follow them.
    """

    def __init__(
        self,
        architecture: Architecture,
        kernels: Sequence[Tensor],
        readout: Tensor,
        biases: Sequence[Tensor | None] | None = None,
        scaling: str | Scaling = "mean_field",
    ) -> None:
        super().__init__()
        masses = [kernel.new_full(kernel.shape[:1], 1 / max(len(kernel), 1)) for kernel in kernels]
        checked = ParticleNetwork(architecture, masses, kernels, readout, biases)
        self.architecture, self.scaling, self.widths = architecture, registered(scaling), checked.widths
        self.kernels = nn.ParameterList(nn.Parameter(kernel.detach().clone()) for kernel in kernels)
        self.readout = nn.Parameter(readout.detach().clone())
        present = {str(layer): bias for layer, bias in enumerate(checked.biases) if bias is not None}
        self.bias_parameters = nn.ParameterDict(
            {layer: nn.Parameter(bias.detach().clone()) for layer, bias in present.items()}
        )

    @classmethod
    @checked
    def random(
        cls,
        architecture: Architecture,
        widths: Sequence[int],
        inputs: Tensor,
        generator: torch.Generator,
        scaling: Annotated[str | Scaling, registered] = "mean_field",
    ) -> FiniteCNN:
        """A random start, dtype and device as `inputs` (N, C_0, H, W).

        "mean_field": `starts.start`, whose features are of order one and whose output vanishes like
        1/sqrt(m_L), as that of a readout of order one must.  "ntk" and "standard": the He start, Gaussian kernels that
        keep features and output of order one at every width (the same function for both), biases zero.  "mup": that of
        "standard" with the readout divided by sqrt(m_L), so that the output vanishes like 1/sqrt(m_L).  Others:
        `Scaling.initial`.
        """
        rule = registered(scaling)
        widths = validation.widths(widths, architecture.depth)
        validation.working(architecture.check_inputs(inputs).dtype, "inputs.dtype")
        if rule.initial in STARTS:
            return cls.from_particles(starts.start(architecture, widths, inputs, generator, str(rule.initial)), rule)
        deviations = rule.deviations(architecture, widths)
        shapes = [*architecture.kernel_shapes(widths), architecture.readout_shape(widths[-1])]
        *kernels, readout = (normal(shape, generator, inputs) * each for shape, each in zip(shapes, deviations))
        biases = [inputs.new_zeros(m) if layer.bias else None for layer, m in zip(architecture.layers, widths)]
        return cls(architecture, kernels, readout, biases, rule)

    @classmethod
    def from_particles(cls, network: ParticleNetwork, scaling: str | Scaling = "mean_field") -> FiniteCNN:
        """The finite network that computes the same function; the masses must be uniform."""
        validation.instance(network, "network", ParticleNetwork)
        for layer, masses in enumerate(network.masses):
            spread = float((masses * len(masses) - 1).abs().max())
            if spread > MASS_TOLERANCE[network.dtype]:
                raise ValueError(
                    f"masses[{layer}] are not uniform (up to {spread:.2g} relative); a finite network has equal "
                    "channels: draw one with finite.sample"
                )
        finite = cls(network.architecture, network.kernels, network.readout, network.biases, scaling)
        with torch.no_grad():
            for parameter, factor in zip([*finite.kernels, finite.readout], finite.mean_field_factors):
                parameter.div_(factor)
        return finite

    def particles(self, *, attached: bool = False) -> ParticleNetwork:
        """The same function as particles of uniform mass; `attached` to the parameters' graph, or a frozen copy."""
        factors = self.mean_field_factors
        masses = [self.readout.new_full((m,), 1 / m) for m in self.widths]
        kernels = [kernel * factor for kernel, factor in zip(self.kernels, factors)]
        network = ParticleNetwork.unchecked(self.architecture, masses, kernels, self.readout * factors[-1], self.biases)
        return network if attached else network.map(lambda tensor: tensor.detach().clone())

    @property
    def forward_factors(self) -> list[float]:
        """s_l, l = 1..L+1, of the kernels and of the readout."""
        return self.scaling.forward_factors(self.architecture, self.widths)

    @property
    def mean_field_factors(self) -> list[float]:
        """s_l m_{l-1}, l = 1..L+1: kernels and readout times these are the parameters of the same function in the
        mean-field scaling.
        """
        return [s * m for s, m in zip(self.forward_factors, (self.architecture.input_shape[0], *self.widths))]

    @property
    def biases(self) -> tuple[Tensor | None, ...]:
        """(m_l,) per layer, or None."""
        return tuple(self.bias_parameters.get(str(layer)) for layer in range(self.architecture.depth))

    def forward(self, inputs: Tensor) -> Tensor:
        """F on inputs (N, C_0, H, W) -> (N, K); in blocks of images where no gradient is wanted."""
        self.architecture.check_inputs(inputs)
        if torch.is_grad_enabled():
            return self._respond(inputs)
        each = inputs.element_size() * self.architecture.entries(self.widths)
        return torch.cat([self._respond(inputs[block]) for block in limits.blocks(len(inputs), each)])

    def _respond(self, inputs: Tensor) -> Tensor:
        signal, factors = inputs, self.forward_factors
        for layer, kernel, bias, factor in zip(self.architecture.layers, self.kernels, self.biases, factors):
            signal = layer.activate(layer.convolve(signal, kernel * factor, bias))
        read = self.architecture.readout_features(signal)
        return read.flatten(1) @ (self.readout * factors[-1]).flatten(1).T

    def extra_repr(self) -> str:
        return f"widths={self.widths}, scaling={self.scaling.name!r}"


@checked
def sample(network: ParticleNetwork, widths: Sequence[int], generator: torch.Generator) -> FiniteCNN:
    """Channels drawn i.i.d. from the masses, with replacement; kernels of the drawn pairs; mean-field scaling.

    E |F_m - F|^2 falls like 1/m; for one layer E F_m = F.  Plain Monte Carlo of
    every integral over features.
    """
    widths = validation.widths(widths, network.architecture.depth)
    drawn = [_draw(masses, count, generator) for masses, count in zip(network.masses, widths)]
    chosen = measures.select(network, drawn)
    return FiniteCNN(network.architecture, chosen.kernels, chosen.readout, chosen.biases)


def _draw(masses: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices (count,), drawn on the generator's device so that a seed gives one network on every device."""
    weights = masses.detach().double().to(generator.device)
    return torch.multinomial(weights, count, replacement=True, generator=generator).to(masses.device)


@checked
def sequential(network: ParticleNetwork | FiniteCNN) -> nn.Sequential:
    """The same function as an nn.Sequential of conv1, relu1 (or what it is), pool1, conv2, ..., flatten, readout.

    A particle's mass goes into the kernels that read it.  Torch's modules then stand for the layers, to be grafted or
    exported; the parameters are copies.
    """
    particles = network if isinstance(network, ParticleNetwork) else network.particles()
    masses = [None, *particles.masses]
    children: dict[str, nn.Module] = {}
    for index, (layer, kernel, bias) in enumerate(
        zip(particles.architecture.layers, particles.kernels, particles.biases)
    ):
        read = masses[index]
        weight = kernel / kernel.shape[1] if read is None else kernel * read[None, :, None, None]
        children |= _modules(layer, index + 1, weight, bias)
    average = particles.architecture.readout == "average"
    positions = particles.architecture.readout_positions
    children |= {"average": nn.AdaptiveAvgPool2d(1)} if average else {}
    weighted = particles.readout * along_axis(particles.masses[-1], particles.readout, 1)
    children |= {
        "flatten": nn.Flatten(),
        "readout": _linear((weighted if average else weighted / positions).flatten(1)),
    }
    return nn.Sequential(OrderedDict(children))


def from_sequential(network: nn.Module, like: ParticleNetwork) -> ParticleNetwork:
    """Undoes `sequential`: the particles whose kernels, times their masses, are the modules' weights.

    like: of the same architecture, with the masses, all of them positive.
    """
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    kernels, biases = [], []
    for index, kernel in enumerate(weights[f"conv{layer + 1}.weight"] for layer in range(like.architecture.depth)):
        read = like.masses[index - 1][None, :, None, None] if index else 1 / kernel.shape[1]
        kernels.append(kernel / read)
        biases.append(weights.get(f"conv{index + 1}.bias"))
    positions = 1 if like.architecture.readout == "average" else like.architecture.readout_positions
    readout = (positions * weights["readout.weight"]).reshape(like.architecture.readout_shape(like.widths[-1]))
    readout = readout / along_axis(like.masses[-1], readout, 1)
    return ParticleNetwork(like.architecture, like.masses, kernels, readout, biases)


def _modules(layer: Conv, number: int, weight: Tensor, bias: Tensor | None) -> dict[str, nn.Module]:
    conv = nn.utils.skip_init(
        nn.Conv2d,
        weight.shape[1],
        weight.shape[0],
        layer.kernel,
        layer.stride,
        layer.padding,
        bias=bias is not None,
        dtype=weight.dtype,
        device=weight.device,
    )
    conv.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    pools = {"average": nn.AvgPool2d, "max": nn.MaxPool2d}
    pool = {f"pool{number}": pools[layer.pooling](layer.pool_size)} if layer.pooling in pools else {}
    return {f"conv{number}": conv, f"{layer.h}{number}": layer.h.module(), **pool}


def _linear(weight: Tensor) -> nn.Module:
    found = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device=weight.device
    )
    found.load_state_dict({"weight": weight})
    return found
