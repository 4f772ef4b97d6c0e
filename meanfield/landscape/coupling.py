"""Two networks listed pair by pair: by optimal transport between their features, both functions kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from meanfield import measures
from meanfield.fusion.channels import Channels, chosen, copied, moved
from meanfield.fusion.matching import distances
from meanfield.fusion.signals import checked_images
from meanfield.grafting.transport import plan
from meanfield.network import ParticleNetwork
from meanfield.subject import Network


class Coupled(NamedTuple):
    """Two networks, each as it was but with its features listed pair by pair, and the masses of the pairs by layer."""

    first: Network
    second: Network
    masses: list[Tensor]


@torch.no_grad()
def coupled(a: Network, b: Network, images: Tensor) -> Coupled:
    """Both networks with a channel, or particle, for every pair of an optimal transport plan between their features.

    Between as many equal masses the plan is the assignment, and the first network stays as it is.  Otherwise a feature
    that is in several pairs is split among them; both functions are kept.  Channels of a module have equal masses; a
    FiniteCNN comes back as `finite.sequential` has it.
    images: (N, ...), on which features are compared as layers read them.
    """
    first, second = copied(a, "a"), copied(b, "b")
    channels, other = Channels.of(first, "a"), Channels.of(second, "b")
    channels.require_alike(other, "b")
    costs = distances(first, channels, second, other, checked_images(images, first))
    amounts = [
        plan(costs[space], below, above)
        for space, below, above in zip(channels.hidden, _masses(a, channels), _masses(b, other))
    ]
    pairs = [each.nonzero(as_tuple=True) for each in amounts]
    masses = [each[rows, columns] for each, (rows, columns) in zip(amounts, pairs)]
    ends: list[Network] = []
    for side, (network, module, its) in enumerate(((a, first, channels), (b, second, other))):
        keep = [pair[side] for pair in pairs]
        if isinstance(network, ParticleNetwork):
            ends.append(_particles(network, keep, masses))
            continue
        rows = {space: chosen(kept, its.widths[space]) for space, kept in zip(its.hidden, keep)}
        # what reads a channel takes from each of its parts the share that this has of its mass
        read = {space: its.widths[space] * mass[:, None] * rows[space] for space, mass in zip(its.hidden, masses)}
        ends.append(moved(module, its, rows, read))
    return Coupled(ends[0], ends[1], masses)


def _particles(network: ParticleNetwork, keep: Sequence[Tensor], masses: Sequence[Tensor]) -> ParticleNetwork:
    found = measures.select(network.detach(), keep)
    return measures.with_tensors(found, [*(p.to(found.readout) for p in masses), *found.tensors()[len(masses) :]])


def _masses(network: Network, channels: Channels) -> list[Tensor | None]:
    """None where they are equal."""
    return list(network.masses) if isinstance(network, ParticleNetwork) else [None for _ in channels.hidden]
