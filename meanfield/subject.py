"""A network as a function of its parameters: what landscapes and transfers move, and never the caller's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.func import functional_call

from meanfield import validation
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
            self.places = _places(self.network)
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
        # buffers and inputs are copied, so that a module which works in place changes nothing of the caller's
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        values = {**buffers, **parameters}
        placed = {place: values[name] for place, name in self.places.items()}
        return functional_call(self.network, placed, (inputs.clone(),), tie_weights=False)

    def at(self, parameters: Mapping[str, Tensor]) -> Any:
        """The network at other parameters, in evaluation mode: a ParticleNetwork, or a module with copies of them."""
        if isinstance(self.network, ParticleNetwork):
            masses = self.network.masses
            return with_tensors(self.network, [*masses, *(parameters[name] for name in self.parameters)])
        moved = frozen(self.network, "network")
        moved.load_state_dict(dict(parameters), strict=False)
        return moved

    def taken(self, images: Tensor, argument: str) -> Tensor:
        """Images (N, ...) in the network's dtype and on its device; Misuse unless they are at least one, of finite
        floats and of a shape that the network takes.
        """
        if not (images.is_floating_point() and len(images)):
            raise Misuse(argument, f"{images.dtype} {tuple(images.shape)}", "must be at least one image, of floats")
        found = validation.finite(images, argument).to(next(iter(self.parameters.values())))
        try:
            self(self.parameters, found[:1])
        except RuntimeError as error:
            remedy = f"is a shape that the network does not take: {str(error).splitlines()[0]}"
            raise Misuse(argument, tuple(images.shape), remedy) from None
        return found

    def sibling(self, network: Network | Subject, argument: str) -> Parameters:
        """The parameters of another network of the same kind, names, shapes, dtype and device; Misuse otherwise."""
        other = network if isinstance(network, Subject) else Subject(network, argument)
        for name in {**self.parameters, **other.parameters}:
            here, there = (described(each.parameters.get(name)) for each in (self, other))
            if here != there:
                raise Misuse(argument, name, f"is {there} there and {here} in the first network: give networks alike")
        return {name: other.parameters[name] for name in self.parameters}


def _places(network: nn.Module) -> dict[str, str]:
    """Where the tensors of a network stand, each module once, and their names: tied ones stand at several places.

    `functional_call` would find the places of tied tensors itself, but takes a module that is called twice for two, and
    leaves in it what it was given.
    """
    tensors = [*network.named_parameters(), *network.named_buffers()]
    names = {id(tensor): name for name, tensor in tensors}
    found = {}
    for prefix, module in network.named_modules():
        own = [*module.named_parameters("", False, False), *module.named_buffers("", False, False)]
        found |= {f"{prefix}.{name}" if prefix else name: names[id(tensor)] for name, tensor in own}
    return found


def require_alike(first: nn.Module, second: nn.Module, argument: str) -> None:
    """Misuse unless both are made of the same modules, as far as what they print of themselves tells."""
    ours, theirs = ({name: _printed(module) for name, module in each.named_modules()} for each in (first, second))
    for name in {**ours, **theirs}:
        here, there = ours.get(name, "missing"), theirs.get(name, "missing")
        if here != there:
            raise Misuse(argument, name, f"is {there} there and {here} in the first network: give networks alike")


def _printed(module: nn.Module) -> str:
    """Of a module with others in it the class alone: these come under names of their own."""
    return type(module).__name__ if next(module.children(), None) is not None else repr(module)


def moved(start: Mapping[str, Tensor], direction: Mapping[str, Tensor], step: float) -> Parameters:
    """start + step direction."""
    return {name: tensor + step * direction[name] for name, tensor in start.items()}


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


def described(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
