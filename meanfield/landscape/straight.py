"""The straight line of parameters between two modules."""

from __future__ import annotations

import copy

import torch
from torch import nn

from meanfield.finite.statistics import norms
from meanfield.subject import require_alike
from meanfield.validation import Misuse


def require_line(first: nn.Module, second: nn.Module) -> None:
    """Misuse unless a line of parameters leads from one to the other: alike, and equal in what is no parameter but the
    running statistics of batch norm.
    """
    require_alike(first, second, "b")
    moved = {f"{name}.{each}" for name, norm in norms(first).items() for each, _ in norm.named_buffers()}
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
