"""The straight line of parameters between two modules, and their batch norms along it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from meanfield.landscape.subject import require_alike
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
    """The network itself, the running statistics of its batch norms now those of all images, in one pass: means and
    variances (divided by the number, as `batch_norm.Statistics` has them) of what enters each with those before it.
    """
    found = [norm for _, norm in norms(network)]
    handles = [norm.register_forward_pre_hook(_settle) for norm in found]
    try:
        if found:
            network(torch.cat(list(images)))
    finally:
        for handle in handles:
            handle.remove()
    return network


def _settle(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Take the statistics of what is about to enter a batch norm in evaluation mode."""
    (signal,) = arguments
    assert isinstance(norm, _BatchNorm)
    variance, mean = torch.var_mean(signal, [axis for axis in range(signal.ndim) if axis != 1], correction=0)
    for kept, new in ((norm.running_mean, mean), (norm.running_var, variance)):
        assert kept is not None
        kept.copy_(new)


def norms(network: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Batch norms with running statistics, by name."""
    found = ((name, module) for name, module in network.named_modules() if isinstance(module, _BatchNorm))
    return [(name, module) for name, module in found if module.track_running_stats]
