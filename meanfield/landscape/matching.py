"""Which features of one network correspond to which of another: by optimal transport between their values on images.

Layer by layer: a feature is the vector of what a channel gives to the next layer, over images and positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from meanfield import measures
from meanfield.grafting.transport import assignment, plan
from meanfield.landscape.channels import chain, select
from meanfield.network import ParticleNetwork
from meanfield.subject import Network, Subject
from meanfield.validation import Misuse


class Coupled(NamedTuple):
    """Two networks, each as it was but with its features listed pair by pair, and the masses of the pairs by layer."""

    first: Network
    second: Network
    masses: list[Tensor]


@torch.no_grad()
def matched(a: Network, b: Network, images: Sequence[Tensor]) -> Network:
    """b with its channels, or particles, in the order that fits a best; its function is kept.

    The order of a layer has the least sum of squared distances between features (scipy's linear_sum_assignment).
    images: batches of inputs.  Widths must be equal, layer by layer.
    """
    first, second = Subject(a, "a").network, Subject(b, "b").network
    found = _costs(first, second, images)
    for layer, costs in enumerate(found):
        if costs.shape[0] != costs.shape[1]:
            raise Misuse(
                "b",
                tuple(costs.shape[1] for costs in found),
                f"are its widths, and {tuple(costs.shape[0] for costs in found)} those of a: a matching needs "
                f"equal ones; displacement and mixture do not (layer {layer + 1})",
            )
    return _reordered(second, [assignment(costs) for costs in found])


@torch.no_grad()
def coupled(a: Network, b: Network, images: Sequence[Tensor]) -> Coupled:
    """Both networks with a channel, or particle, for every pair of an optimal transport plan between their features.

    Between as many equal masses the plan is the assignment, and the first network stays as it is.  Otherwise a feature
    that is in several pairs is split among them; both functions are kept.  Channels of a module have equal masses.
    """
    first, second = Subject(a, "a").network, Subject(b, "b").network
    pairs, masses = [], []
    for costs, below, above in zip(_costs(first, second, images), _masses(first), _masses(second)):
        amounts = plan(costs, below, above)
        rows, columns = amounts.nonzero(as_tuple=True)
        pairs.append((rows, columns))
        masses.append(amounts[rows, columns])
    ends = [_split(network, [pair[side] for pair in pairs], masses) for side, network in enumerate((first, second))]
    return Coupled(ends[0], ends[1], masses)


def _reordered(network: Network, orders: list[Tensor]) -> Network:
    return measures.permute(network, orders) if isinstance(network, ParticleNetwork) else select(network, orders)


def _split(network: Network, keep: list[Tensor], masses: list[Tensor]) -> Network:
    if isinstance(network, ParticleNetwork):
        chosen = measures.select(network, keep)
        return measures.with_tensors(
            chosen, [*(p.to(chosen.readout) for p in masses), *chosen.tensors()[len(masses) :]]
        )
    whole = _masses(network)
    return select(network, keep, [pair / own[rows] for pair, own, rows in zip(masses, whole, keep)])


def _masses(network: Network) -> list[Tensor]:
    """Of the features of every layer that is followed by another or a readout."""
    if isinstance(network, ParticleNetwork):
        return list(network.masses)
    layers = [network.get_submodule(stage.layer) for stage in chain(network, "network").stages[:-1]]
    weights: list[Tensor] = [layer.weight for layer in layers]  # pyright: ignore[reportAssignmentType]
    return [torch.full((len(w),), 1 / len(w), dtype=torch.float64, device=w.device) for w in weights]


def _costs(first: Network, second: Network, images: Sequence[Tensor]) -> list[Tensor]:
    """Squared distances between features, (C, C') for every layer, in float64, in one pass over the images."""
    sums: list[list[Tensor]] = []
    for batch in images:
        clouds = [list(_clouds(network, batch, argument)) for network, argument in ((first, "a"), (second, "b"))]
        if len(clouds[0]) != len(clouds[1]):
            raise Misuse(
                "b",
                len(clouds[1]) + 1,
                f"layers and a has {len(clouds[0]) + 1}: layers are matched one by one",
            )
        found = [_products(a, b, layer) for layer, (a, b) in enumerate(zip(*clouds))]
        sums = [[x + y for x, y in zip(old, new)] for old, new in zip(sums, found)] if sums else found
    return [(a[:, None] + b - 2 * mixed).clamp_min(0) for a, b, mixed in sums]


def _products(first: Tensor, second: Tensor, layer: int) -> list[Tensor]:
    if first.shape[1] != second.shape[1]:
        raise Misuse(
            "b",
            second.shape[1],
            f"values a feature of layer {layer + 1}, and {first.shape[1]} in a: maps must be of one size",
        )
    return [first.square().sum(1), second.square().sum(1), first @ second.T]


def _clouds(network: Network, batch: Tensor, argument: str) -> Iterator[Tensor]:
    """Features as vectors, (C, n), layer by layer, in float64."""
    if isinstance(network, ParticleNetwork):
        for features in network.features(batch):
            yield features.transpose(0, 1).flatten(1).double()
        return
    links, signal = chain(network, argument), batch.clone()  # some modules work in place
    for name in links.before:
        signal = network.get_submodule(name)(signal)
    for stage in links.stages[:-1]:
        signal = network.get_submodule(stage.layer)(signal)
        width = signal.shape[1]
        if isinstance(network.get_submodule(stage.layer), nn.Linear) and signal.ndim != 2:
            raise Misuse(
                argument, stage.layer, f"is a Linear on tensors {tuple(signal.shape)}; it must be one on vectors (N, D)"
            )
        for name in stage.after:
            signal = network.get_submodule(name)(signal)
        yield signal.reshape(len(signal), width, -1).transpose(0, 1).flatten(1).double()
