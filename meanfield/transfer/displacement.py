"""What a training moved, and the same movement from another start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from meanfield.finite.statistics import norms, recompute
from meanfield.network import MASS_TOLERANCE, ParticleNetwork
from meanfield.signatures import checked
from meanfield.subject import N, Network, Parameters, Subject, freed_like, moved
from meanfield.transfer.chain import layers, require_chain
from meanfield.validation import Misuse


class Norm(NamedTuple):
    """Of a layer, its kernels, biases and scales together: |theta_0| and |Delta|."""

    start: float
    displacement: float

    @property
    def ratio(self) -> float:
        """|theta_0| / |Delta|; infinite where nothing moved."""
        return self.start / self.displacement if self.displacement else float("inf")


@dataclass(frozen=True, eq=False)
class Displacement:
    """Delta = theta_T - theta_0 of a trained network, in every parameter.

    subject: the start and its parameters.  delta: by name, shapes and dtypes of the parameters.

    Scales and shifts of batch norm are parameters like others.  Running statistics are none: they belong to weights
    and images together, and are never added, see `applied`.  Masses of a ParticleNetwork are the measure, and equal.
    """

    subject: Subject
    delta: Parameters

    def __repr__(self) -> str:
        return f"Displacement({type(self.subject.network).__name__}, {len(self.delta)} tensors)"

    @classmethod
    def between(cls, start: Network, end: Network) -> Displacement:
        """end - start, of two networks alike: modules of the same parameters, or ParticleNetworks of equal masses."""
        subject = _subject(start, "start")
        ends = subject.sibling(_subject(end, "end"), "end")
        return cls(subject, {name: ends[name] - tensor for name, tensor in subject.parameters.items()})

    @checked
    def applied(self, start: N, alpha: float = 1.0, images: Tensor | None = None) -> N:
        """start + alpha Delta: a copy of the network `start` in evaluation mode, to be trained on where `start` is.

        images: (N, ...), needed where there is batch norm: its running statistics are those of all of them in the new
            network (`finite.statistics`).
        """
        subject = _subject(start, "start")
        theirs = self.subject.sibling(subject, "start")
        network: N = subject.at(moved(theirs, self.delta, alpha))
        normed = list(norms(network)) if isinstance(network, nn.Module) else []
        if isinstance(network, nn.Module) and normed:
            if images is None:
                raise Misuse("images", images, f"must be given: the running statistics of {normed[0]} are theirs")
            recompute(network, [subject.taken(images, "images")], "start")
        return freed_like(network, start)

    @checked
    def shuffled(self, generator: torch.Generator, consistent: bool = True) -> Displacement:
        """The same movement dealt anew to the particles (channels, units) of every hidden layer.

        consistent: a particle's movement goes as a whole, what comes into it and what leaves it.  The displacement is
            then the same one with its particles listed in another order.  For chains of layers: an nn.Sequential of
            convolutions, linear layers and batch norms, a FiniteCNN, a ParticleNetwork.
        Otherwise every layer deals what comes into its particles by a permutation of its own and what leaves them
        stays, so that layers no longer fit each other.  For any module.
        """
        if consistent:
            require_chain(self.subject.network, "displacement")
        found, order, known = dict(self.delta), None, layers(self.subject.network)
        weighted = [index for index, layer in enumerate(known) if layer.weight is not None]
        for index, layer in enumerate(known):
            if consistent and order is not None and layer.weight is not None:
                found[layer.weight] = _by_source(found[layer.weight], order)
            if not (weighted and weighted[0] <= index < weighted[-1]):
                continue  # inputs and outputs are nobody's particles
            if layer.weight is not None or not consistent:  # consistent, a batch norm has those of the layer below
                count = len(found[layer.parameters[0]])
                order = torch.randperm(count, generator=generator, device=generator.device)
                order = order.to(found[layer.parameters[0]].device)
            found |= {name: found[name][order] for name in layer.parameters}
        return Displacement(self.subject, found)

    def norms(self) -> dict[str, Norm]:
        """Of every layer, by its name: that of the submodule, or kernels.0, ..., readout."""
        return {
            layer.name: Norm(*(_norm([each[name] for name in layer.parameters]) for each in self._pair))
            for layer in layers(self.subject.network)
        }

    @property
    def _pair(self) -> tuple[Parameters, Parameters]:
        return self.subject.parameters, self.delta


def _subject(network: Network, argument: str) -> Subject:
    """Misuse where masses are not equal."""
    subject = Subject(network, argument)
    for layer, masses in enumerate(network.masses if isinstance(network, ParticleNetwork) else ()):
        if float((masses * len(masses) - 1).abs().max()) > MASS_TOLERANCE[masses.dtype]:
            raise Misuse(argument, f"masses[{layer}]", "must be equal: draw a network of equal masses by finite.sample")
    return subject


def _by_source(weight: Tensor, order: Tensor) -> Tensor:
    """Sources in another order; of a linear layer behind flattened maps the positions of a channel go together."""
    return weight.reshape(len(weight), len(order), -1)[:, order].reshape(weight.shape)


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())
