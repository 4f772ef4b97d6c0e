"""Heads of a classifier: groups of its outputs, within which an image of one of their classes is decided."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from meanfield import validation
from meanfield.finite.recipes import of_classes
from meanfield.losses import Loss
from meanfield.validation import Misuse

# what an output of another head is taken for, so that it adds nothing to the loss and nothing to its gradient
ABSENT = {"cross_entropy": -torch.inf, "squared": 0.0}


class Heads:
    """Which outputs compete for an image of a class: those of the head that the class belongs to.

    groups: disjoint groups of outputs 0..outputs-1, one per head, or None for one head of all outputs.
    """

    def __init__(self, groups: Sequence[Sequence[int]] | None, outputs: int, device: torch.device | str) -> None:
        self.groups = None if groups is None else disjoint(groups, "heads")
        self.rivals: Tensor | None = None
        if self.groups is None:
            return
        head_of = torch.full((outputs,), -1)
        for index, group in enumerate(self.groups):
            if max(group) >= outputs:
                raise Misuse("heads", self.groups, f"must name outputs of the network, which are 0..{outputs - 1}")
            head_of[list(group)] = index
        self.rivals = ((head_of[:, None] == head_of) & (head_of >= 0)).to(device)

    def check(self, labels: Tensor) -> None:
        """Refuse labels that no head decides."""
        if self.rivals is not None and not bool(self.rivals.any(1)[labels].all()):
            stray = int(labels[~self.rivals.any(1)[labels]][0])
            raise Misuse("heads", self.groups, f"must hold every class among the labels; {stray} is in none of them")

    def loss(self, kind: str | Loss, outputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """A loss of a `Recipe` of outputs (N, K) at classes (N,) within their heads."""
        if isinstance(kind, str):
            outputs = self._of(outputs, labels, ABSENT[kind])
        elif self.rivals is not None:
            raise Misuse("loss", kind.name, f"has no value of an output that is absent: heads take {', '.join(ABSENT)}")
        return of_classes(kind)(outputs, labels, reduction=reduction)

    def hits(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """How many images have their largest output, within the head of their class, at their class."""
        return (self._of(outputs, labels, -torch.inf).argmax(1) == labels).sum()

    def _of(self, outputs: Tensor, labels: Tensor, absent: float) -> Tensor:
        return outputs if self.rivals is None else outputs.masked_fill(~self.rivals[labels], absent)


def disjoint(groups: Any, argument: str) -> tuple[tuple[int, ...], ...]:
    """Groups of classes, none in two of them, as tuples."""
    if isinstance(groups, (str, bytes)) or not isinstance(groups, Iterable):
        raise Misuse(argument, groups, "must be groups of classes such as ((0, 1, 2), (3, 4))")
    found = tuple(_group(group, argument) for group in groups)
    every = [label for group in found for label in group]
    if not found or len(set(every)) < len(every):
        raise Misuse(argument, found, "must be groups of classes, at least one, and no class twice")
    return found


def _group(group: Any, argument: str) -> tuple[int, ...]:
    entries = tuple(group) if isinstance(group, Iterable) and not isinstance(group, (str, bytes)) else ()
    if not entries:
        raise Misuse(argument, group, "must be a group of classes, at least one, such as (0, 1, 2)")
    return tuple(validation.integer(entry, argument, minimum=0) for entry in entries)
