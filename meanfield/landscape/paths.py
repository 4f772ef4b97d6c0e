"""Paths between two networks: a function of t in [0, 1] each, from the one to the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from meanfield import measures
from meanfield.landscape.displacement import Displacement
from meanfield.landscape.matching import matched
from meanfield.landscape.mixture import Mixture
from meanfield.landscape.straight import renormalised, require_line, straight
from meanfield.network import ParticleNetwork
from meanfield.subject import Network
from meanfield.validation import Misuse

Path = Callable[[float], Network]
WAYS = ("weights", "matched", "displacement", "mixture")


def path(first: Network, second: Network, how: str, images: Sequence[Tensor], ridge: float) -> Path:
    """One of WAYS, see `join`; networks are copies in evaluation mode, images batches of inputs."""
    if how == "mixture":
        return _mixture(first, second)
    if how == "displacement":
        return Displacement(first, second, images, ridge)
    return _line(first, matched(first, second, images) if how == "matched" else second, images)


def _mixture(first: Any, second: Any) -> Path:
    """Of measures or of modules; at the ends the networks themselves."""
    mixed: Any = measures.mixture if isinstance(first, ParticleNetwork) else Mixture
    return lambda t: first if t == 0 else second if t == 1 else mixed(first, second, t)


def _line(first: Any, second: Any, images: Sequence[Tensor]) -> Path:
    """Of parameters, of a ParticleNetwork of masses too."""
    if not isinstance(first, ParticleNetwork):
        require_line(first, second)
        return lambda t: renormalised(straight(first, second, t), images)
    if first.widths != second.widths:
        remedy = f"are its widths, and {first.widths} those of a: only mixture and displacement join these"
        raise Misuse("b", second.widths, remedy)
    return lambda t: first if t == 0 else second if t == 1 else measures.interpolate(first, second, t)
