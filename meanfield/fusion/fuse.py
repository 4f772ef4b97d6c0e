"""Several trained networks made one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from meanfield.fusion.averaging import average
from meanfield.fusion.channels import Channels, copied
from meanfield.fusion.matching import MATCHINGS, aligned
from meanfield.fusion.signals import checked_images
from meanfield.fusion.union import Ensemble, union
from meanfield.precision import full_float32
from meanfield.signatures import checked
from meanfield.subject import Network
from meanfield.validation import Misuse, choice, instance

METHODS = ("average", *MATCHINGS, "ensemble", "union")


@checked
@torch.inference_mode(False)
@torch.no_grad()
@full_float32()
def fuse(
    a: Network,
    b: Network,
    images: Tensor,
    method: Annotated[str, choice(METHODS)] = "union",
    *,
    others: Sequence[Network] = (),
    repair: bool = False,
) -> nn.Module:
    """Networks a, b and `others` as one module, in evaluation mode with parameters of its own; (N, ...) -> (N, K).

    images: (N, ...), without labels: for matching and for statistics.
    method: "average", the mean of all weights as they stand; "weights", "activations" and "transport", the mean after
        all networks were brought into the order of a's channels (see `matched`; with "transport" widths may differ, and
        a's are taken); "ensemble", the mean of outputs; "union", the same function as one network with the channels of
        all, see `reduce`.
    repair: of averages, give every hidden layer the means and variances that it has in the networks.
    Batch norm: averages get statistics of the images, never a mean of statistics; unions keep each network's own.

    Networks are those that `Channels.of` describes, particles and FiniteCNN among them, of one form; for "ensemble" any
    modules with outputs of one shape.
    """
    given = (a, b, *instance(others, "others", Sequence))
    arguments = ("a", "b", *(f"others[{index}]" for index in range(len(others))))
    networks = [copied(network, argument) for network, argument in zip(given, arguments)]
    images = checked_images(images, networks[0])
    _require_one_kind(networks, arguments)
    if repair and method in ("ensemble", "union"):
        raise Misuse("repair", repair, f"is of averages; method={method!r} keeps every network as it is")
    if method == "ensemble":
        _require_one_output(networks, arguments, images)
        return Ensemble(networks).eval()
    descriptions = [Channels.of(network, argument) for network, argument in zip(networks, arguments)]
    for description, argument in zip(descriptions[1:], arguments[1:]):
        descriptions[0].require_alike(description, argument)
    if method == "union":
        return union(networks, descriptions)
    first, channels = networks[0], descriptions[0]
    rest = zip(networks[1:], descriptions[1:], arguments[1:])
    if method == "average":
        moved = [_as_it_stands(network, other, channels, argument) for network, other, argument in rest]
    else:
        moved = [aligned(first, channels, network, other, images, method, name) for network, other, name in rest]
    return average([first, *moved], channels, images, repair=repair)


def _as_it_stands(network: nn.Module, other: Channels, channels: Channels, argument: str) -> nn.Module:
    if other.widths != channels.widths:
        remedy = f"are its widths, not {channels.hidden_widths}: choose 'transport', 'union' or 'ensemble'"
        raise Misuse(argument, other.hidden_widths, remedy)
    return network


def _require_one_output(networks: Sequence[nn.Module], arguments: Sequence[str], images: Tensor) -> None:
    shapes = [tuple(network(images[:1].clone()).shape[1:]) for network in networks]
    for shape, argument in zip(shapes, arguments):
        if shape != shapes[0]:
            raise Misuse(argument, shape, f"is the shape of its outputs, not {shapes[0]}")


def _require_one_kind(networks: Sequence[nn.Module], arguments: Sequence[str]) -> None:
    first = next(networks[0].parameters(), torch.empty(0))
    for network, argument in zip(networks[1:], arguments[1:]):
        for tensor in network.parameters():
            if (tensor.dtype, tensor.device) != (first.dtype, first.device):
                kind = f"{tensor.dtype} on {tensor.device}"
                raise Misuse(argument, kind, f"is its kind, that of a {first.dtype} on {first.device}")
