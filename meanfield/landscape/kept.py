"""Values at points, each evaluated once, also by a run that goes on after a kill."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from meanfield import limits
from meanfield.storage.states import StateFile
from meanfield.validation import Misuse

SAVED_EVERY = 1.0  # seconds
SAME = 1e-5  # relative: two evaluations of one point by one machine and version, in float32 and in other company


class Kept:
    """What a function says at points, evaluated where it is not known yet.

    function: points (P, 2) -> values (P, F).  columns: the names of the F.
    block: points that are evaluated at once, the same ones after a pause as without it.
    after: called after every block, and at the end of what was evaluated, also where it is broken off, with whether
        this is the end.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], columns: Sequence[str], block: int) -> None:
        self.function, self.columns, self.block = function, tuple(columns), block
        self.points = torch.empty((0, 2), dtype=torch.float64)
        self.values = torch.empty((0, len(columns)), dtype=torch.float64)
        self.places: dict[tuple[float, ...], int] = {}
        self.asked: dict[int, None] = {}  # rows, in the order of their asking: what is kept may be more
        self.after: Callable[[bool], None] = lambda end: None

    def __len__(self) -> int:
        """How many different points were asked."""
        return len(self.asked)

    @property
    def answers(self) -> Tensor:
        """(len(self), F): the values at the points that were asked."""
        return self.values[list(self.asked)]

    def __call__(self, points: Tensor) -> Tensor:
        """(P, F) at points (P, 2), float64.  Looks at the limits between blocks."""
        missing = [each for each in dict.fromkeys(_keys(points)) if each not in self.places]
        if missing:
            try:
                self._evaluate(torch.tensor(missing, dtype=torch.float64))
            finally:
                self.after(True)
        rows = [self.places[each] for each in _keys(points)]
        self.asked |= dict.fromkeys(rows)
        return self.values[rows]

    def _evaluate(self, points: Tensor) -> None:
        for block in points.split(self.block):
            limits.look()
            self.add(block, self.function(block))
            self.after(False)

    def known(self, points: Tensor) -> Tensor:
        """(P, F) without any evaluation: nan where nothing is known."""
        found = torch.tensor([self.places.get(each, -1) for each in _keys(points)])
        values = torch.cat([self.values, torch.full((1, len(self.columns)), math.nan, dtype=torch.float64)])
        return values[found]

    def add(self, points: Tensor, values: Tensor) -> None:
        self.places |= {key: len(self.places) + index for index, key in enumerate(_keys(points))}
        self.points, self.values = torch.cat([self.points, points]), torch.cat([self.values, values])


class Keeper:
    """A state file with the values of several functions, read at the start and written about once a second.

    Refused, as by `StateFile`, where it is of other arguments or data; and where its first value is not met again, as
    of a function that changed under the same name.
    """

    def __init__(self, file: StateFile, kept: Mapping[str, Kept]) -> None:
        self.file, self.kept, self.saved = file, kept, time.monotonic()
        if (state := file.load()) is not None:
            for name, each in kept.items():
                self._restore(each, state[name]["points"], state[name]["values"])

    def _restore(self, kept: Kept, points: Tensor, values: Tensor) -> None:
        again = kept.function(points[:1]) if len(points) else values
        if len(points) and not torch.allclose(again, values[:1], rtol=SAME, atol=SAME, equal_nan=True):
            met = f"holds {values[0].tolist()} at {points[0].tolist()}, where {again[0].tolist()} is found now"
            raise Misuse("state", str(self.file.path), f"{met}; give another path or delete the file")
        kept.add(points, values)

    def glance(self, end: bool) -> None:
        """To be called often."""
        if end or time.monotonic() - self.saved > SAVED_EVERY:
            self.file.save({name: {"points": each.points, "values": each.values} for name, each in self.kept.items()})
            self.saved = time.monotonic()


def _keys(points: Tensor) -> list[tuple[float, ...]]:
    return [tuple(point) for point in points.tolist()]
