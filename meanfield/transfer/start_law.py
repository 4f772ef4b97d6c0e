"""The law of a start: independent centred Gaussians, one standard deviation per tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from meanfield.finite import FiniteCNN
from meanfield.finite.scaling import SCALINGS
from meanfield.network import ParticleNetwork
from meanfield.signatures import Nonnegative, Positive, checked
from meanfield.starts import normal
from meanfield.subject import N, Network, Parameters, Subject, freed_like
from meanfield.transfer.chain import layers
from meanfield.validation import Misuse


@dataclass(frozen=True)
class StartLaw:
    """deviations: name of a parameter -> standard deviation of its entries, which are independent with mean zero.

    Parameters of batch norm have none: they start where they are.
    """

    deviations: Mapping[str, float]

    @classmethod
    @checked
    def he(cls, network: nn.Module, gain: Positive = 2.0) -> StartLaw:
        """He et al. 2015, eq. (10): weights of variance gain / fan-in, 1 / fan-in in the last layer; biases zero.

        gain: 2 before a ReLU, 1 before tanh.  A FiniteCNN has the gains of its activations, and its scaling, which
        must not be "mean_field".
        """
        if isinstance(network, FiniteCNN):
            if network.scaling == SCALINGS["mean_field"]:
                raise Misuse("network", network.scaling.name, "has another start: use StartLaw.mean_field")
            found = network.scaling.deviations(network.architecture, network.widths)
        else:
            weights = [layer.weight for layer in layers(network) if layer.weight is not None]
            fan_ins = [network.get_parameter(weight)[0].numel() for weight in weights]
            gains = [gain] * (len(weights) - 1) + [1.0]
            found = [math.sqrt(each / fan_in) for each, fan_in in zip(gains, fan_ins)]
        return cls._of_weights(network, found)

    @classmethod
    @checked
    def mean_field(cls, network: FiniteCNN | ParticleNetwork, kernel: Nonnegative = 1.0) -> StartLaw:
        """Of order one in the mean-field scaling: kernels of layer 1 sqrt(C_0), its bias 1, the readout 1, as in
        `starts.start`; later biases zero.

        kernel: of later layers.  Independent kernels vanish in the limit like 1 / sqrt(m), whatever it is.
        """
        if isinstance(network, FiniteCNN) and network.scaling != SCALINGS["mean_field"]:
            raise Misuse("network", network.scaling.name, "has another start: use StartLaw.he")
        architecture = network.architecture
        found = [math.sqrt(architecture.input_shape[0]), *[kernel] * (architecture.depth - 1), 1.0]
        law = cls._of_weights(network, found)
        first = layers(network)[0]
        return cls({**law.deviations, **{name: 1.0 for name in first.parameters if name != first.weight}})

    @classmethod
    def measured(cls, start: Network) -> StartLaw:
        """Root mean squares of the weights and biases of a start: for rules that are none of these."""
        parameters = Subject(start, "start").parameters
        known = [layer for layer in layers(start) if layer.weight is not None]
        names = [name for layer in known for name in layer.parameters]
        return cls({name: float(parameters[name].double().square().mean().sqrt()) for name in names})

    @classmethod
    def _of_weights(cls, network: Network, deviations: list[float]) -> StartLaw:
        known = [layer for layer in layers(network) if layer.weight is not None]
        found = {name: 0.0 for layer in known for name in layer.parameters}
        return cls({**found, **{str(layer.weight): each for layer, each in zip(known, deviations)}})

    @checked
    def scaled(self, factor: Nonnegative) -> StartLaw:
        """All deviations times a factor."""
        return StartLaw({name: factor * each for name, each in self.deviations.items()})

    @checked
    def draw(self, network: N, generator: torch.Generator) -> N:
        """A start of this law: a copy of the network, in evaluation mode, with new weights and biases."""
        subject = Subject(network)
        drawn = {
            name: deviation * normal(subject.parameters[name].shape, generator, subject.parameters[name])
            for name, deviation in self.known_to(subject).items()
        }
        return freed_like(subject.at({**subject.parameters, **drawn}), network)

    def known_to(self, subject: Subject) -> dict[str, float]:
        """The deviations, of the parameters of that network and no others; Misuse otherwise."""
        needed = [name for layer in layers(subject.network) if layer.weight is not None for name in layer.parameters]
        if set(needed) != set(self.deviations):
            odd = sorted(set(needed) ^ set(self.deviations))[0]
            raise Misuse("start_law", odd, "is a parameter of the law or of the network and not of the other one")
        return {name: self.deviations[name] for name in needed}


def constant(subject: Subject, law: StartLaw) -> Parameters:
    """Tensors that hold the deviation of every entry, in the shapes of the parameters."""
    return {name: torch.full_like(subject.parameters[name], each) for name, each in law.known_to(subject).items()}
