"""A network as a function of its parameters: what landscapes and transfers move, and never the caller's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.func import functional_call

from meanfield.grafting.graft import frozen
from meanfield.measures import with_tensors
from meanfield.network import ParticleNetwork
from meanfield.validation import Misuse, WrongType

Parameters = dict[str, Tensor]
Network = nn.Module | ParticleNetwork
N = TypeVar("N", bound=Network)


class Subject:
    """A copy of a network in evaluation mode, and its parameters by name.

    parameters: detached copies.  Of a module as `named_parameters` has them; of a ParticleNetwork kernels.0, ...,
    readout and biases.0, ... where there are biases.  Its masses are no parameters: they are the measure.
    buffers: what else it holds, by name: running statistics, masses.
    Calls do not change it; dtype and device are the network's.
    """

    def __init__(self, network: Network, argument: str = "network") -> None:
        if isinstance(network, ParticleNetwork):
            self.network: Network = network.map(lambda tensor: tensor.detach().clone())
            self.parameters, self.buffers = _tensors(self.network), _masses(self.network)
        elif isinstance(network, nn.Module):
            self.network = frozen(network, argument)
            self.parameters = {name: tensor.clone() for name, tensor in self.network.named_parameters()}
            self.buffers = dict(self.network.named_buffers())
        else:
            raise WrongType(argument, type(network).__name__, "a torch.nn.Module or a ParticleNetwork")
        if not self.parameters:
            raise Misuse(argument, type(network).__name__, "has no parameters, so that nothing can move")

    def __call__(self, parameters: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """The outputs (N, ...) on inputs (N, ...) at other parameters; differentiable in them.

        Of a ParticleNetwork F, (N, K).
        """
        if isinstance(self.network, ParticleNetwork):
            return self.at(parameters).output(inputs)
        # buffers are copied, so that a module which changes one in evaluation mode changes nothing here
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        return functional_call(self.network, {**buffers, **parameters}, (inputs,))

    def at(self, parameters: Mapping[str, Tensor]) -> Any:
        """The network at other parameters, in evaluation mode: a ParticleNetwork, or a module with copies of them."""
        if isinstance(self.network, ParticleNetwork):
            masses = self.network.masses
            return with_tensors(self.network, [*masses, *(parameters[name] for name in self.parameters)])
        moved = frozen(self.network, "network")
        moved.load_state_dict(dict(parameters), strict=False)
        return moved

    def sibling(self, network: Network | Subject, argument: str) -> Parameters:
        """The parameters of another network of the same kind, names, shapes, dtype and device; Misuse otherwise."""
        other = network if isinstance(network, Subject) else Subject(network, argument)
        for name in {**self.parameters, **other.parameters}:
            here, there = (_described(each.parameters.get(name)) for each in (self, other))
            if here != there:
                raise Misuse(argument, name, f"is {there} there and {here} in the first network: give networks alike")
        return {name: other.parameters[name] for name in self.parameters}


def freed_like(network: N, like: Network) -> N:
    """The network itself, its parameters needing gradients where those of another of its kind do."""
    if isinstance(network, nn.Module) and isinstance(like, nn.Module):
        for mine, other in zip(network.parameters(), like.parameters()):
            mine.requires_grad_(other.requires_grad)
    return network


def _tensors(network: ParticleNetwork) -> Parameters:
    """In the order of `ParticleNetwork.tensors`, masses left out."""
    found = {f"kernels.{layer}": kernel for layer, kernel in enumerate(network.kernels)}
    biases = {f"biases.{layer}": bias for layer, bias in enumerate(network.biases) if bias is not None}
    return {**found, "readout": network.readout, **biases}


def _masses(network: ParticleNetwork) -> Parameters:
    return {f"masses.{layer}": masses for layer, masses in enumerate(network.masses)}


def _described(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
