"""Ways to learn a task after others: what each keeps of the old ones, and what it makes of the new one's training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from meanfield.finite.terms import Term
from meanfield.forgetting.information import fisher
from meanfield.forgetting.penalties import Anchor, Distillation
from meanfield.forgetting.readout import readout_of
from meanfield.forgetting.tasks import Task, memory, united
from meanfield.validation import integer, nonnegative, positive


class Past(NamedTuple):
    """What was learnt so far.

    start: before all tasks.  networks: after each of the tasks.  heads: "task" or "one".  loss: a name of
    `recipes.LOSSES`.  seed: of what is drawn.
    """

    start: nn.Module
    networks: tuple[nn.Module, ...]
    tasks: tuple[Task, ...]
    heads: str
    loss: str
    seed: int

    @property
    def network(self) -> nn.Module:
        """After the last of the tasks."""
        return self.networks[-1]

    @property
    def old_heads(self) -> list[tuple[int, ...]]:
        """Of the outputs of the tasks so far: a head per task, or one of all."""
        return [task.classes for task in self.tasks] if self.heads == "task" else [united(self.tasks).classes]


class Stage(NamedTuple):
    """A training: from which network, on which images, with which terms, of which modules (None: all)."""

    network: nn.Module
    task: Task
    terms: Sequence[Term] = ()
    trained: Sequence[str] | None = None


@dataclass(frozen=True)
class FineTuning:
    """The new task alone, from the network of the old ones; nothing is kept."""

    name = "fine-tuning"

    def stage(self, past: Past, task: Task) -> Stage:
        """The last network, trained on the images of `task` alone."""
        return Stage(past.network, task)


@dataclass(frozen=True)
class EWC:
    """Elastic weight consolidation (Kirkpatrick et al. 2017, equation (3)): strength / 2 sum_i F_i (theta_i -
    theta*_i)^2 for every old task, F its exact diagonal Fisher information per image after its training (see `fisher`),
    theta* the network then.  Of an old task these two are kept.

    strength: as `fit` takes the mean loss of the new task, N_old / N_new would weigh every old image as a new one.
    """

    strength: float
    name = "EWC"

    def __post_init__(self) -> None:
        positive(self.strength, "strength")

    def stage(self, past: Past, task: Task) -> Stage:
        """The last network, trained on `task` with an `Anchor` of each old task."""
        return Stage(past.network, task, [self._anchor(past, index) for index in range(len(past.tasks))])

    def _anchor(self, past: Past, index: int) -> Anchor:
        network, task = past.networks[index], past.tasks[index]
        known = fisher(network, task.images, task.classes if past.heads == "task" else None, past.loss)
        return Anchor(dict(network.named_parameters()), {name: self.strength * each for name, each in known.items()})


@dataclass(frozen=True)
class L2SP:
    """L2-SP (Li, Grandvalet & Davoine 2018, equation (2)): strength / 2 |w - w_old|^2 on all parameters but the rows of
    the new classes in the readout, on which it is readout_strength / 2 |w|^2.  Rows of later tasks are free.

    readout: name of the linear layer whose rows are the outputs.  Of the old tasks the last network is kept.
    """

    strength: float
    readout: str
    readout_strength: float = 0.0
    name = "L2-SP"

    def __post_init__(self) -> None:
        positive(self.strength, "strength")
        nonnegative(self.readout_strength, "readout_strength")

    @torch.no_grad()
    def stage(self, past: Past, task: Task) -> Stage:
        """The last network, trained on `task` with one `Anchor`; Misuse where `readout` is no linear layer of it."""
        readout_of(past.network, self.readout)
        point, precision = {}, {}
        old = list(united(past.tasks).classes)
        for name, tensor in past.network.named_parameters():
            point[name], precision[name] = tensor.clone(), torch.full_like(tensor, self.strength)
            if name.rpartition(".")[0] == self.readout:
                precision[name] = torch.zeros_like(tensor)
                precision[name][old] = self.strength
                precision[name][list(task.classes)] = self.readout_strength
                point[name][list(task.classes)] = 0
        return Stage(past.network, task, [Anchor(point, precision)])


@dataclass(frozen=True)
class LwF:
    """Learning without forgetting (Li & Hoiem 2016): on the new task's images, every old head is held to its own
    answers, see `Distillation`; all is trained at once, without their warm-up of the new head.  Of the old tasks the
    last network is kept.
    """

    strength: float
    temperature: float = 2.0
    name = "LwF"

    def __post_init__(self) -> None:
        positive(self.strength, "strength")
        positive(self.temperature, "temperature")

    def stage(self, past: Past, task: Task) -> Stage:
        """The last network, trained on `task` with the `Distillation` of its own answers."""
        term = Distillation(past.network, past.old_heads, self.strength, self.temperature)
        return Stage(past.network, task, [term])


@dataclass(frozen=True)
class Replay:
    """The new task together with kept images of every old one, evenly over its classes; all images weigh the same.

    images: how many are kept of every old task, or None for all.
    """

    images: int | None = 100
    name = "replay"

    def __post_init__(self) -> None:
        if self.images is not None:
            integer(self.images, "images")

    def stage(self, past: Past, task: Task) -> Stage:
        """The last network, trained on what is kept of the old tasks and on `task`, in one pass."""
        kept = [each if self.images is None else memory(each, self.images, past.seed) for each in past.tasks]
        return Stage(past.network, united([*kept, task]))


@dataclass(frozen=True)
class FrozenTrunk:
    """Only the readout is trained after the first task; the rest stays, statistics of batch norm included.

    readout: name of the linear layer whose rows are the outputs.
    """

    readout: str
    name = "frozen trunk"

    def stage(self, past: Past, task: Task) -> Stage:
        """The last network, of which `readout` is trained on `task`; Misuse where it is no linear layer of it."""
        readout_of(past.network, self.readout)
        return Stage(past.network, task, trained=(self.readout,))


@dataclass(frozen=True)
class Joint:
    """All images of the tasks so far and of the new one, from the start anew: all is kept, so that nothing is lost."""

    name = "joint training"

    def stage(self, past: Past, task: Task) -> Stage:
        """The network from before all tasks, trained on the images of all."""
        return Stage(past.start, united([*past.tasks, task]))


Method = FineTuning | EWC | L2SP | LwF | Replay | FrozenTrunk | Joint
