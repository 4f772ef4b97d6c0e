"""Which channel of one network stands for which of another: permutations, and plans between unequal widths.

"weights": Ainsworth, Hayase & Srinivasa 2023 (git re-basin), algorithm 1.  "activations": the same paper, section 3.1,
on correlations as Li et al. 2015 take them.  "transport": Singh & Jaggi 2020, with features as what is compared.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from meanfield import measures
from meanfield.fusion.channels import Channels, chosen, copied, moved
from meanfield.fusion.signals import by_channel, checked_images, signals
from meanfield.grafting.transport import assignment, plan
from meanfield.network import ParticleNetwork
from meanfield.precision import full_float32
from meanfield.signatures import checked
from meanfield.subject import Network
from meanfield.validation import Misuse, choice

MATCHINGS = ("weights", "activations", "transport")
SWEEPS = 1000  # never reached: every sweep gains, and there are finitely many permutations
GAIN = 1e-12  # of the sum of squared weights: below it is rounding

Orders = dict[int, Tensor]


@checked
@torch.inference_mode(False)
@torch.no_grad()
@full_float32()
def matched(
    a: Network, b: Network, images: Tensor, method: Annotated[str, choice(MATCHINGS)] = "activations"
) -> Network:
    """Network b with its channels in the order of a's, in evaluation mode; at equal widths the same function as b.

    Then a ParticleNetwork comes back as one, its particles with their masses in another order; otherwise a module.

    images: (N, ...), without labels.
    method: "weights", the permutations that bring b's weights closest to a's, found by exact assignments space by space
        until none gains (a local optimum; batch norm's scales and shifts count, running statistics do not).
        "activations": the permutation of largest correlation of what layers read, summed over the layers that read the
        same channels.
        "transport": an optimal plan between the features that layers read, by squared distance.  With unequal widths b
        gets a's, and is not the same function any more: a channel's weights are the means over its partners, and what
        reads a channel that was split takes its share of it.
    Residual streams are matched as a whole.  Running statistics go with their channels.
    """
    first, second = copied(a, "a"), copied(b, "b")
    channels, other = Channels.of(first, "a"), Channels.of(second, "b")
    channels.require_alike(other, "b")
    images = checked_images(images, first)
    if isinstance(b, ParticleNetwork) and channels.widths == other.widths:
        return measures.permute(b.detach(), list(orders(first, channels, second, other, images, method).values()))
    return aligned(first, channels, second, other, images, method, "b")


def aligned(
    first: nn.Module,
    channels: Channels,
    second: nn.Module,
    other: Channels,
    images: Tensor,
    method: str,
    argument: str,
) -> nn.Module:
    """The second network in the channels of the first; see `matched`."""
    if method == "transport" and channels.widths != other.widths:
        plans = {space: plan(costs) for space, costs in distances(first, channels, second, other, images).items()}
        written = {space: len(each) * each for space, each in plans.items()}
        return moved(second, other, written, {space: each.shape[1] * each for space, each in plans.items()})
    if channels.widths != other.widths:
        remedy = f"are its widths, not {channels.hidden_widths}: choose 'transport', 'union' or 'ensemble'"
        raise Misuse(argument, other.hidden_widths, remedy)
    found = orders(first, channels, second, other, images, method)
    return moved(second, other, {space: chosen(order, len(order)) for space, order in found.items()})


def orders(
    first: nn.Module, channels: Channels, second: nn.Module, other: Channels, images: Tensor, method: str
) -> Orders:
    """Space -> (width,), for every channel of the first network that of the second, in the order of the spaces; of
    equal widths, between which an optimal plan is a permutation.
    """
    if method == "weights":
        return by_weights(first, second, channels)
    measure = distances if method == "transport" else correlations
    sign = 1 if method == "transport" else -1
    found = measure(first, channels, second, other, images)
    return {space: assignment(sign * found[space]) for space in channels.hidden}


def by_weights(first: nn.Module, second: nn.Module, channels: Channels) -> Orders:
    """Space -> (width,), for every channel of the first network that of the second: no assignment of a single space
    brings the weights closer.
    """
    pairs = _pairs(first, second, channels)
    orders: Orders = {space: torch.arange(channels.widths[space]) for space in channels.hidden}
    least = GAIN * sum(float(a.square().sum()) for a, _, _ in pairs)
    for _ in range(SWEEPS):
        gain = 0.0
        for space in channels.hidden:
            agreement = _agreement(pairs, orders, space, channels.widths[space])
            order = assignment(-agreement)
            before, after = (
                float(agreement.gather(1, each[:, None].to(order)).sum()) for each in (orders[space], order)
            )
            if after - before > least:
                orders[space], gain = order, gain + after - before
        if gain == 0:
            break
    return orders


def _pairs(first: nn.Module, second: nn.Module, channels: Channels) -> list[tuple[Tensor, Tensor, tuple[int, ...]]]:
    """The tensors of both networks, an axis per space and one for what a pair of channels shares."""
    own, others, found = first.state_dict(), second.state_dict(), []
    for name, axes in channels.axes():
        if name in own and "running" not in name:
            shape = [channels.widths[axis.space] for axis in axes]
            both = (state[name].double().reshape(*shape, -1) for state in (own, others))
            found.append((*both, tuple(axis.space for axis in axes)))
    return found


def _agreement(pairs: list[tuple[Tensor, Tensor, tuple[int, ...]]], orders: Orders, space: int, width: int) -> Tensor:
    """(width, width): the inner product of what belongs to channel i of the first network and to j of the second, all
    other spaces in their present order.
    """
    found = pairs[0][0].new_zeros(width, width)
    for here, there, spaces in pairs:
        for axis in (axis for axis, each in enumerate(spaces) if each == space):
            for other, each in enumerate(spaces):
                if other != axis and each in orders:
                    there = there.index_select(other, orders[each].to(there.device))
            found += here.movedim(axis, 0).flatten(1) @ there.movedim(axis, 0).flatten(1).T
    return found


def correlations(
    first: nn.Module, channels: Channels, second: nn.Module, other: Channels, images: Tensor
) -> dict[int, Tensor]:
    """Space -> (width, other width): of the features, summed over the layers that read them; 0 of constant ones."""

    def correlation(count: int, sums: Tensor, products: Tensor, width: int) -> Tensor:
        centred = products - torch.outer(sums, sums) / count
        # a difference of squares: what is rounding in it is no feature
        sizes = centred.diagonal().clamp_min(0).sqrt()
        live = centred.diagonal() > torch.finfo(images.dtype).eps * products.diagonal()
        scaled = torch.where(live, 1 / torch.where(live, sizes, 1.0), 0.0)
        return (scaled[:, None] * centred * scaled)[:width, width:]

    return _compared(first, channels, second, other, images, correlation)


def distances(
    first: nn.Module, channels: Channels, second: nn.Module, other: Channels, images: Tensor
) -> dict[int, Tensor]:
    """Space -> (width, other width): mean squared distances of the features, summed over the layers that read them."""

    def distance(count: int, sums: Tensor, products: Tensor, width: int) -> Tensor:
        sizes = products.diagonal()
        return (sizes[:width, None] + sizes[width:] - 2 * products[:width, width:]).clamp_min(0) / count

    return _compared(first, channels, second, other, images, distance)


def _compared(first, channels: Channels, second, other: Channels, images: Tensor, measure) -> dict[int, Tensor]:
    names = [layer.name for layer in channels.layers]
    totals: dict[int, tuple[int, Tensor, Tensor]] = {}
    passes = zip(signals(first, names, images), signals(second, [layer.name for layer in other.layers], images))
    for here, there in passes:
        for index, (layer, partner) in enumerate(zip(channels.layers, other.layers)):
            if layer.source not in channels.hidden:
                continue
            both = [
                by_channel(heard[each.name].entering, each_channels.widths[each.source])
                for heard, each, each_channels in ((here, layer, channels), (there, partner, other))
            ]
            clouds = torch.cat(both)
            count, sums, products = totals.get(index, (0, 0.0, 0.0))
            totals[index] = (count + clouds.shape[1], sums + clouds.sum(1), products + clouds @ clouds.T)
    found: dict[int, Tensor] = {}
    for index, total in totals.items():
        space = channels.layers[index].source
        value = measure(*total, channels.widths[space])
        found[space] = found[space] + value if space in found else value
    return found
