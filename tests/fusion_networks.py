"""Networks of every kind that fusion describes, and what is done to their channels by hand."""

from __future__ import annotations

import torch
from strategies import normal, seeded
from torch import nn

from meanfield.finite import residual, vgg
from meanfield.fusion.channels import Channels, chosen, moved

IMAGES = normal((40, 1, 8, 8), 0)


def drawn(network: nn.Module, seed: int) -> nn.Module:
    """Every tensor drawn anew, running statistics included; float64, in evaluation mode, without gradients."""
    network, generator = network.double(), seeded(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.3
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return network.eval().requires_grad_(False)


def plain(width: int, seed: int) -> nn.Module:
    """Batch norm of maps and of vectors, an activation in place, two pools, several positions behind the maps."""
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, 2 * width, 3, bias=False), nn.Tanh(), nn.Dropout(0.5), nn.Flatten()]
    layers += [nn.Linear(8 * width, 5), nn.BatchNorm1d(5, affine=False), nn.Tanh(), nn.Linear(5, 3)]
    return drawn(nn.Sequential(*layers), seed)


def deep(width: int, seed: int) -> nn.Module:
    return drawn(vgg(8, (1, 8, 8), 3, width=width, generator=seeded()), seed)


def blocks(width: int, seed: int) -> nn.Module:
    return drawn(residual((1, 8, 8), 3, width=width, blocks=(2, 1), batch_norm=False, generator=seeded()), seed)


def normed_blocks(width: int, seed: int) -> nn.Module:
    return drawn(residual((1, 8, 8), 3, width=width, blocks=(2, 1), batch_norm=True, generator=seeded()), seed)


KINDS = {"plain": plain, "vgg": deep, "residual": blocks, "residual with batch norm": normed_blocks}


def shuffled(network: nn.Module, seed: int) -> nn.Module:
    """The same function, all hidden channels in another order."""
    channels, generator = Channels.of(network), seeded(seed)
    orders = {space: torch.randperm(channels.widths[space], generator=generator) for space in channels.hidden}
    return moved(network, channels, {space: chosen(order, len(order)) for space, order in orders.items()})


def tensors(network: nn.Module) -> list[torch.Tensor]:
    return list(network.state_dict().values())
