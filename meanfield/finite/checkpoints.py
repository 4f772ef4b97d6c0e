"""The state of a training run on disk: one safetensors file whose JSON header names the run, written whole or not at
all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from meanfield import limits
from meanfield.storage import files, tensors
from meanfield.validation import Misuse

KIND = "meanfield training state 2"


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

    def save(self, kept: Mapping[str, Tensor], figures: Mapping[str, Any]) -> None:
        """Replace the file; `figures` is of JSON kinds, its floats are kept to the last bit."""
        files.write_atomically(self.path, tensors.pack(kept, KIND, {"settings": self.settings, "figures": figures}))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors (on the CPU) and figures, None without a file; Misuse where it is damaged or of another run."""
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
        return kept, body["figures"]

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


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
