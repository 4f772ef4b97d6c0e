"""The state of a long run on disk: one safetensors file whose JSON header names the run, whole or not there at all."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meanfield import limits
from meanfield.activations import ACTIVATIONS
from meanfield.network import ParticleNetwork
from meanfield.problem import Problem
from meanfield.ranks import ALONE, Ranks
from meanfield.storage import files, tensors
from meanfield.validation import Misuse

OURS = frozenset(ACTIVATIONS.values())
KIND = "meanfield state 4"
STATE_SECONDS = 30.0  # of work that a killed run may lose
PLACE = "<tensor>"  # the only key of what stands for a tensor among plain values
DIGITS = 16  # of a digest, hexadecimal: enough to tell data apart, few enough to be shown


def described(problem: Problem) -> dict[str, Any]:
    """What a run on a problem depends on, for the settings of its state; the same however many ranks share the images,
    as long as these come in the same runs.  Of the user's own activations a name says nothing.
    """
    used = {layer.h for layer in problem.architecture.layers}
    return {
        "images": problem.count,
        "loss": problem.loss.name,
        "architecture": problem.architecture.to_dict(),
        "activations": {h.name: [float(f"{each:.6g}") for each in h.fingerprint()] for h in used - OURS},
        "penalty": problem.penalty.settings(),
        "dtype": str(problem.inputs.dtype).removeprefix("torch."),
        "device": problem.inputs.device.type,
        "data": _digest(problem),
    }


def _digest(problem: Problem) -> str:
    """Of the digests of all runs of images, and of the targets."""
    own = [list(bytes.fromhex(tensors.digest((run,)))) for run in problem.own_runs]
    rows = torch.tensor(own, dtype=torch.uint8).reshape(len(own), -1 if own else 32)
    every = problem.ranks.gathered(rows, problem.runs_of_ranks)
    return tensors.digest((every, problem.targets))[:DIGITS]


def of_run(
    path: str | Path | None, settings: Mapping[str, Any], problem: Problem, start: ParticleNetwork
) -> StateFile | None:
    """The file of a run that descends from `start`; None without a path, for which nothing is read of the tensors."""
    if path is None:
        return None
    digest = tensors.digest(start.tensors())[:DIGITS]  # last: it follows from the data as well
    named = {**settings, "widths": start.widths, **described(problem), "start": digest}
    return StateFile(path, named, problem.ranks)


def entries(variables: Any) -> dict[str, Any]:
    """The tensors of a `ParticleNetwork`, or of a point with the same names, as arguments for another one."""
    return {name: getattr(variables, name) for name in ("masses", "kernels", "readout", "biases")}


class StateFile:
    """The file (.safetensors) of one run, which rank 0 alone has on its disk.

    settings: everything that decides the run, of JSON kinds; what tells a user most comes first.  A file written under
    other settings is refused.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
        self.path, self.settings = tensors.suffixed(path, "state"), json.loads(json.dumps(settings))
        self.ranks = ranks
        if ranks.own == 0 and not self.path.parent.is_dir():
            raise Misuse(
                "state", str(path), f"lies in a directory that does not exist: create {self.path.parent} first"
            )

    def save(self, state: Any) -> None:
        """Replace the file.  state: a tree of dicts, lists and tuples of tensors and of JSON kinds, whose floats are
        kept to the last bit.

        A disk that does not take it, being full or gone, ends no run: a warning says so, and the older file stays.
        """
        if self.ranks.own:
            return
        kept, figures = _parted(state)
        content = tensors.pack(kept, KIND, {"settings": self.settings, "figures": figures})
        try:
            files.write_atomically(self.path, content)
        except OSError as error:
            warnings.warn(
                f"the state of the run could not be written ({error.strerror}: {self.path}); the run goes on, and "
                "after a kill begins where it was written last",
                UserWarning,
                stacklevel=2,
            )

    def load(self, device: torch.device | str = "cpu") -> Any:
        """The state with its tensors on a device, tuples as lists, keys as text; None without a file; Misuse where it
        is damaged or of another run.
        """
        try:
            content = self.ranks.told(self._content())
            if content is None:
                return None
            kept, body = tensors.unpack(content, self.path)
        except ValueError as error:
            raise Misuse("state", str(self.path), f"cannot be used: {error}; delete it to start anew") from error
        if body is None or body.get("kind") != KIND:
            raise Misuse("state", str(self.path), f"is no {KIND!r}; give another path, or delete it to start anew")
        for name, here in self.settings.items():
            there = body["settings"].get(name)
            if there != here:
                name, there, here = _first_difference(name, there, here)
                raise Misuse(
                    "state",
                    str(self.path),
                    f"is of another run: its {name} is {there!r}, here {here!r}; repeat the arguments of that run, "
                    "give another path or delete the file",
                )
        return _joined(kept, body["figures"], device)

    def _content(self) -> bytes | None:
        return files.read(self.path) if self.ranks.own == 0 and self.path.exists() else None

    def remove(self) -> None:
        if self.ranks.own == 0:
            self.path.unlink(missing_ok=True)


def _first_difference(name: str, there: Any, here: Any) -> tuple[str, Any, Any]:
    """The innermost entry in which two values of JSON kinds differ, with its name."""
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        there, here = dict(enumerate(there)), dict(enumerate(here))
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return name, there, here
    key = next(key for key in (*here, *there) if there.get(key) != here.get(key))
    return _first_difference(f"{name}.{key}", there.get(key), here.get(key))


def _parted(state: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a tree, by name, and the tree with a name in the place of each; one that is met again is kept
    once.
    """
    kept: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in names:
                kept[name] = value.detach().cpu().clone()  # a format without shared memory
            return {PLACE: names.setdefault(id(value), name)}
        if isinstance(value, dict):
            return {str(key): walk(entry, f"{name}/{key}") for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [walk(entry, f"{name}/{index}") for index, entry in enumerate(value)]
        return value

    return kept, walk(state, "state")


def _joined(kept: Mapping[str, Tensor], figures: Any, device: torch.device | str) -> Any:
    """The tree that was taken apart."""
    if isinstance(figures, dict):
        if set(figures) == {PLACE}:
            return kept[figures[PLACE]].to(device)
        return {key: _joined(kept, entry, device) for key, entry in figures.items()}
    if isinstance(figures, list):
        return [_joined(kept, entry, device) for entry in figures]
    return figures


def ended(file: StateFile | None, work: Callable[[], str]) -> str:
    """The status that `work` returns, "interrupted" after Ctrl-C, "max_seconds" at a limit (`limits.within`); the
    file is removed unless there is something to go on from.
    """
    try:
        status = work()
    except (KeyboardInterrupt, limits.TimeUp) as stop:
        return limits.status(stop)
    if file is not None:
        file.remove()
    return status
