"""Strengths chosen on images that are kept from the training, never on those that are held out to the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

from torch import nn

from meanfield.forgetting.scores import Scores
from meanfield.forgetting.tasks import Task, held_apart
from meanfield.signatures import Seed, checked
from meanfield.validation import Misuse, positive

C = TypeVar("C")


@dataclass(frozen=True, eq=False)
class Choice(Generic[C]):
    """best: the candidate chosen.  candidates: all.  accuracies, losses: of each on the validation images, means over
    the tasks.
    """

    best: C
    candidates: tuple[C, ...]
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]


@checked
def choose(
    candidates: Sequence[C],
    train: Callable[[C, tuple[Task, ...]], nn.Module],
    tasks: Sequence[Task],
    *,
    heads: str = "task",
    share: Annotated[float, positive] = 0.2,
    seed: Seed = 0,
) -> Choice[C]:
    """The candidate of the highest mean accuracy over the tasks on validation images, of several the one of the lowest
    cross-entropy there.

    candidates: anything that `train` takes: methods with strengths, factors alpha of a displacement, ...
    train: (candidate, tasks) -> a network with an output for every class.  It is given a part of the images only; a
        share of every class is kept for validation (`held_apart`, with `seed`), and is all that is judged.
    """
    if not len(candidates):
        raise Misuse("candidates", candidates, "must be at least one")
    training, validation = held_apart(tasks, share, seed)
    found = [Scores.of([train(each, training)], validation, heads) for each in candidates]
    index = max(range(len(found)), key=lambda i: (found[i].mean, -found[i].loss))
    accuracies, losses = tuple(each.mean for each in found), tuple(each.loss for each in found)
    return Choice(candidates[index], tuple(candidates), accuracies, losses)
