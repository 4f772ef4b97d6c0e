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


def keeps_classes_apart(labels: Tensor, first: int) -> bool:
    """Whether the first images are no fair choice: in fewer than half of the places where a random order changes class
    does this one, or it is sorted, or a class is missing among them that would be there in turn.
    """
    _, index, counts = labels.unique(return_inverse=True, return_counts=True)
    changes = int((index[1:] != index[:-1]).sum())
    expected = len(labels) - float(counts.double().square().sum()) / len(labels)
    runs = changes == len(counts) - 1 < len(labels) - 1 or changes < expected / 2
    return runs or len(index[:first].unique()) < min(first, len(counts))
