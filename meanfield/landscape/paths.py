"""Paths between two networks: a function of t in [0, 1] each, from the one to the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meanfield import measures
from meanfield.finite import FiniteCNN
from meanfield.finite.statistics import recompute
from meanfield.fusion import Channels, Ensemble, matched
from meanfield.fusion.channels import copied
from meanfield.grafting.graft import frozen
from meanfield.landscape.displacement import DisplacementPath
from meanfield.landscape.straight import require_line, straight
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
        return DisplacementPath(first, second, images, ridge)
    return _line(*(_matched(first, second, torch.cat(list(images))) if how == "matched" else (first, second)), images)


def _matched(first: Network, second: Network, images: Tensor) -> tuple[Network, Network]:
    """Both, the second in the order whose features have the least sum of squared distances from the first's."""
    ours, theirs = (Channels.of(copied(each, name), name) for each, name in ((first, "a"), (second, "b")))
    ours.require_alike(theirs, "b")
    if ours.widths != theirs.widths:
        remedy = f"are its widths, and {ours.hidden_widths} those of a: a matching needs equal ones; "
        raise Misuse("b", theirs.hidden_widths, f"{remedy}displacement and mixture do not")
    found = matched(first, second, images, "transport")
    return (copied(first, "a") if isinstance(first, FiniteCNN) else first), found


def _mixture(first: Any, second: Any) -> Path:
    """Of measures or of modules; at the ends the networks themselves."""
    if isinstance(first, ParticleNetwork):
        return lambda t: first if t == 0 else second if t == 1 else measures.mixture(first, second, t)
    return lambda t: first if t == 0 else second if t == 1 else _ensemble(first, second, t)


def _ensemble(first: nn.Module, second: nn.Module, t: float) -> Ensemble:
    return Ensemble([frozen(first, "a"), frozen(second, "b")], (1 - t, t))


def _line(first: Any, second: Any, images: Sequence[Tensor]) -> Path:
    """Of parameters, of a ParticleNetwork of masses too."""
    if not isinstance(first, ParticleNetwork):
        require_line(first, second)
        return lambda t: _renormalised(straight(first, second, t), images)
    if first.widths != second.widths:
        remedy = f"are its widths, and {first.widths} those of a: only mixture and displacement join these"
        raise Misuse("b", second.widths, remedy)
    return lambda t: first if t == 0 else second if t == 1 else measures.interpolate(first, second, t)


def _renormalised(network: nn.Module, images: Sequence[Tensor]) -> nn.Module:
    recompute(network, images, "a")
    return network
