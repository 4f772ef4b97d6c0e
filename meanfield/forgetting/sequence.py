"""Tasks learnt one after another."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meanfield import limits, validation
from meanfield.finite import Fitted, Recipe, fit
from meanfield.forgetting.methods import Method, Past, Stage
from meanfield.forgetting.tasks import Task, every, heads_of
from meanfield.signatures import Seed, checked
from meanfield.storage.states import StateFile
from meanfield.storage.tensors import digest
from meanfield.validation import Misuse

Callback = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Learnt:
    """networks: after every task that was learnt to its end, in eval mode; `scores.Scores.of` judges them.
    status: that of the last training, see `finite.Fitted`; "completed" where all tasks were learnt.
    """

    networks: tuple[nn.Module, ...] = field(repr=False)
    status: str
    message: str

    @property
    def network(self) -> nn.Module:
        """After the last task that was learnt."""
        if not self.networks:
            raise Misuse("networks", self.status, f"is how the first task ended: {self.message}")
        return self.networks[-1]


@checked
@torch.inference_mode(False)
def learn(
    network: nn.Module,
    tasks: Sequence[Task],
    method: Method,
    recipe: Recipe,
    seed: Seed = 0,
    *,
    heads: str = "task",
    begun: Sequence[nn.Module] = (),
    state: str | Path | None = None,
    callback: Callback | None = None,
) -> Learnt:
    """Train a copy of a network on one task after another, each by the whole recipe, `finite.fit` with this seed.

    network: the start, with an output for every class of all tasks (`readout.widened` makes them).
    method: how a task is learnt after others, see `methods`; the first task is learnt alike by all of them.
    heads: "task", every task is learnt among its own classes: its rows of the readout are its head.  Or "one": among
        all outputs of the network, those of later tasks included.
    begun: networks that were trained on the first tasks already, which are then not trained again.
    state: file (.safetensors) from which a call with the same arguments goes on, to the same bits, as in `fit`; the
        training in progress has a file of its own beside it.
    callback: called with every record of every training's history, and the task's index under "task".
    """
    run = _Sequence(network, every(tasks), method, recipe, seed, heads, begun, callback)
    run.restore(state)
    try:
        status = run.finish()
    except (KeyboardInterrupt, limits.TimeUp) as stop:
        status = limits.status(stop)
    if run.file is not None and status in ("completed", "diverged"):
        run.file.remove()
    message = f"{len(run.networks)} of {len(run.tasks)} tasks: {run.message or status}"
    return Learnt(tuple(run.networks), status, message)


class _Sequence:
    """The networks after the tasks so far, and all that decides the next one."""

    file: StateFile | None = None
    message = ""

    def __init__(
        self,
        network: nn.Module,
        tasks: tuple[Task, ...],
        method: Method,
        recipe: Recipe,
        seed: int,
        heads: str,
        begun: Sequence[nn.Module],
        callback: Callback | None,
    ) -> None:
        self.groups = heads_of(tasks, heads)
        self.start = copy.deepcopy(network).to(tasks[0].images)
        self.tasks, self.method, self.recipe, self.seed, self.heads = tasks, method, recipe, seed, heads
        self.networks = [validation.instance(each, "begun", nn.Module) for each in begun]
        self.callback = callback
        if len(self.networks) > len(tasks):
            raise Misuse("begun", len(self.networks), f"is more networks than the {len(tasks)} tasks")

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the run."""
        layers = hashlib.sha256(repr(self.start).encode()).hexdigest()
        starts = [digest(each.state_dict().values()) for each in (self.start, *self.networks)]
        data = [[list(task.classes), digest((task.images, task.labels))] for task in self.tasks]
        method = {"method": self.method.name, **asdict(self.method)}
        named = {"network": layers, "starts": starts, "tasks": data, "heads": self.heads, "seed": self.seed}
        return {**method, **named, "device": self.tasks[0].images.device.type, "recipe": asdict(self.recipe)}

    def restore(self, state: str | Path | None) -> None:
        """Go on from a file, if it is there."""
        if state is None:
            return
        self.file = StateFile(state, self.settings)
        kept = self.file.load(self.tasks[0].images.device)
        for parameters in [] if kept is None else kept["networks"][len(self.networks) :]:
            network = copy.deepcopy(self.start)
            network.load_state_dict(parameters)
            self.networks.append(network.eval())

    def finish(self) -> str:
        """All tasks that are left; the status of the last training."""
        while len(self.networks) < len(self.tasks):
            fitted = self._next()
            self.message = fitted.message
            if fitted.status != "completed":
                return fitted.status
            self.networks.append(fitted.network)
            if self.file is not None and len(self.networks) < len(self.tasks):
                self.file.save({"networks": [each.state_dict() for each in self.networks]})
        return "completed"

    def _next(self) -> Fitted:
        index = len(self.networks)
        stage = self._stage(index)
        return fit(
            stage.network,
            stage.task.images,
            stage.task.labels,
            self.recipe,
            self.seed,
            heads=self.groups,
            terms=stage.terms,
            trained=stage.trained,
            state=None if self.file is None else self.file.path.with_suffix(f".task{index}.safetensors"),
            callback=None if self.callback is None else lambda record: self._told({**record, "task": index}),
        )

    def _stage(self, index: int) -> Stage:
        task = self.tasks[index]
        if index == 0:
            return Stage(self.start, task)
        networks = tuple(self.networks)
        past = Past(self.start, networks, self.tasks[:index], self.heads, self.recipe.loss, self.seed)
        return self.method.stage(past, task)

    def _told(self, record: dict[str, Any]) -> None:
        if self.callback is not None:
            self.callback(record)
