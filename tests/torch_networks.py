"""Networks of torch modules: as users write them, and of every kind that fusion describes."""

from __future__ import annotations

import torch
from strategies import normal, seeded
from torch import Tensor, nn
from torch.nn import functional

from meanfield import finite
from meanfield.fusion.channels import Channels, chosen, moved

IMAGES = normal((150, 2, 12, 12), 0)
SMALL = normal((40, 1, 8, 8), 0)  # for the networks of KINDS


def filled(network: nn.Module, seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Every parameter drawn anew, of a size that keeps features of order one."""
    network = network.to(dtype)
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return network


def plain(width: int, seed: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Strides, dilation, two kinds of pooling, a layer without bias, an activation in place and one shared."""
    shared = nn.Tanh()
    network = nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1),
        shared,
        nn.MaxPool2d(2),
        nn.Conv2d(width, width + 1, 3, stride=2, padding="valid"),
        nn.ReLU(inplace=True),
        nn.Conv2d(width + 1, width, (2, 3), padding="same", dilation=(1, 2), bias=False),
        shared,
        nn.AvgPool2d(2, stride=1),
        nn.Conv2d(width, 3, 2, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.ReLU(),
        nn.Linear(5, 4),
    )
    return filled(network, seed, dtype)  # type: ignore[return-value]


class Block(nn.Module):
    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.down = nn.Conv2d(channels, outputs, 1, stride, bias=False) if stride > 1 or channels != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)), inplace=True)))
        return functional.relu(branch + (x if self.down is None else self.down(x)))


class Residual(nn.Module):
    """As a user would write it: functions between modules, a shortcut in every block, batch norm,
    a layer called twice.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.stage1 = nn.Sequential(Block(width, width, 1), Block(width, width, 1))
        self.stage2 = nn.Sequential(Block(width, 2 * width, 2))
        self.scale = nn.Identity()
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(functional.relu(self.norm(self.stem(x)))))
        x = self.scale(self.scale(functional.adaptive_avg_pool2d(x, 1)))
        return self.head(torch.flatten(x, 1))


def residual(width: int, seed: int) -> Residual:
    network = filled(Residual(width), seed)
    network.train()
    with torch.no_grad():
        network(normal((64, 2, 12, 12), seed + 50))  # running statistics that are not the default
    return network  # type: ignore[return-value]


def chain(seed: int = 0, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Two convolutions and two linear layers with biases, (N, 2, 6, 6) -> (N, 3)."""
    layers = [nn.Conv2d(2, 5, 3), activation(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 2), activation(), nn.Flatten()]
    return filled(nn.Sequential(*layers, nn.Linear(4, 6), activation(), nn.Linear(6, 3)), seed)


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


def normed(width: int, seed: int) -> nn.Module:
    """Batch norm of maps and of vectors, an activation in place, two pools, several positions behind the maps."""
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(width, 2 * width, 3, bias=False), nn.Tanh(), nn.Dropout(0.5), nn.Flatten()]
    layers += [nn.Linear(8 * width, 5), nn.BatchNorm1d(5, affine=False), nn.Tanh(), nn.Linear(5, 3)]
    return drawn(nn.Sequential(*layers), seed)


def deep(width: int, seed: int) -> nn.Module:
    return drawn(finite.vgg(8, (1, 8, 8), 3, width=width, generator=seeded()), seed)


def blocks(width: int, seed: int) -> nn.Module:
    return drawn(finite.residual((1, 8, 8), 3, width=width, blocks=(2, 1), batch_norm=False, generator=seeded()), seed)


def normed_blocks(width: int, seed: int) -> nn.Module:
    return drawn(finite.residual((1, 8, 8), 3, width=width, blocks=(2, 1), batch_norm=True, generator=seeded()), seed)


KINDS = {"plain": normed, "vgg": deep, "residual": blocks, "residual with batch norm": normed_blocks}


def shuffled(network: nn.Module, seed: int) -> nn.Module:
    """The same function, all hidden channels in another order."""
    channels, generator = Channels.of(network), seeded(seed)
    orders = {space: torch.randperm(channels.widths[space], generator=generator) for space in channels.hidden}
    return moved(network, channels, {space: chosen(order, len(order)) for space, order in orders.items()})


def tensors(network: nn.Module) -> list[torch.Tensor]:
    return list(network.state_dict().values())
