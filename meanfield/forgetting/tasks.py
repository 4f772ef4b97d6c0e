"""Tasks: images, labels, and the classes among which they are to be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from meanfield import validation
from meanfield.finite.heads import disjoint
from meanfield.signatures import Natural, Seed, checked
from meanfield.starts import salted
from meanfield.validation import Misuse, positive

HEADS = ("task", "one")


@dataclass(frozen=True, eq=False)
class Task:
    """Images of some of the classes that a network has outputs for.

    images (N, ...), labels (N,) int64, the output of every image's class; classes: the outputs of this task.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("images", "labels"):
            validation.instance(getattr(self, name), name, Tensor)
        validation.shaped(self.labels, (len(self.images),), "labels")
        if self.labels.dtype != torch.int64:
            raise Misuse("labels", self.labels.dtype, "must be torch.int64, the output of every image's class")
        object.__setattr__(self, "classes", disjoint((self.classes,), "classes")[0])
        strange = sorted(set(self.labels.tolist()) - set(self.classes))
        if strange:
            raise Misuse("classes", self.classes, f"must hold every class among the labels; {strange[0]} is missing")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"Task({len(self)} images, classes {self.classes})"

    def rows(self, rows: Tensor) -> Task:
        """Some of its images."""
        return Task(self.images[rows], self.labels[rows], self.classes)


@checked
def divided(images: Tensor, labels: Tensor, groups: Sequence[Sequence[int]]) -> tuple[Task, ...]:
    """A task for every group of classes, such as ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)), of images (N, ...) with labels
    (N,); images of no group are left out.
    """
    validation.shaped(labels, (len(images),), "labels")
    found = []
    for classes in disjoint(groups, "groups"):
        rows = torch.isin(labels, torch.tensor(classes, device=labels.device))
        if not bool(rows.any()):
            raise Misuse("groups", classes, "is a group of classes without an image")
        found.append(Task(images[rows], labels[rows], classes))
    return tuple(found)


@checked
def held_apart(
    tasks: Sequence[Task], share: Annotated[float, positive] = 0.2, seed: Seed = 0
) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """(training, validation): a share of every class of every task, at least one image, is kept for validation."""
    if share >= 1:
        raise Misuse("share", share, "must be less than 1")
    found = []
    for index, task in enumerate(every(tasks)):
        counts = task.labels.bincount()
        if int(counts[counts > 0].min()) < 2:
            raise Misuse("tasks", task, "has a class of one image, of which none can be kept for validation")
        apart = {label: max(1, min(int(share * n), n - 1)) for label, n in enumerate(counts.tolist()) if n}
        chosen = drawn(task, apart, f"validation {seed} {index}")
        found.append((task.rows(~chosen), task.rows(chosen)))
    training, validation_ = zip(*found)
    return training, validation_


def drawn(task: Task, counts: dict[int, int], salt: str) -> Tensor:
    """Which images are drawn, (N,) bool: of every class as many as `counts` says, or all where there are fewer.

    salt: text that the random numbers depend on, so that no start and no order of batches has the same ones.
    """
    generator = salted(f"forgetting {salt}")
    chosen = torch.zeros(len(task), dtype=torch.bool)
    for label, count in counts.items():
        members = (task.labels == label).nonzero().flatten().cpu()
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return chosen.to(task.labels.device)


@checked
def memory(task: Task, images: Natural, seed: Seed = 0) -> Task:
    """At most so many of a task's images, as evenly over its classes as can be: the first classes get one more."""
    each, more = divmod(images, len(task.classes))
    return task.rows(drawn(task, {label: each + (i < more) for i, label in enumerate(task.classes)}, f"memory {seed}"))


def united(tasks: Sequence[Task]) -> Task:
    """One task of all images and classes, in order."""
    every(tasks)
    images, labels = torch.cat([task.images for task in tasks]), torch.cat([task.labels for task in tasks])
    return Task(images, labels, tuple(dict.fromkeys(label for task in tasks for label in task.classes)))


def heads_of(tasks: Sequence[Task], heads: str) -> tuple[tuple[int, ...], ...] | None:
    """As `finite.fit` takes them: "task", the classes of every task, or "one", all outputs of the network."""
    validation.one_of(heads, "heads", HEADS)
    return disjoint([task.classes for task in every(tasks)], "tasks") if heads == "task" else None


def every(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """At least one, and tasks."""
    found = tuple(validation.instance(task, "tasks", Task) for task in validation.instance(tasks, "tasks", Sequence))
    if not found:
        raise Misuse("tasks", found, "must be at least one task")
    return found
