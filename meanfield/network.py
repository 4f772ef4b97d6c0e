"""The continuous CNN held as particles: masses, kernels, readout; its features and its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meanfield import limits
from meanfield.architecture import Architecture
from meanfield.validation import finite, instance, shaped, working

MASS_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


class Responses(NamedTuple):
    """What a network computes on inputs: per layer g^l (N, M_l, H', W') and f^l (N, M_l, H'', W''), and F (N, K)."""

    preactivations: list[Tensor]
    features: list[Tensor]
    output: Tensor


@dataclass(frozen=True, eq=False, init=False)
class ParticleNetwork:
    """A probability measure over features for every layer, as M_l particles with masses.

    masses[l]   (M_l,) non-negative, sums to one
    kernels[l]  (M_l, M_{l-1}, kh, kw), target first as in torch; M_0 = C_0.  kernels[0] IS the feature of layer 1
    readout     (K, M_L), or (K, M_L, positions) for a flattened readout
    biases[l]   (M_l,) where the layer has a bias, else None; None for no biases at all

    Output, Gu et al. 2020 eqs. (1)-(3) on empirical measures: g^1 = mean over channels of z * x,
    g^l_j = sum_i p_i w_ij * f^{l-1}_i, F = sum_j p_j <u_j, f^L_j>.  Dtype and device follow the tensors.
    """

    architecture: Architecture
    masses: tuple[Tensor, ...]
    kernels: tuple[Tensor, ...]
    readout: Tensor
    biases: tuple[Tensor | None, ...]

    def __init__(
        self,
        architecture: Architecture,
        masses: Sequence[Tensor],
        kernels: Sequence[Tensor],
        readout: Tensor,
        biases: Sequence[Tensor | None] | None = None,
    ) -> None:
        instance(architecture, "architecture", Architecture)
        for name, tensors in (("masses", masses), ("kernels", kernels)):
            instance(tensors, name, Iterable)
        if biases is not None:
            instance(biases, "biases", Iterable)
        self._assign(architecture, masses, kernels, readout, biases)
        self._check()

    def _assign(self, architecture, masses, kernels, readout, biases) -> None:
        object.__setattr__(self, "architecture", architecture)
        biases = (None,) * architecture.depth if biases is None else biases
        object.__setattr__(self, "masses", tuple(map(ordinary, masses)))
        object.__setattr__(self, "kernels", tuple(map(ordinary, kernels)))
        object.__setattr__(self, "readout", ordinary(readout))
        object.__setattr__(self, "biases", tuple(map(ordinary, biases)))

    @classmethod
    def unchecked(
        cls,
        architecture: Architecture,
        masses: Sequence[Tensor],
        kernels: Sequence[Tensor],
        readout: Tensor,
        biases: Sequence[Tensor | None] | None = None,
    ) -> ParticleNetwork:
        """As the constructor, without its checks: for inner loops, where a check would wait for the device."""
        network = cls.__new__(cls)
        network._assign(architecture, masses, kernels, readout, biases)
        return network

    @classmethod
    def from_module(cls, module: Any, example: Tensor | None = None) -> ParticleNetwork:
        """The particles, of mass 1/m in a layer of m channels, that compute what a trained module does.

        module: a torch.nn.Module in evaluation mode, or what torch.export made of one, that is a chain of convolutions,
        activations of ACTIVATIONS, pools and one linear readout.  Batch norm is folded, a Linear in front of the
        readout becomes a convolution of the size of its map, and a bias of the readout one more, constant particle of
        the last layer.  example: images (N, C, H, W) of the module's dtype and device, one is enough; of an exported
        program None will do.  The outputs on the example are compared.  dtype and device are the module's.

        Misuse by the name of the layer that has no place in an Architecture: a shortcut, dilation, groups, pools that
        overlap, dropout or batch norm in training mode, an activation that is not known.
        """
        from meanfield.modules import chain, steps  # torch.export and what comes with it

        network = cls(*chain.particles(steps.of_module(module, example)))
        if isinstance(example, Tensor):
            network._compare(module.module() if isinstance(module, torch.export.ExportedProgram) else module, example)
        return network

    @torch.no_grad()
    def _compare(self, module: Any, example: Tensor) -> None:
        """Whatever was misread is found out here."""
        theirs = module(example)
        ours = self(example)
        off = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1))
        if not off <= MASS_TOLERANCE[self.dtype]:
            raise ValueError(
                f"module gives outputs on the example from which the same weights as particles are {off:.2g} away: it "
                "does something that its graph does not show; please report it"
            )

    def _check(self) -> None:
        arch = self.architecture
        for name, entries in (("masses", self.masses), ("kernels", self.kernels), ("biases", self.biases)):
            if len(entries) != arch.depth:
                raise ValueError(f"{name} has {len(entries)} entries; the architecture has {arch.depth} layers")
        for index, masses in enumerate(self.masses):
            if instance(masses, f"masses[{index}]", Tensor).ndim != 1 or masses.numel() == 0:
                raise ValueError(f"masses[{index}] must be a tensor of shape (M,), M >= 1, got {_describe(masses)}")
        for index, (kernel, shape) in enumerate(zip(self.kernels, arch.kernel_shapes(self.widths))):
            shaped(kernel, shape, f"kernels[{index}]")
        shaped(self.readout, arch.readout_shape(self.widths[-1]), "readout")
        for index, (layer, bias) in enumerate(zip(arch.layers, self.biases)):
            if layer.bias != (bias is not None):
                raise ValueError(f"biases[{index}] is {_describe(bias)} but layers[{index}].bias={layer.bias}")
            if bias is not None:
                shaped(bias, (self.widths[index],), f"biases[{index}]")
        kinds = {(tensor.dtype, tensor.device) for tensor in self.tensors()}
        if len(kinds) != 1 or self.dtype not in MASS_TOLERANCE:
            raise ValueError(
                f"all tensors must share one dtype, float32 or float64, and one device; got {sorted(map(str, kinds))}"
            )
        self.require_finite()
        for index, masses in enumerate(self.masses):
            _check_masses(masses, f"masses[{index}]")

    def require_finite(self) -> None:
        """Refuse NaN and infinities, naming the tensor and the position."""
        for index, masses in enumerate(self.masses):
            finite(masses, f"masses[{index}]")
        for index, kernel in enumerate(self.kernels):
            finite(kernel, f"kernels[{index}]")
        finite(self.readout, "readout")
        for index, bias in enumerate(self.biases):
            if bias is not None:
                finite(bias, f"biases[{index}]")

    @property
    def widths(self) -> tuple[int, ...]:
        """M_1, ..., M_L."""
        return tuple(masses.shape[0] for masses in self.masses)

    @property
    def dtype(self) -> torch.dtype:
        """That of all tensors."""
        return self.readout.dtype

    @property
    def device(self) -> torch.device:
        """That of all tensors."""
        return self.readout.device

    def __repr__(self) -> str:
        return f"ParticleNetwork(widths={self.widths}, dtype={self.dtype}, device={self.device})"

    def tensors(self) -> list[Tensor]:
        """Every tensor of the network: masses, kernels, readout, biases."""
        return [*self.masses, *self.kernels, self.readout, *(bias for bias in self.biases if bias is not None)]

    def map(self, function: Callable[[Tensor], Tensor]) -> ParticleNetwork:
        """The network with `function` applied to every tensor."""
        biases = [None if bias is None else function(bias) for bias in self.biases]
        return ParticleNetwork.unchecked(
            self.architecture,
            [function(m) for m in self.masses],
            [function(k) for k in self.kernels],
            function(self.readout),
            biases,
        )

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> ParticleNetwork:
        """The network in another dtype, on another device."""
        working(dtype)
        return self.map(lambda tensor: tensor.to(dtype=dtype, device=device))

    def detach(self) -> ParticleNetwork:
        """The network without a graph."""
        return self.map(Tensor.detach)

    @property
    def flows(self) -> list[Tensor]:
        """w_ij p_i per layer, (M_l, M_{l-1}, kh, kw): the kernels that act on features; on layer 1 z / C_0."""
        channels = self.architecture.input_shape[0]
        sources = (self.readout.new_full((channels,), 1 / channels), *self.masses[:-1])
        # scaling the kernels costs M M' S products, scaling the features would cost N M P
        return [kernel * source[None, :, None, None] for kernel, source in zip(self.kernels, sources)]

    def responses(self, inputs: Tensor) -> Responses:
        """Pre-activations, features and output on inputs (N, C_0, H, W)."""
        preactivations, features = propagate(self.architecture, self.flows, self.biases, inputs)
        return Responses(preactivations, features, self.read(features[-1]))

    def read(self, features: Tensor) -> Tensor:
        """F = sum_j p_j <u_j, f_j>, (N, M_L, H, W) -> (N, K)."""
        read = self.architecture.readout_features(features)
        weights = self.readout * along_axis(self.masses[-1], self.readout, 1)
        return read.flatten(1) @ weights.flatten(1).T

    def features(self, inputs: Tensor) -> list[Tensor]:
        """f^l on inputs (N, C_0, H, W), one tensor (N, M_l, H'', W'') per layer."""
        return self.responses(self.check_inputs(inputs)).features

    def __call__(self, inputs: Tensor) -> Tensor:
        """F on inputs (N, C_0, H, W) -> (N, K)."""
        return self.output(self.check_inputs(inputs))

    def output(self, inputs: Tensor) -> Tensor:
        """F on inputs (N, C_0, H, W) -> (N, K); in blocks of images where no gradient is wanted, which would keep them
        all.
        """
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (inputs, *self.tensors())):
            return self.responses(inputs).output
        each = inputs.element_size() * self.architecture.entries(self.widths)
        output = inputs.new_empty(len(inputs), self.architecture.outputs)
        for block in limits.blocks(len(inputs), each):
            output[block] = self.responses(inputs[block]).output
        return output

    def check_inputs(self, inputs: Tensor) -> Tensor:
        """The inputs as they are; ValueError unless shape, dtype and device are those of the network."""
        self.architecture.check_inputs(inputs)
        if inputs.dtype != self.dtype or inputs.device != self.device:
            raise ValueError(
                f"inputs are {inputs.dtype} on {inputs.device}, the network is {self.dtype} on {self.device}; convert "
                "one with .to(...)"
            )
        return inputs

    def amplitudes(self, layer: int, norms: Tensor) -> Tensor:
        """int |w(z', z)| d rho(z') of every feature of `layer` (counted from 0, >= 1), from |w_ij| (M_l, M_{l-1})."""
        return norms @ self.masses[layer - 1]


def ordinary(tensor: Any) -> Any:
    """A copy of a tensor made under torch.inference_mode(), which would never take a gradient; anything else as it is.

    What differentiates runs outside of that mode, and finds here what it can differentiate.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def propagate(
    architecture: Architecture, flows: Sequence[Tensor], biases: Sequence[Tensor | None], inputs: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """g^l = sum_i flows^l_ij * f^{l-1}_i + b^l_j and f^l, layer by layer, of inputs (N, C_0, H, W)."""
    signal, preactivations, features = inputs, [], []
    for layer, flow, bias in zip(architecture.layers, flows, biases):
        preactivations.append(layer.convolve(signal, flow, bias))
        signal = layer.activate(preactivations[-1])
        features.append(signal)
    return preactivations, features


def along_axis(vector: Tensor, like: Tensor, axis: int) -> Tensor:
    """A vector (M,) in the shape that broadcasts it along one axis of `like`: one factor per particle, say."""
    return vector.reshape([-1 if index == axis else 1 for index in range(like.ndim)])


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _check_masses(masses: Tensor, argument: str) -> None:
    low, total = float(masses.detach().min()), float(masses.detach().sum())
    if low < 0:
        raise ValueError(f"{argument} has the negative entry {low:g}; masses are probabilities, at least 0")
    if abs(total - 1) > MASS_TOLERANCE[masses.dtype]:
        raise ValueError(f"{argument} sums to {total:.10g}; masses must sum to 1 (divide by their sum)")
