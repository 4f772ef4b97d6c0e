"""Averages of networks, with their statistics put right: batch norm's recomputed, variances of other layers repaired.

REPAIR: Jordan, Sedghi, Saukh, Entezari & Neyshabur 2023.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meanfield.finite.statistics import buffers, recompute, taking
from meanfield.fusion.channels import Channels, replaced
from meanfield.fusion.signals import IMAGES, by_channel, listening
from meanfield.network import along_axis


class Spread(NamedTuple):
    """Mean and standard deviation of every channel, (C,) each, float64."""

    mean: Tensor
    deviation: Tensor


def average(networks: Sequence[nn.Module], channels: Channels, images: Tensor, *, repair: bool) -> nn.Module:
    """The mean of all weights; batch norm takes its statistics anew from the images.

    repair: also give what every hidden layer without batch norm puts out, channel by channel, the mean and the standard
        deviation that the networks have there on average; layers without a bias get one.  A channel that is constant
        in the average keeps its deviation of zero.
    """
    states = [network.state_dict() for network in networks]
    names = [name for name, _ in channels.axes() if name in states[0]]
    mean = replaced(networks[0], {name: torch.stack([state[name] for state in states]).mean(0) for name in names})
    wanted = _wanted(networks, channels, images) if repair else {}
    _settle(mean, channels, wanted, images)
    return mean


def _wanted(networks: Sequence[nn.Module], channels: Channels, images: Tensor) -> dict[str, Spread]:
    """What the outputs of hidden layers without batch norm are to have."""
    names = [layer.name for layer in channels.layers if layer.norm is None and layer.target != channels.output]
    spreads = [_spreads(network, names, channels, images) for network in networks]
    return {
        name: Spread(*(torch.stack(parts).mean(0) for parts in zip(*(each[name] for each in spreads))))
        for name in names
    }


def _spreads(network: nn.Module, names: list[str], channels: Channels, images: Tensor) -> dict[str, Spread]:
    widths = {layer.name: channels.widths[layer.target] for layer in channels.layers}
    with listening(network, names) as heard:
        network(images.clone())
        return {name: _spread(heard[name].leaving, widths[name]) for name in names}


def _spread(signal: Tensor, width: int) -> Spread:
    deviation, mean = torch.std_mean(by_channel(signal, width), 1, correction=0)
    return Spread(mean, deviation)


def _settle(network: nn.Module, channels: Channels, wanted: dict[str, Spread], images: Tensor) -> None:
    """Set statistics layer by layer: every layer sees what the settled ones below it make of all images, which go
    through at once where anything is repaired.
    """
    if not wanted:
        recompute(network, images.split(IMAGES))
        return
    own = dict(network.named_buffers())
    found = {name: own[name] for norm in channels.norms for name in buffers(norm)}
    with taking(network, list(channels.norms), found), _repairing(network, wanted):
        network(images.clone())


@contextmanager
def _repairing(network: nn.Module, wanted: dict[str, Spread]) -> Iterator[None]:
    """Within it, a pass gives the outputs of these layers the means and deviations that are wanted."""

    def hook(name: str) -> Any:
        return lambda layer, _, output: _repaired(layer, output, wanted[name])

    with ExitStack() as hooks:
        for name in wanted:
            hooks.enter_context(network.get_submodule(name).register_forward_hook(hook(name)))
        yield


def _repaired(layer: Any, output: Tensor, wanted: Spread) -> Tensor:
    """What the layer puts out with its weights and bias changed, as they are from here on."""
    mean, deviation = _spread(output, len(layer.weight))
    factor = torch.where(deviation > 0, wanted.deviation / torch.where(deviation > 0, deviation, 1.0), 1.0)
    shift = wanted.mean - factor * mean
    layer.weight.copy_(along_axis(factor, layer.weight, 0) * layer.weight)
    bias = shift if layer.bias is None else layer.bias * factor + shift
    if layer.bias is None:
        layer.bias = nn.Parameter(bias.to(layer.weight), requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(bias)
    return (output * along_axis(factor, output, 1) + along_axis(shift, output, 1)).to(output)
