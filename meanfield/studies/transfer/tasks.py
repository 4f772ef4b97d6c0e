"""Tasks in sequence: what every method knows after all of them, at a strength chosen on images kept from training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from meanfield import forgetting, fusion, transfer
from meanfield.bench.classifiers import Classifier
from meanfield.bench.stored import Stored
from meanfield.bench.sweep import Cell, Row
from meanfield.forgetting import EWC, L2SP, FineTuning, FrozenTrunk, Joint, Learnt, LwF, Replay, Scores, Task
from meanfield.forgetting.methods import Method
from meanfield.forgetting.readout import narrowed, readout_of, widened
from meanfield.forgetting.tasks import united
from meanfield.storage.tensors import digest
from meanfield.studies.transfer.judged import divided
from meanfield.validation import Misuse

KIND = "meanfield tasks 1"  # of a file of the store
APART = 10_000  # between seeds of the starts of further tasks: a plan counts its own ones up
POINTS = 11  # of the line between two networks

Networks = list[nn.Module]  # after every task


@dataclass(frozen=True, eq=False)
class Course:
    """Trainings on tasks, which methods share: each is in the store once, and goes on there after a kill.

    classifier: the first start, its seed, and the recipe.  heads: "task" or "one".
    """

    classifier: Classifier
    heads: str
    store: str

    def learnt(self, tasks: Sequence[Task], method: Method) -> Networks:
        """By a method of `forgetting`, which learns the first task as all others do."""
        return self._trained(self.classifier, tasks, method, [self.alone(tasks[0], self.classifier)])

    def alone(self, task: Task, start: Classifier) -> nn.Module:
        """A network that knows one task."""
        return self._trained(start, [task], FineTuning(), [])[0]

    def start_of(self, index: int, own: bool = False) -> Classifier:
        """Of a network that learns this task alone: a start for every task, or the first one's for all."""
        seed = self.classifier.seed
        return self.classifier if own or not index else self.classifier.variant(seed=seed + 1 + APART * (index - 1))

    @property
    def readout(self) -> str:
        """Name of the last linear layer."""
        return [name for name, each in self.classifier.start().named_modules() if isinstance(each, nn.Linear)][-1]

    def _trained(self, start: Classifier, tasks: Sequence[Task], method: Method, begun: Networks) -> Networks:
        data = [[task.classes, digest((task.images, task.labels))] for task in tasks]
        how = {"method": [method.name, asdict(method)], "heads": self.heads, "tasks": data}
        stored = Stored(self.store, KIND, {**start.decided(), **how})
        kept = stored.read()
        if kept is None:
            learn = partial(forgetting.learn, start.start(), tasks, method, start.recipe, start.seed, heads=self.heads)
            kept = _kept(lambda: stored.resumed(lambda state: learn(begun=begun, state=state)))
            stored.write(kept)
        return [*begun, *(_network(start, index, kept) for index in range(len(begun), len(tasks)))]


def _kept(learn: Callable[[], Learnt]) -> dict[str, Tensor]:
    """The networks after the tasks that were learnt to their end; none where EWC, after a strength that was too large
    blew a network up, finds no information left.
    """
    try:
        found = learn()
    except Misuse as error:
        if error.argument != "network":
            raise
        return {}
    if found.status == "interrupted":
        raise KeyboardInterrupt
    networks = enumerate(found.networks)
    return {f"{index}/{name}": tensor for index, each in networks for name, tensor in each.state_dict().items()}


def _network(start: Classifier, index: int, kept: dict[str, Tensor]) -> nn.Module:
    """After a task; where the training diverged, one whose outputs are all 0, so that it loses against any other."""
    network, prefix = start.start().to(start.device).eval(), f"{index}/"
    found = {name.removeprefix(prefix): tensor for name, tensor in kept.items() if name.startswith(prefix)}
    if found:
        network.load_state_dict(found)
        return network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    return network


def _by(make: Callable[[str, float], Method], course: Course, tasks: Sequence[Task], strength: float) -> Networks:
    return course.learnt(tasks, make(course.readout, strength))


def _moved(course: Course, tasks: Sequence[Task], alpha: float, *, own: bool) -> Networks:
    """theta_A + alpha Delta_B, + alpha Delta_C, ...: displacements of networks that learnt one task each."""
    networks = [course.alone(tasks[0], course.classifier)]
    for index, task in enumerate(tasks[1:], 1):
        start = course.start_of(index, own)
        displacement = transfer.Displacement.between(start.start().to(start.device), course.alone(task, start))
        networks.append(displacement.applied(networks[-1], alpha, task.images))
    return networks


def _fused(course: Course, tasks: Sequence[Task], _: float, *, method: str) -> Networks:
    """The networks of the tasks so far as one."""
    first, heads = _heads(course, tasks)
    so_far = range(2, len(tasks) + 1)
    return [first, *(_added(course, heads[:count], tasks[count - 1].images, method) for count in so_far)]


def _reduced(course: Course, tasks: Sequence[Task], _: float, *, images: Callable[..., Task]) -> Networks:
    """The union of what there is with the next task's network, reduced to the width of one, task by task.

    images: tasks so far -> those on whose images it is reduced.
    """
    first, heads = _heads(course, tasks)
    networks, known = [first], heads[0]
    for index in range(1, len(tasks)):
        seen = images(tasks[: index + 1]).images
        known = fusion.reduce(_added(course, [known, heads[index]], seen, "union"), first, seen)
        networks.append(known)
    return networks


