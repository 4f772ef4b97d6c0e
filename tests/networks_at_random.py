"""Sequential networks of random layers, of the kinds that `landscape.layers` knows."""

from __future__ import annotations

import random

import torch
from torch import nn

ACTIVATIONS = (
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    nn.Tanh,
    nn.GELU,
    nn.Sigmoid,
    nn.LeakyReLU,
    lambda: nn.LeakyReLU(-0.5),
    nn.ELU,
    nn.SiLU,
    nn.ReLU6,
    lambda: nn.Softplus(threshold=1.0),
)


def network_at_random(seed: int, dtype: torch.dtype) -> tuple[nn.Sequential, tuple[int, int, int]]:
    """(N, C, H, W) -> (N, 4) and (C, H, W); batch norms have statistics of their own."""
    chance = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        channels, side = chance.choice((1, 2, 3)), chance.randint(4, 9)
        shape = (channels, side, side)
        layers = [chance.choice((nn.Identity, nn.Identity, lambda: nn.AvgPool2d(2, 1), ACTIVATIONS[1]))()]
        example = layers[0](torch.randn(2, *shape))
        for _ in range(chance.randint(1, 3)):
            for layer in _stage(chance, example.shape[1], example.shape[2]):
                layers.append(layer)
                example = layer.eval()(example)
        layers += chance.choice(([], [nn.AdaptiveAvgPool2d(1)], [nn.AdaptiveAvgPool2d(2)]))
        layers += [nn.Flatten(), *chance.choice(([], [nn.Dropout()], [nn.Tanh()]))]
        features = (
            nn.Sequential(*layers[1:]).eval()(torch.zeros(1, *layers[0](torch.randn(2, *shape)).shape[1:])).shape[1]
        )
        layers += chance.choice(([], [nn.Linear(features, features), nn.ReLU()]))
        network = nn.Sequential(nn.Sequential(*layers), nn.Linear(features, 4, bias=chance.random() < 0.5))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return network.to(dtype), shape


def _stage(chance: random.Random, channels: int, side: int) -> list[nn.Module]:
    targets, kernel = chance.choice((2, 4, 6)), chance.choice((1, 2, 3))
    groups = 2 if channels % 2 == 0 and chance.random() < 0.2 else 1
    padding = chance.choice((1, 1, 0 if kernel <= side else 1, "same" if kernel % 2 else 1))
    stride = 1 if padding == "same" else chance.choice((1, 1, 2))
    layers: list[nn.Module] = [
        nn.Conv2d(channels, targets, kernel, stride, padding, groups=groups, bias=chance.random() < 0.7)
    ]
    if chance.random() < 0.4:
        layers.append(nn.BatchNorm2d(targets, affine=chance.random() < 0.7))
    layers.append(chance.choice(ACTIVATIONS)())
    if chance.random() < 0.3:
        layers.append(nn.Dropout2d())
    pools = [
        lambda: nn.MaxPool2d(2, ceil_mode=True),
        lambda: nn.AvgPool2d(2, ceil_mode=True),
        lambda: nn.MaxPool2d(3, 1, 1),
    ]
    after = layers[0](torch.zeros(1, channels, side, side)).shape[2]
    pools += [lambda: nn.MaxPool2d(2), lambda: nn.MaxPool2d((2, 1))] * 2 if after >= 2 else []
    return [*layers, *([chance.choice(pools)()] if chance.random() < 0.7 else [])]
