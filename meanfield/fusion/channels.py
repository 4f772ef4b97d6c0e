"""The channels of a network: which layers write them, which read them, and what acts on each of them by itself.

A space is a set of channels that move together.  A residual stream is one space, whatever the number of blocks that add
to it.  Permuting channels, averaging them, putting networks side by side and removing channels all go by this
description, and by nothing else of a network.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meanfield.architecture import ACTIVATIONS
from meanfield.finite.network import FiniteCNN, sequential
from meanfield.finite.vgg import ResidualBlock
from meanfield.network import ParticleNetwork
from meanfield.precision import full_float32
from meanfield.storage.tensors import digest
from meanfield.subject import Network
from meanfield.validation import Misuse, WrongType

INPUTS = 0  # the space of the images' own channels
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
MEANS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
POOLS = (*MEANS, nn.MaxPool2d, nn.AdaptiveMaxPool2d)
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)  # in evaluation mode
POINTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.Mish, nn.GELU),
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish),
)


class Layer(NamedTuple):
    """A Conv2d or Linear, called once a pass: its name, the space it reads, the space it writes or adds to, the batch
    norm that takes its output, if there is one, and of the last one of a residual block the shortcut to whose output
    it is then added.
    """

    name: str
    source: int
    target: int
    norm: str | None = None
    beside: str | None = None


class Axis(NamedTuple):
    """An axis of a tensor along which the channels of a space stand, each at one place or at as many in a row; a slope
    that a PReLU has for all of them has no axis.

    read: the tensor is what a layer multiplies these channels with, and does not belong to them.
    """

    axis: int
    space: int
    read: bool


@dataclass(frozen=True)
class Channels:
    """The spaces of a network and the layers between them.

    widths: channels of every space, that of the images first, that of the outputs last, in the order of their first
        layers.
    layers: each behind all whose outputs it reads or is added to.
    norms: batch norm -> the space whose channels it scales.
    slopes: PReLU -> the space on whose channels it acts, and whether it has a slope for each.
    order: every module of a network without blocks, in the order in which they are called.
    form: everything but the widths, as text: networks of one form differ in their widths at most.
    linear_end: whether nothing behind the last layer is nonlinear, so that a mean of last layers is a mean of outputs.
    """

    widths: tuple[int, ...]
    layers: tuple[Layer, ...]
    norms: Mapping[str, int]
    slopes: Mapping[str, tuple[int, bool]]
    order: tuple[str, ...]
    form: tuple[str, ...]
    linear_end: bool

    @classmethod
    def of(cls, network: nn.Module, argument: str = "network") -> Channels:
        """Misuse, by the name of the module, where what a network does with its channels is not known.

        network: an nn.Sequential, also of others, of Conv2d (without groups), Linear, batch norm, activations that act
        on every entry by itself, pools, Flatten, Dropout and the blocks of `finite.vgg.residual`; in front of the first
        layer and behind the last one any modules.
        """
        walk = _Walk(network, argument)
        lists = (tuple(each) for each in (walk.order, walk.form))
        return cls(
            *(tuple(walk.widths), tuple(walk.layers), walk.norms, walk.slopes), *lists, linear_end=not walk.nonlinear
        )

    @property
    def hidden(self) -> range:
        """The spaces between the images' and the outputs'."""
        return range(INPUTS + 1, len(self.widths) - 1)

    @property
    def output(self) -> int:
        """The space of the outputs."""
        return len(self.widths) - 1

    @property
    def hidden_widths(self) -> tuple[int, ...]:
        """Channels of every hidden space, in the order of `hidden`."""
        return self.widths[1:-1]

    def readers(self, space: int) -> tuple[Layer, ...]:
        """The layers whose input channels are those of `space`; none of the outputs'."""
        return tuple(layer for layer in self.layers if layer.source == space)

    @property
    def is_chain(self) -> bool:
        """Whether every hidden space is read by one layer and written by one, so that whatever comes before a layer has
        been passed before it.
        """
        return len(self.layers) == len(self.widths) - 1

    def axes(self) -> Iterator[tuple[str, tuple[Axis, ...]]]:
        """Names of tensors as in a state dict, and their axes; tensors that are not there (no bias) among them."""
        for layer in self.layers:
            yield f"{layer.name}.weight", (Axis(0, layer.target, False), Axis(1, layer.source, True))
            yield f"{layer.name}.bias", (Axis(0, layer.target, False),)
        for norm, space in self.norms.items():
            for tensor in NORM_TENSORS:
                yield f"{norm}.{tensor}", (Axis(0, space, False),)
        for slope, (space, each) in self.slopes.items():
            yield f"{slope}.weight", (Axis(0, space, False),) if each else ()

    def require_alike(self, other: Channels, argument: str) -> None:
        """Misuse unless `other`, of the argument of that name, has this form, these inputs and these outputs."""
        for here, there in zip(self.form, other.form):
            if here != there:
                raise Misuse(argument, there, f"is where the first network has {here}: give networks alike")
        if len(self.form) != len(other.form):
            raise Misuse(argument, len(other.form), f"is its number of layers, and {len(self.form)} that of the first")
        for what, space in (("inputs", INPUTS), ("outputs", -1)):
            if self.widths[space] != other.widths[space]:
                raise Misuse(argument, other.widths[space], f"is its number of {what}, not {self.widths[space]}")