def _heads(course: Course, tasks: Sequence[Task]) -> tuple[nn.Module, Networks]:
    """The first task's network as it is, and those of all tasks with the rows of their own classes alone."""
    networks = [course.alone(task, course.start_of(index)) for index, task in enumerate(tasks)]
    outputs = readout_of(networks[0], course.readout).out_features
    heads = [
        widened(narrowed(each, course.readout, task.classes), course.readout, task.classes, outputs)
        for each, task in zip(networks, tasks)
    ]
    return networks[0], heads


def _added(course: Course, heads: Networks, images: Tensor, method: str) -> nn.Module:
    """Fused, and of outputs the sum in place of the mean: a head is then as loud as in the network it is from."""
    fused = fusion.fuse(heads[0], heads[1], images, method, others=heads[2:])  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in readout_of(fused, course.readout).parameters():
            parameter *= len(heads)
    return fused


class Way(NamedTuple):
    """networks(course, tasks, strength).  strengths: those that are tried on validation images; none: it has none."""

    networks: Callable[[Course, Sequence[Task], float], Networks]
    strengths: tuple[float, ...] = ()


ALPHAS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
REDUCED = "reduced union"
WAYS = {
    "fine-tuning": Way(partial(_by, lambda readout, _: FineTuning())),
    "EWC": Way(partial(_by, lambda readout, strength: EWC(strength)), (1.0, 10.0, 100.0, 1000.0, 3000.0)),
    "L2-SP": Way(partial(_by, lambda readout, strength: L2SP(strength, readout)), (1e-3, 1e-2, 0.1, 1.0)),
    "LwF": Way(partial(_by, lambda readout, strength: LwF(strength)), (0.3, 1.0, 3.0, 10.0)),
    "replay": Way(partial(_by, lambda readout, _: Replay())),
    "frozen trunk": Way(partial(_by, lambda readout, _: FrozenTrunk(readout))),
    "joint training": Way(partial(_by, lambda readout, _: Joint())),
    "displacement from another start": Way(partial(_moved, own=False), ALPHAS),
    "displacement from the same start": Way(partial(_moved, own=True), ALPHAS),
    "average": Way(partial(_fused, method="average")),
    "ensemble": Way(partial(_fused, method="union")),
    REDUCED: Way(partial(_reduced, images=lambda tasks: tasks[-1])),
    "reduced union, images of all tasks": Way(partial(_reduced, images=united)),
}
METHODS = tuple(WAYS)


def tasks(cell: Cell, store: str) -> list[Row]:
    """One row: a method after all tasks, on held-out images.

    cell: network (a Classifier), groups (classes of the tasks), names (with heads and method).  Tasks are made of the
    study's training and validation images; a share of these chooses a strength, and the method then has all of them.
    accuracy_1, loss_1, ...: of every task; accuracy, loss: their means; forgetting: see `Scores`.  status: "diverged"
        where the last training did, and nothing is known.
    chosen: the strength, None without; strengths, validation_accuracies, validation_losses: all that were tried.
    line_1, line_2: accuracies on the first two tasks on the straight line from the network after the first task to the
        last one; empty for more than two tasks and for networks of other shapes.
    """
    names, way = cell["names"], WAYS[cell["names"]["method"]]
    course = Course(Classifier.from_dict(cell["network"]), names["heads"], store)
    learning, held_out = _tasks(course.classifier, cell["groups"])
    row: Row = {**names, **_choice(way, course, learning)}
    networks = way.networks(course, learning, row["chosen"] or 0.0)
    scores = Scores.of(networks, held_out, course.heads)
    for index, (accuracy, loss) in enumerate(zip(scores.accuracies[-1].tolist(), scores.losses[-1].tolist()), 1):
        row |= {f"accuracy_{index}": accuracy, f"loss_{index}": loss}
    row |= {"accuracy": scores.mean, "loss": scores.loss, "forgetting": scores.forgetting}
    row["status"] = "completed" if any(bool(each.any()) for each in networks[-1].parameters()) else "diverged"
    on_line = list(_line(networks, united(learning).images)) if len(held_out) == 2 else []
    found = Scores.of(on_line, held_out, course.heads).accuracies.T.tolist() if on_line else [[], []]
    return [{**row, "line_1": found[0], "line_2": found[1]}]


def _choice(way: Way, course: Course, learning: Sequence[Task]) -> Row:
    """The strength that does best on images kept from the training, and how all did."""
    names = ("chosen", "strengths", "validation_accuracies", "validation_losses")
    if not way.strengths:
        return dict(zip(names, (None, [], [], [])))

    def train(strength: float, training: Sequence[Task]) -> nn.Module:
        return way.networks(course, training, strength)[-1]

    seed = course.classifier.seed
    choice = forgetting.choose(way.strengths, train, learning, heads=course.heads, seed=seed)
    return dict(zip(names, (choice.best, *map(list, (choice.candidates, choice.accuracies, choice.losses)))))


def _tasks(classifier: Classifier, groups: Sequence[Sequence[int]]) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """To learn from and choose by; held out."""
    training, validation, held_out = divided(classifier)
    images, labels = (torch.cat(parts) for parts in zip(training, validation))
    return forgetting.divided(images, labels, groups), forgetting.divided(*held_out, groups)


def _line(networks: Networks, images: Tensor) -> Iterator[nn.Module]:
    """From the first network to the last one, statistics of batch norm taken anew from the images."""
    first, last = networks[0], networks[-1]
    if [each.shape for each in first.parameters()] != [each.shape for each in last.parameters()]:
        return
    displacement = transfer.Displacement.between(first, last)
    for index in range(POINTS):
        yield displacement.applied(first, index / (POINTS - 1), images)
