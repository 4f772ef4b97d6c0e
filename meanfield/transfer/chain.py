"""Layers of a network: by name with their parameters, and where they form a chain in the order of their calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from meanfield import finite
from meanfield.finite import FiniteCNN
from meanfield.network import ParticleNetwork
from meanfield.subject import Network
from meanfield.validation import Misuse


class Layer(NamedTuple):
    """name: of the submodule, or kernels.0, ..., readout.  parameters: all of them, targets along axis 0.  weight: the
    one with sources along axis 1, None of a normalisation.
    """

    name: str
    parameters: tuple[str, ...]
    weight: str | None


def layers(network: Network) -> list[Layer]:
    """Every layer that has parameters, in the order in which they were registered."""
    if isinstance(network, (FiniteCNN, ParticleNetwork)):
        own = "bias_parameters" if isinstance(network, FiniteCNN) else "biases"
        found = []
        for index, bias in enumerate(network.biases):
            kernel = f"kernels.{index}"
            found.append(Layer(kernel, (kernel, *(() if bias is None else (f"{own}.{index}",))), kernel))
        return [*found, Layer("readout", ("readout",), "readout")]
    return list(_of_module(network))


def _of_module(network: nn.Module) -> Iterator[Layer]:
    known = dict(network.named_parameters())  # a tied tensor is there once, and belongs to the first layer
    for name, module in network.named_modules():
        every = ((f"{name}.{each}".lstrip("."), tensor) for each, tensor in module.named_parameters(recurse=False))
        owned = {each: tensor for each, tensor in every if each in known}
        if owned:
            yield Layer(name, tuple(owned), next((each for each, tensor in owned.items() if tensor.ndim > 1), None))


def chain(network: Network, argument: str) -> list[tuple[str, nn.Module]]:
    """Modules that are called one after the other, by name, one that stands twice included; Misuse of what is no
    nn.Sequential of them, and of parameters that two places share.

    A FiniteCNN or ParticleNetwork as finite.sequential has it.
    """
    if isinstance(network, (FiniteCNN, ParticleNetwork)):
        network = finite.sequential(network)
    if type(network) is not nn.Sequential:
        raise Misuse(argument, type(network).__name__, "is no chain of layers: give an nn.Sequential, or particles")
    found = _flattened(network, "")
    seen: set[int] = set()
    for name, module in found:
        own = {id(tensor) for tensor in module.parameters()}
        if own & seen:
            remedy = "shares parameters with another place, so that it is no layer of its own"
            raise Misuse(argument, f"{name} ({type(module).__name__})", remedy)
        seen |= own
    return found


def _flattened(network: nn.Sequential, prefix: str) -> list[tuple[str, nn.Module]]:
    found = []
    for name, module in network._modules.items():  # named_children has a module that stands twice once
        assert module is not None
        place = f"{prefix}{name}"
        found += _flattened(module, f"{place}.") if type(module) is nn.Sequential else [(place, module)]
    return found


def require_chain(network: Network, argument: str) -> None:
    """Misuse unless the particles of a layer are written and read by neighbours in a chain alone."""
    if isinstance(network, (FiniteCNN, ParticleNetwork)):
        return
    for name, module in chain(network, argument):
        plain = isinstance(module, (nn.Linear, nn.Conv2d, _BatchNorm)) and getattr(module, "groups", 1) == 1
        if not plain and any(True for _ in module.parameters()):
            remedy = "is no layer of a chain, whose particles one layer writes and the next one reads"
            raise Misuse(argument, f"{name} ({type(module).__name__})", remedy)