class _Walk:
    """A pass through a network without images, which notes layers and spaces."""

    def __init__(self, network: nn.Module, argument: str) -> None:
        self.argument = argument
        self.widths = [0]  # that of the images is the first layer's to say
        self.layers: list[Layer] = []
        self.norms: dict[str, int] = {}
        self.slopes: dict[str, tuple[int, bool]] = {}
        self.order: list[str] = []
        self.form: list[str] = []
        self.unknown: Misuse | None = None  # where it is in front of another layer
        self.nonlinear = False
        self.seen: set[int] = set()
        self.flat: bool | None = None
        self.latest: int | None = None  # the layer whose output this is, untouched
        end = self.through(network, "", INPUTS)
        if not self.layers:
            raise self.refusal("", network, "has no Conv2d and no Linear, and so no channels")
        if end != len(self.widths) - 1 or self._written(end) > 1:
            raise self.refusal("", network, "ends in a residual block; end it with a layer")
        if end in self.norms.values():
            raise self.refusal(next(n for n, s in self.norms.items() if s == end), None, "follows the last layer")

    def refusal(self, name: str, module: nn.Module | None, reason: str) -> Misuse:
        kind = "" if module is None else type(module).__name__
        return Misuse(self.argument, " ".join(filter(None, (name, kind))), reason)

    def through(self, module: nn.Module, name: str, space: int) -> int:
        """The space behind a module in front of which there is `space`."""
        if module._forward_hooks or module._forward_pre_hooks:
            raise self.refusal(name, module, "has hooks, and may do more than its kind does; remove them")
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            for child, inner in module._modules.items():  # a module that stands twice included
                assert inner is not None
                space = self.through(inner, f"{name}.{child}" if name else child, space)
            return space
        if type(module) is ResidualBlock:
            return self.block(module, name, space)
        self.order.append(name)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            return self.layer(module, name, space)
        if isinstance(module, NORMS):
            return self.norm(module, name, space)
        if isinstance(module, nn.PReLU):
            self.slope(module, name, space)
        else:
            self.each(module, name)
        return space

    def layer(self, module: nn.Conv2d | nn.Linear, name: str, source: int, target: int | None = None) -> int:
        if self.unknown is not None:
            raise self.unknown
        is_conv = type(module) is nn.Conv2d
        if not is_conv and type(module) is not nn.Linear:
            raise self.refusal(name, module, "is a kind of its own; give plain Conv2d and Linear layers")
        if is_conv and module.groups > 1:
            raise self.refusal(name, module, f"has groups={module.groups}, whose channels do not move freely")
        if is_conv == self.flat:  # None, in front of the first layer, is neither
            raise self.refusal(name, module, "takes maps here, not vectors" if not is_conv else "takes vectors here")
        self._require_unseen(module, name)
        width = self.widths[source] = self.widths[source] or module.weight.shape[1]
        positions = module.weight.shape[1] / width
        if target is None:
            self.widths.append(len(module.weight))
            target = len(self.widths) - 1
        self.flat, self.latest, self.nonlinear = not is_conv, len(self.layers), False
        self.layers.append(Layer(name, source, target))
        geometry = (
            f"{module.kernel_size} {module.stride} {module.padding} {module.dilation} {module.padding_mode}"
            if isinstance(module, nn.Conv2d)
            else f"of {positions:g} positions"
        )
        self.form.append(f"{type(module).__name__} {geometry} bias={module.bias is not None} {source}->{target}")
        return target

    def norm(self, module: Any, name: str, space: int) -> int:
        if module.running_mean is None:
            raise self.refusal(name, module, "keeps no running statistics; set track_running_stats=True")
        if space == INPUTS:
            raise self.refusal(name, module, "normalises the images themselves; do that before the network")
        self._require_unseen(module, name)
        self.norms[name] = space
        if self.latest is not None:
            self.layers[self.latest] = self.layers[self.latest]._replace(norm=name)
        self.latest = None
        self.form.append(f"{type(module).__name__} eps={module.eps} affine={module.affine}")
        return space

    def slope(self, module: nn.PReLU, name: str, space: int) -> None:
        if space == INPUTS:
            raise self.refusal(name, module, "acts on the images themselves; do that before the network")
        self._require_unseen(module, name)
        single = module.num_parameters == 1 and self.widths[space] > 1
        self.slopes[name] = (space, not single)
        self.form.append(f"PReLU of {'one slope' if single else 'a slope for each channel'}")
        self.latest, self.nonlinear = None, True

    def each(self, module: nn.Module, name: str) -> None:
        """What acts on every channel by itself; anything else can only be in front of all layers or behind them."""
        known = {*POOLS, *NOTHING, *POINTWISE, nn.Flatten, *(type(each.module()) for each in ACTIVATIONS.values())}
        plain = type(module) in known and not any(True for _ in module.parameters())
        if not plain or (isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1)):
            if self.layers:
                self.unknown = self.refusal(name, module, "is not known to act on every channel by itself")
            held = module.state_dict()
            self.form.append(f"{module!r}" + (f" of tensors {digest(held.values())[:8]}" if held else ""))
            self.latest, self.nonlinear = None, True
            return
        if isinstance(module, NOTHING):
            return
        self.form.append(repr(module).replace(", inplace=True", "").replace("inplace=True", ""))
        if isinstance(module, nn.Flatten):
            self.flat = True
        else:
            self.latest = None
            self.nonlinear |= not isinstance(module, MEANS)

    def block(self, module: ResidualBlock, name: str, space: int) -> int:
        """relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))."""
        self.form.append("block")
        inner = self.through(module.norm1, f"{name}.norm1", self.through(module.conv1, f"{name}.conv1", space))
        self.latest = None
        target = self.shortcut(module, f"{name}.shortcut", space)
        self.layer(module.conv2, f"{name}.conv2", inner, target)
        self.layers[-1] = self.layers[-1]._replace(beside=f"{name}.shortcut")
        self.through(module.norm2, f"{name}.norm2", target)
        self.latest, self.nonlinear = None, True
        return target

    def shortcut(self, block: ResidualBlock, name: str, space: int) -> int:
        """The space behind the shortcut of a block, in front of which there is `space`: that one, or another."""
        if isinstance(block.shortcut, nn.Identity):
            if space == INPUTS:
                raise self.refusal(name, block, "adds to the images themselves; put a layer in front of it")
            return space
        alone = isinstance(block.shortcut, nn.Conv2d)
        modules = [("", block.shortcut)] if alone else list(block.shortcut.named_children())
        for child, module in modules:
            space = self.through(module, ".".join(filter(None, (name, child))), space)
        return space

    def _written(self, space: int) -> int:
        return sum(layer.target == space for layer in self.layers)

    def _require_unseen(self, module: nn.Module, name: str) -> None:
        own = {id(tensor) for tensor in module.parameters()}
        if own & self.seen:
            raise self.refusal(name, module, "shares parameters with another place, whose channels then move together")
        self.seen |= own


