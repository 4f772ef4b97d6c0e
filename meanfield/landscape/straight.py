"""The straight line of parameters between two modules, and their batch norms along it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from meanfield.subject import require_alike
from meanfield.validation import Misuse


def require_line(first: nn.Module, second: nn.Module) -> None:
    """Misuse unless a line of parameters leads from one to the other: alike, and equal in what is no parameter but the
    running statistics of batch norm.
    """
    require_alike(first, second, "b")
    moved = {f"{name}.{each}" for name, norm in norms(first) for each, _ in norm.named_buffers()}
    others = dict(second.named_buffers())
    for name, buffer in first.named_buffers():
        if name not in moved and not torch.equal(buffer, others[name]):
            raise Misuse("b", name, "is a buffer that differs from that of a, and no parameter")


@torch.no_grad()
def straight(first: nn.Module, second: nn.Module, t: float) -> nn.Module:
    """The first network with parameters (1 - t) first + t second."""
    joined = copy.deepcopy(first)
    for mine, other in zip(joined.parameters(), second.parameters()):
        mine.requires_grad_(False).lerp_(other, t)
    return joined


@torch.no_grad()
def renormalised(network: nn.Module, images: Sequence[Tensor]) -> nn.Module:
    """The network itself, the running statistics of its batch norms now those of all images, in one pass."""
    found = [norm for _, norm in norms(network)]
    kept = [norm.momentum for norm in found]
    for norm in found:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over passes: of one pass its own
        norm.train()
    if found:
        network(torch.cat(list(images)))
    for norm, momentum in zip(found, kept):
        norm.momentum = momentum
        norm.eval()
    return network


def norms(network: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Batch norms with running statistics, by name."""
    found = ((name, module) for name, module in network.named_modules() if isinstance(module, _BatchNorm))
    return [(name, module) for name, module in found if module.track_running_stats]
