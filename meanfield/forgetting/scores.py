"""How well every task is known after every task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meanfield.finite.fitting import Score, evaluate
from meanfield.forgetting.tasks import Task, heads_of
from meanfield.validation import Misuse


def score(network: nn.Module, tasks: Sequence[Task], heads: str = "task") -> tuple[Score, ...]:
    """Accuracy and cross-entropy of a network on the images of each task; any module with an output for every class.

    heads: "task", an image is decided among the classes of its task, or "one", among all outputs.
    """
    groups = heads_of(tasks, heads)
    return tuple(evaluate(network, task.images, task.labels, heads=groups) for task in tasks)


@dataclass(frozen=True, eq=False)
class Scores:
    """accuracies, losses: (S, T) float64, of S networks, such as those after every task, on T tasks."""

    accuracies: Tensor
    losses: Tensor

    @classmethod
    def of(cls, networks: Sequence[nn.Module], tasks: Sequence[Task], heads: str = "task") -> Scores:
        """Of every network on every task, see `score`."""
        if not len(networks):
            raise Misuse("networks", networks, "must be at least one network")
        found = torch.tensor([score(network, tasks, heads) for network in networks], dtype=torch.float64)
        return cls(found[..., 0], found[..., 1])

    @property
    def mean(self) -> float:
        """Mean accuracy over the tasks of the last network."""
        return float(self.accuracies[-1].mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy over the tasks of the last network."""
        return float(self.losses[-1].mean())

    @property
    def forgetting(self) -> float:
        """The mean over all tasks but the last of the best accuracy before minus that of the last network (Chaudhry et
        al. 2018, equation (3)); nan of one network or one task.
        """
        if min(self.accuracies.shape) < 2:
            return math.nan
        earlier = self.accuracies[:, :-1]
        return float((earlier[:-1].amax(0) - earlier[-1]).mean())
