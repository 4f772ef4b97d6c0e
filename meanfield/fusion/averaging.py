"""Averages of networks, with their statistics put right: batch norm's recomputed, variances of other layers repaired.

REPAIR: Jordan, Sedghi, Saukh, Entezari & Neyshabur 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meanfield.fusion.channels import Channels, replaced
from meanfield.fusion.signals import by_channel, listening


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
        network(images)
        return {name: _spread(heard[name].leaving, widths[name]) for name in names}


def _spread(signal: Tensor, width: int) -> Spread:
    deviation, mean = torch.std_mean(by_channel(signal, width), 1, correction=0)
    return Spread(mean, deviation)


def _settle(network: nn.Module, channels: Channels, wanted: dict[str, Spread], images: Tensor) -> None:
    """Set statistics layer by layer, in one pass of all images: every layer sees what the settled ones below it make.

    The statistics of a batch norm are then exactly those of the images, however they would be cut into batches.
    """

    def take(norm: Any, args: tuple[Tensor, ...]) -> None:
        mean, deviation = _spread(args[0], len(norm.running_mean))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(deviation.square())

    def repair(layer: Any, _: Any, output: Tensor, name: str) -> Tensor:
        mean, deviation = _spread(output, len(layer.weight))
        factor = torch.where(deviation > 0, wanted[name].deviation / torch.where(deviation > 0, deviation, 1.0), 1.0)
        shift = wanted[name].mean - factor * mean
        along = (-1, *[1] * (layer.weight.ndim - 1))
        layer.weight.copy_(layer.weight * factor.reshape(along))
        old = torch.zeros_like(factor) if layer.bias is None else layer.bias * factor
        if layer.bias is None:
            layer.bias = nn.Parameter((old + shift).to(layer.weight), requires_grad=layer.weight.requires_grad)
        else:
            layer.bias.copy_(old + shift)
        shape = (1, *along[: output.ndim - 1])
        return (output * factor.reshape(shape) + shift.reshape(shape)).to(output)

    handles = [network.get_submodule(name).register_forward_pre_hook(take) for name in channels.norms]
    for name in wanted:

        def one(layer: Any, args: Any, output: Tensor, name: str = name) -> Tensor:
            return repair(layer, args, output, name)

        handles.append(network.get_submodule(name).register_forward_hook(one))
    try:
        if handles:
            network(images)
    finally:
        for handle in handles:
            handle.remove()
