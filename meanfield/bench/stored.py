"""What a training leaves, in a file of a store: named by everything that decides it, whole or not there at all."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from meanfield.storage import files, tensors
from meanfield.validation import Misuse

T = TypeVar("T")


class Stored:
    """The file of one training in the directory `store`.

    kind: what the file says it is.  named: everything that decides the tensors, of JSON kinds.
    """

    def __init__(self, store: str | Path, kind: str, named: Mapping[str, Any]) -> None:
        self.kind, self.named = kind, json.loads(json.dumps(named))
        name = files.checksum(json.dumps(self.named, sort_keys=True))[:24]
        self.path = Path(store) / f"{name}{tensors.TENSORS}"

    def read(self) -> dict[str, Tensor] | None:
        """The tensors; None without a file, and where it is damaged or holds another training than its name says, of
        which a warning tells.
        """
        try:
            kept, about = tensors.read(self.path)
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            warnings.warn(f"{error}; the network is trained anew", stacklevel=3)
            return None
        if about != {"kind": self.kind, **self.named}:
            warnings.warn(f"{self.path} holds another network than its name says; it is trained anew", stacklevel=3)
            return None
        return kept

    def write(self, kept: Mapping[str, Tensor]) -> None:
        """And remove what there is of states."""
        files.write_atomically(self.path, tensors.pack(kept, self.kind, self.named))
        self._forget()

    def resumed(self, train: Callable[[Path], T]) -> T:
        """What `train` returns, given the file of its state; where that is damaged, or one that it keeps beside it
        under a longer name, a warning says so, and it begins anew.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = self.path.with_name(f"{self._state}{tensors.TENSORS}")
        try:
            return train(state)
        except Misuse as error:
            if error.argument != "state":
                raise
            warnings.warn(f"{state} {error.remedy}: the network is trained anew", stacklevel=3)
            self._forget()
            return train(state)

    @property
    def _state(self) -> str:
        return f"{self.path.stem}.state"

    def _forget(self) -> None:
        for each in self.path.parent.glob(f"{self._state}.*"):
            each.unlink(missing_ok=True)
