"""In which order images are taken: that of their source, unless it keeps classes apart."""

from __future__ import annotations

import torch
from torch import Tensor


def in_turn(labels: Tensor) -> Tensor:
    """Indices that take one image of every class in turn, each class in its own order."""
    _, index, counts = labels.unique(return_inverse=True, return_counts=True)
    by_class = index.argsort(stable=True)
    turn = torch.empty_like(index)
    turn[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return (turn * len(counts) + index).argsort()


def keeps_classes_apart(labels: Tensor) -> bool:
    """Whether they are sorted, or change in fewer than half of the places where those of a random order would."""
    _, index, counts = labels.unique(return_inverse=True, return_counts=True)
    changes = int((index[1:] != index[:-1]).sum())
    expected = len(labels) - float(counts.double().square().sum()) / len(labels)
    return changes == len(counts) - 1 < len(labels) - 1 or changes < expected / 2


def misses_a_class(labels: Tensor, first: int) -> bool:
    """Whether one has no image among the first ones, that are enough for all; or they are of one class alone."""
    there, every = len(labels[:first].unique()), len(labels.unique())
    return there < every <= first or there == 1 < min(first, every)
