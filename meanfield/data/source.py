"""What readers hand over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


class DataWarning(UserWarning):
    """Something about images was guessed, changed or left out."""


@dataclass(frozen=True, eq=False)
class Source:
    """All images of a source.

    images (N, C, H, W): bytes, of which 255 becomes 1, or float64 in [0, 1].  labels (N,) int64.  names: of the labels,
    where they have any.  notes: how they were read; doubts: what was guessed, changed or left out on the way, of which
    the user hears.  ordered: their order means something and is kept.
    """

    name: str
    images: Tensor
    labels: Tensor
    names: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    ordered: bool = False

    def name_of(self, label: int) -> str:
        return self.names.get(label, str(label))


def printable(text: object) -> str:
    """On one line, whatever a file or folder is called."""
    return str(text) if str(text).isprintable() else ascii(str(text))
