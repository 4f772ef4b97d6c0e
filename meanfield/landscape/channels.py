"""The channels of a chain of layers: in another order, fewer of them, or several times, and what reads them with them.

A chain is an nn.Sequential, also of others, whose layers that mix channels are Conv2d (without groups) and Linear, and
in which everything between two of these acts on every channel by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meanfield.architecture import ACTIVATIONS
from meanfield.grafting.connection import is_linear
from meanfield.validation import Misuse

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
POOLS = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)  # in evaluation mode
RAMPS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.Mish, nn.GELU, nn.Softplus)
SQUASHING = (nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish)


@dataclass(frozen=True)
class Stage:
    """A layer that mixes channels, and what acts on its channels one by one until the next such layer; names of
    modules.
    """

    layer: str
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chain:
    """What is in front of the first layer, and the stages; the last one ends with the output."""

    before: tuple[str, ...]
    stages: tuple[Stage, ...]


def chain(network: nn.Module, argument: str) -> Chain:
    """The layers of a network in their order; Misuse, naming the module, where it is no chain."""
    leaves = list(_leaves(network, "", argument))
    seen: set[int] = set()
    for tensor in (tensor for _, leaf in leaves for tensor in leaf.parameters()):
        if id(tensor) in seen:
            raise Misuse(
                argument, type(network).__name__, "shares parameters between layers, whose channels then move together"
            )
        seen.add(id(tensor))
    places = [index for index, (_, leaf) in enumerate(leaves) if _mixes(leaf)]
    if not places:
        raise Misuse(argument, type(network).__name__, "has no Conv2d and no Linear, and so no channels")
    stages = []
    for place, end in zip(places, [*places[1:], len(leaves)]):
        after = leaves[place + 1 : end]
        if end < len(leaves):
            _require_single(after, argument)
        stages.append(Stage(leaves[place][0], tuple(name for name, _ in after)))
    return Chain(tuple(name for name, _ in leaves[: places[0]]), tuple(stages))


def _leaves(module: nn.Module, name: str, argument: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential):
        if type(module).forward is not nn.Sequential.forward or _hooked(module):
            raise Misuse(argument, name or type(module).__name__, "is an nn.Sequential that does something of its own")
        for child_name, child in module._modules.items():  # also one that stands there twice, such as an activation
            assert child is not None
            yield from _leaves(child, f"{name}.{child_name}" if name else child_name, argument)
    elif not name:
        hint = "; finite.sequential makes one of it" if type(module).__name__ == "FiniteCNN" else ""
        raise Misuse(argument, type(module).__name__, f"is no nn.Sequential, whose layers follow each other{hint}")
    else:
        yield name, module


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear)) and is_linear(module)


def _require_single(after: Sequence[tuple[str, nn.Module]], argument: str) -> None:
    known: set[type[nn.Module]] = set(NORMS + POOLS + NOTHING + RAMPS + SQUASHING + (nn.Flatten,))
    known.update(type(each.module()) for each in ACTIVATIONS.values())
    for name, module in after:
        plain = type(module) in known and not _hooked(module)
        if not plain or (isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1)):
            raise Misuse(
                argument,
                name,
                f"is a {type(module).__name__}, not known to act on every channel by itself; weights and mixture join "
                "any networks",
            )


@torch.no_grad()
def select(network: nn.Module, keep: Sequence[Tensor], shares: Sequence[Tensor] | None = None) -> nn.Module:
    """A copy of a chain with the channels `keep[l]` of layer l, all layers but the last; an index may come twice.

    shares: a factor for what reads each of them, (len(keep[l]),), default 1.  A permutation keeps the function; so do
    several copies of a channel whose shares add up to one.
    """
    found, stages = copy.deepcopy(network), chain(network, "network").stages
    widths = [len(found.get_submodule(stage.layer).weight) for stage in stages]  # pyright: ignore[reportArgumentType]
    for index, (stage, width, rows) in enumerate(zip(stages[:-1], widths[:-1], keep, strict=True)):
        _take(found.get_submodule(stage.layer), rows, width)
        for name in stage.after:
            _take(found.get_submodule(name), rows, width)
        factors = None if shares is None else shares[index]
        _read(found.get_submodule(stages[index + 1].layer), rows, width, factors)
    return found


def _take(module: nn.Module, rows: Tensor, width: int) -> None:
    """The outputs `rows` of a layer, or the channels of a module that acts on each by itself."""
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.ndim and len(tensor) % width == 0:  # not a count of batches, nor one slope for all channels
            _replace(module, name, tensor.detach().unflatten(0, (width, -1))[rows].flatten(0, 1))
    for count in ("out_channels", "out_features", "num_features"):
        if hasattr(module, count):
            setattr(module, count, getattr(module, count) // width * len(rows))


def _read(layer: nn.Module, rows: Tensor, width: int, shares: Tensor | None) -> None:
    """What a layer makes of the channels `rows` of `width`, each of them at one position or at many."""
    weight = layer.weight.detach().unflatten(1, (width, -1))[:, rows]  # pyright: ignore[reportCallIssue]
    if shares is not None:
        weight = weight * shares.to(weight).reshape(1, -1, *[1] * (weight.ndim - 2))
    _replace(layer, "weight", weight.flatten(1, 2))
    count = "in_channels" if isinstance(layer, nn.Conv2d) else "in_features"
    setattr(layer, count, getattr(layer, count) // width * len(rows))


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    old = module.get_parameter(name) if name in dict(module.named_parameters(recurse=False)) else None
    setattr(module, name, tensor if old is None else nn.Parameter(tensor, requires_grad=old.requires_grad))
