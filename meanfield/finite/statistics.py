"""Running statistics of batch norm, taken of images: those of weights that never saw a training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]


def normalised(network: nn.Module) -> list[str]:
    """Names of the batch norms that have running statistics."""
    found = ((name, module) for name, module in network.named_modules() if isinstance(module, _BatchNorm))
    return [name for name, module in found if module.track_running_stats]


@torch.no_grad()
def recompute(network: nn.Module, images: Tensor) -> None:
    """Set the running statistics of every batch norm of a network in evaluation mode to those of all images (N, ...)
    in one pass, in which every batch norm takes what the ones before it make of the same images.
    """
    norms = {name: network.get_submodule(name) for name in normalised(network)}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    try:
        for norm in norms.values():
            norm.reset_running_stats()  # pyright: ignore[reportCallIssue]
            norm.momentum = None  # pyright: ignore[reportArgumentType]  # the mean over passes: of one pass its own
            norm.train()
        if norms:
            network(images)
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            norm.eval()
