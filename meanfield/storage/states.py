"""The state of a long run on disk: one safetensors file whose JSON header names the run, whole or not there at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meanfield import limits
from meanfield.problem import Problem
from meanfield.storage import files, tensors
from meanfield.validation import Misuse

KIND = "meanfield state 3"
PLACE = "<tensor>"  # the only key of what stands for a tensor among plain values


def described(problem: Problem) -> dict[str, str]:
    """What a run on a problem depends on, for the settings of its state; of a sharded one what rank 0 holds."""
    told = bytes.fromhex(tensors.digest((problem.inputs, problem.targets)))
    data = bytes(problem.ranks.agreed(torch.tensor(list(told), dtype=torch.uint8)).tolist()).hex()
    return {"problem": repr(problem), "data": data, "device": problem.inputs.device.type}


def entries(variables: Any) -> dict[str, Any]:
    """The tensors of a `ParticleNetwork`, or of a point with the same names, as arguments for another one."""
    return {name: getattr(variables, name) for name in ("masses", "kernels", "readout", "biases")}


class StateFile:
    """The file (.safetensors) of one run.

    settings: everything that decides the run, of JSON kinds.  A file written under other settings is refused.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = tensors.suffixed(path, "state"), json.loads(json.dumps(settings))
        if not self.path.parent.is_dir():
            raise Misuse(
                "state", str(path), f"lies in a directory that does not exist: create {self.path.parent} first"
            )

    def save(self, state: Any) -> None:
        """Replace the file.  state: a tree of dicts, lists and tuples of tensors and of JSON kinds, whose floats are
        kept to the last bit.
        """
        kept, figures = _parted(state)
        files.write_atomically(self.path, tensors.pack(kept, KIND, {"settings": self.settings, "figures": figures}))

    def load(self, device: torch.device | str = "cpu") -> Any:
        """The state with its tensors on a device, tuples as lists, keys as text; None without a file; Misuse where it
        is damaged or of another run.
        """
        try:
            kept, body = tensors.read(self.path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise Misuse("state", str(self.path), f"cannot be used: {error}; delete it to start anew") from error
        if body is None or body.get("kind") != KIND:
            raise Misuse("state", str(self.path), f"is no {KIND!r}; give another path, or delete it to start anew")
        for name, here in self.settings.items():
            there = body["settings"].get(name)
            if there != here:
                raise Misuse(
                    "state",
                    str(self.path),
                    f"is of another run: its {name} is {there!r}, here {here!r}; repeat the arguments of that run, "
                    "give another path or delete the file",
                )
        return _joined(kept, body["figures"], device)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


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