def copied(network: Network, argument: str) -> nn.Module:
    """A copy in evaluation mode, its flags of requires_grad kept; particles and FiniteCNN as `finite.sequential`."""
    if isinstance(network, (ParticleNetwork, FiniteCNN)):
        return sequential(network).eval()
    if not isinstance(network, nn.Module):
        raise WrongType(argument, type(network).__name__, "a torch.nn.Module or a ParticleNetwork")
    return copy.deepcopy(network).eval()


def replaced(network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy with some tensors of the state dict replaced, of other sizes as well."""
    found = copy.deepcopy(network)
    for name, tensor in tensors.items():
        place, _, own = name.rpartition(".")
        module = found.get_submodule(place)
        tensor = tensor.detach().contiguous()
        old = module._parameters.get(own)
        if own in module._buffers:
            module._buffers[own] = tensor
        else:
            module._parameters[own] = nn.Parameter(tensor, requires_grad=old is None or old.requires_grad)
        if own == "weight" and tensor.ndim > 1:
            targets, sources = tensor.shape[:2]
            counts = (
                ("out_channels", "in_channels") if isinstance(module, nn.Conv2d) else ("out_features", "in_features")
            )
            for count, value in zip(counts, (targets, sources)):
                setattr(module, count, value)
        elif own == "running_mean":
            module.num_features = len(tensor)  # type: ignore[assignment]
        elif isinstance(module, nn.PReLU):
            module.num_parameters = len(tensor)
    return found


@full_float32()
def moved(
    network: nn.Module, channels: Channels, written: Mapping[int, Tensor], read: Mapping[int, Tensor] | None = None
) -> nn.Module:
    """A copy whose channels are combinations of those of the network.

    written: space -> (new, old), the weights of old channels in what makes a new one: kernels, biases, scales.
    read: space -> (new, old), of old channels' weights in what a layer multiplies a new channel with; by default
        `written`, which is right for permutations and for leaving channels out.
    A permutation keeps the function: what is multiplied by 1 and 0 is not rounded.
    """
    by_kind = {False: written, True: written if read is None else read}
    state, found = network.state_dict(), {}
    for name, axes in channels.axes():
        chosen = [axis for axis in axes if axis.space in by_kind[axis.read]]
        if name not in state or not chosen:
            continue
        tensor = state[name]
        for axis in chosen:
            tensor = _combined(tensor, axis.axis, by_kind[axis.read][axis.space])
        found[name] = tensor
    return replaced(network, found)


def _combined(tensor: Tensor, axis: int, matrix: Tensor) -> Tensor:
    old = tensor.movedim(axis, 0).unflatten(0, (matrix.shape[1], -1))
    return torch.tensordot(matrix.to(old), old, 1).flatten(0, 1).movedim(0, axis)


def chosen(indices: Tensor, width: int) -> Tensor:
    """The rows (new, old) for `moved` that take some of `width` channels, in this order."""
    return torch.eye(width, dtype=torch.float64, device=indices.device)[indices]
