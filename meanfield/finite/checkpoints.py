"""The state of a training run on disk: one safetensors file whose JSON header names the run, written whole or not at
all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meanfield import limits, storage
from meanfield.validation import Misuse

FORMAT = "meanfield training state 1"


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of dtypes, shapes and entries, in hexadecimal; the same on every device."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class StateFile:
    """The file (.safetensors) of one run.

    settings: everything that decides the run, of JSON kinds.  A file written under other settings is refused.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = Path(path), json.loads(json.dumps(settings))
        if self.path.suffix != storage.TENSORS:
            raise Misuse("state", str(path), f"must end in {storage.TENSORS}")
        if not self.path.parent.is_dir():
            raise Misuse(
                "state", str(path), f"lies in a directory that does not exist: create {self.path.parent} first"
            )

    def save(self, tensors: Mapping[str, Tensor], figures: Mapping[str, Any]) -> None:
        """Replace the file; `figures` is of JSON kinds, its floats are kept to the last bit."""
        from safetensors.torch import save

        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
        body = json.dumps({"format": FORMAT, "settings": self.settings, "figures": figures})
        storage.write_atomically(self.path, save(stored, metadata={"body": body, "sha256": _checksum(body, stored)}))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors (on the CPU) and figures, None without a file; ValueError where it is damaged or of another run."""
        if not self.path.exists():
            return None
        tensors, body = self._read()
        for name, here in self.settings.items():
            there = body["settings"].get(name)
            if there != here:
                raise Misuse(
                    "state",
                    str(self.path),
                    f"is of another run: its {name} is {there!r}, here {here!r}; repeat the arguments of that run, "
                    "give another path or delete the file",
                )
        return tensors, body["figures"]

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from safetensors import safe_open

        try:
            tensors = storage.load_tensors(self.path)
        except ValueError as error:
            raise Misuse("state", str(self.path), f"is damaged: {error}; delete it to start anew") from error
        with safe_open(self.path, "pt") as file:
            metadata = file.metadata() or {}
        if not {"body", "sha256"} <= set(metadata):
            raise Misuse("state", str(self.path), "is not the state of a training run; give another path")
        if metadata["sha256"] != _checksum(metadata["body"], tensors):
            raise Misuse("state", str(self.path), "is damaged: its checksum does not fit; delete it to start anew")
        body = json.loads(metadata["body"])
        if body["format"] != FORMAT:
            raise Misuse(
                "state",
                str(self.path),
                f"has the format {body['format']!r}, expected {FORMAT!r}; delete it to start anew",
            )
        return tensors, body

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


def _checksum(body: str, tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    return hashlib.sha256((body + " ".join(names) + digest(tensors[name] for name in names)).encode()).hexdigest()
