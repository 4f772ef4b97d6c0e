"""A network as a chain of layers that are functions of named values, in the order and layout that cost least.

Against the pass that torch makes of the same modules: maps are channels-last, max pooling comes before the
nondecreasing elementwise functions that it commutes with (h(max) = max h) and is made of maxima of slices, batch norm
of known statistics is folded into the convolution before it, a map of few positions is convolved as one matrix
product, and the columns of a linear layer are reordered in place of the map that it flattens.

`recognise` reads torch's own modules, `ResidualBlock`, `FiniteCNN` and `ParticleNetwork`, of exactly these types and
without hooks: what a subclass or a hook does is not known.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meanfield.activations import Activation
from meanfield.architecture import Architecture
from meanfield.finite.network import FiniteCNN
from meanfield.finite.vgg import ResidualBlock
from meanfield.landscape.products import product
from meanfield.network import ParticleNetwork, along_axis
from meanfield.subject import Subject

# Positions of a map up to which a convolution may be one matrix product; it is where that has no more multiplications
# than a convolution with its channels filled up to CHANNELS, sources and targets (oneDNN works on such vectors).
# Measured on 4x4 and 2x2 maps, product over convolution: 8 to 16 channels 0.55, 16 to 16 0.75, 16 to 32 1.35;
# 32 to 32 on 2x2 0.35
DENSE_POSITIONS = 16
CHANNELS = (16, 32)

Values = dict[str, Tensor]  # parameters and buffers by name
Value = Callable[[Values], Tensor]


class Unknown(Exception):
    """The network is not made of layers that are known; the text says which is not."""


class Layer:
    """signal (N, ...) -> (N, ...), image by image, as a function of named values; the signal is not changed."""

    def __call__(self, values: Values, signal: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Affine(Layer):
    """A layer that is linear in (weight, bias), which are linear in the parameters."""

    weight: Value
    bias: Value | None

    def __call__(self, values: Values, signal: Tensor) -> Tensor:
        return self.apply(signal, *self.weights(values))

    def weights(self, values: Values) -> tuple[Tensor, Tensor | None]:
        return self.weight(values), None if self.bias is None else self.bias(values)

    def apply(self, signal: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Convolution(Affine):
    """weight (M, C / groups, kh, kw); padded with zeros."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] | str = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    def apply(self, signal: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if signal.ndim != 4:
            raise Unknown(f"a convolution of signals of {signal.ndim} dimensions")
        if self._is_product(signal, weight):
            return self._product(signal, weight, bias)
        return functional.conv2d(signal, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _is_product(self, signal: Tensor, weight: Tensor) -> bool:
        positions, filled = signal.shape[2:].numel(), weight.shape[2:].numel()
        for count, step in zip((weight.shape[1], len(weight)), CHANNELS):
            positions, filled = positions * count, filled * (-count // step * -step)
        small = signal.shape[2:].numel() <= DENSE_POSITIONS and positions <= filled
        return small and self.groups == 1 and isinstance(self.padding, tuple)

    def _product(self, signal: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(N, H W C) times a matrix (H W C, H' W' M) of the entries of the kernel that meet."""
        geometry = zip(signal.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation)
        height, width = (axis_taps(*map(int, each)) for each in geometry)
        taps = _taps(height, width, weight.shape[3], str(weight.device))
        columns = signal.movedim(1, 3).flatten(1)
        if taps.numel() == 1 and height[0][0] >= 0 and width[0][0] >= 0:
            found = product(columns, weight[:, :, height[0][0], width[0][0]], bias)
        else:
            entries = functional.pad(weight.flatten(2), (0, 1))[:, :, taps]  # (M, C, H' W', H W), 0 where none meets
            offset = None if bias is None else bias.repeat(len(taps))
            found = product(columns, entries.permute(2, 0, 3, 1).flatten(2).flatten(0, 1), offset)
        return found.view(len(signal), len(height), len(width), len(weight)).movedim(3, 1)


def axis_taps(size: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[tuple[int, ...], ...]:
    """Along one axis: for every output position, which entry of the kernel meets every input position; -1 for none."""
    outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return tuple(
        tuple(_tap(source - stride * target + padding, kernel, dilation) for source in range(size))
        for target in range(outputs)
    )


def _tap(offset: int, kernel: int, dilation: int) -> int:
    inside = offset % dilation == 0 and 0 <= offset // dilation < kernel
    return offset // dilation if inside else -1


@cache
def _taps(height: tuple[tuple[int, ...], ...], width: tuple[tuple[int, ...], ...], kernel: int, device: str) -> Tensor:
    """Positions in the flattened kernel (H' W', H W), -1, the last of a padded one, for none."""
    rows, columns = torch.tensor(height)[:, None, :, None], torch.tensor(width)[None, :, None, :]
    met = torch.where((rows >= 0) & (columns >= 0), rows * kernel + columns, -1)
    return met.flatten(2).flatten(0, 1).to(device)


@dataclass(frozen=True, eq=False)
class Dense(Affine):
    """weight (K, D) on the last axis, or with `flat` on all that an image has, (N, C, H, W) taken as (N, C H W)."""

    flat: bool = False

    def apply(self, signal: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.flat and signal.ndim == 4:
            weight = weight.unflatten(1, signal.shape[1:]).movedim(1, 3).flatten(1)
            signal = signal.movedim(1, 3)
        signal = signal.flatten(1) if self.flat else signal
        return product(signal, weight, bias) if signal.ndim == 2 else functional.linear(signal, weight, bias)


@dataclass(frozen=True, eq=False)
class Norm(Layer):
    """Batch norm by statistics: mean and variance are names.  Statistics that values lack are those of the signal
    itself, over images and positions (the variance divided by their number), and are entered into the values.
    """

    mean: str
    variance: str
    weight: Value | None
    bias: Value | None
    eps: float

    def __call__(self, values: Values, signal: Tensor) -> Tensor:
        if self.mean not in values:
            axes = [axis for axis in range(signal.ndim) if axis != 1]
            values[self.variance], values[self.mean] = torch.var_mean(signal, axes, correction=0)
        scale, shift = self.factors(values)
        return torch.addcmul(along_axis(shift, signal, 1), signal, along_axis(scale, signal, 1))

    def factors(self, values: Values) -> tuple[Tensor, Tensor]:
        """Scale and shift by channel."""
        scale = (values[self.variance] + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight(values)
        shift = -values[self.mean] * scale
        return scale, shift if self.bias is None else shift + self.bias(values)


@dataclass(frozen=True, eq=False)
class Normed(Layer):
    """A convolution and the norm of its channels: one convolution where the statistics are known."""

    affine: Convolution
    norm: Norm

    def __call__(self, values: Values, signal: Tensor) -> Tensor:
        if self.norm.mean not in values:
            return self.norm(values, self.affine(values, signal))
        (weight, bias), (scale, shift) = self.affine.weights(values), self.norm.factors(values)
        offset = shift if bias is None else torch.addcmul(shift, bias, scale)
        return self.affine.apply(signal, weight * along_axis(scale, weight, 0), offset)


@dataclass(frozen=True, eq=False)
class Plain(Layer):
    """A function without parameters.  rises: it is elementwise and nondecreasing."""

    module: Callable[[Tensor], Tensor]
    rises: bool = False

    def __call__(self, values: Values, signal: Tensor) -> Tensor:
        return self.module(signal)

    def owning(self, owned: bool) -> Plain:
        """The same, in place if `owned` and torch has that."""
        if not hasattr(self.module, "inplace"):
            return self
        module = copy.copy(self.module)
        module.inplace = owned  # pyright: ignore[reportFunctionMemberAccess]
        return replace(self, module=module)


@dataclass(frozen=True, eq=False)
class MaxPool(Layer):
    module: nn.MaxPool2d

    def __call__(self, values: Values, signal: Tensor) -> Tensor:
        module, (height, width) = self.module, _pair(self.module.kernel_size)
        apart = _pair(module.stride) == (height, width) and 1 not in (height, width)
        whole = (_pair(module.padding), _pair(module.dilation), module.ceil_mode) == ((0, 0), (1, 1), False)
        if not (apart and whole and signal.ndim == 4):
            return module(signal)
        rows = _maximum(signal[:, :, : signal.shape[2] // height * height], 2, height)
        return _maximum(rows[:, :, :, : rows.shape[3] // width * width], 3, width)


def _maximum(signal: Tensor, axis: int, step: int) -> Tensor:
    """Over windows of so many, (..., step n, ...) -> (..., n, ...); nan where one of them is.  A third of the time that
    max_pool2d takes.
    """
    return reduce(torch.maximum, signal.unflatten(axis, (-1, step)).unbind(axis + 1))


@dataclass(frozen=True, eq=False)
class Flatten(Layer):
    start: int = 1
    end: int = -1

    def __call__(self, values: Values, signal: Tensor) -> Tensor:
        return signal.flatten(self.start, self.end)


@dataclass(frozen=True, eq=False)
class Residual(Layer):
    """body(signal) + shortcut(signal)."""

    body: Chain
    shortcut: Chain

    def __call__(self, values: Values, signal: Tensor) -> Tensor:
        return self.body(values, signal) + self.shortcut(values, signal)


class Chain(Layer):
    """Layers one after another, arranged so that they cost least."""

    def __init__(self, layers: Iterable[Layer], *, owned: bool = False) -> None:
        """owned: the signal that enters is nobody else's, and may be changed."""
        self.layers = _in_place(_merged(_pooled_first(list(layers))), owned)

    def __call__(self, values: Values, signal: Tensor) -> Tensor:
        for layer in self.layers:
            signal = layer(values, signal)
        return signal

    def bytes_each(self, values: Values, image: Tensor) -> int:
        """What the signals of one image (1, ...) take, all of them."""
        total = image.numel()
        for layer in self.layers:
            image = layer(values, image)
            total += image.numel()
        return total * image.element_size()


def _pooled_first(layers: list[Layer]) -> list[Layer]:
    """Max pooling in front of all that rises."""
    found: list[Layer] = []
    for layer in layers:
        place = len(found)
        if isinstance(layer, MaxPool):
            while place and isinstance(before := found[place - 1], Plain) and before.rises:
                place -= 1
        found.insert(place, layer)
    return found


def _merged(layers: list[Layer]) -> list[Layer]:
    found: list[Layer] = []
    for layer in layers:
        before = found[-1] if found else None
        if isinstance(layer, Norm) and isinstance(before, Convolution):
            found[-1] = Normed(before, layer)
        elif isinstance(layer, Dense) and isinstance(before, Flatten) and (before.start, before.end) == (1, -1):
            found[-1] = replace(layer, flat=True)
        else:
            found.append(layer)
    return found


def _in_place(layers: list[Layer], owned: bool) -> list[Layer]:
    """Elementwise functions in place behind what makes a tensor of its own."""
    found: list[Layer] = []
    for layer in layers:
        found.append(layer.owning(owned) if isinstance(layer, Plain) else layer)
        owned = owned or isinstance(layer, (Affine, Norm, Normed, MaxPool, Residual))
    return found


def recognise(subject: Subject) -> list[Layer]:
    """The layers of a network; Unknown where one of its modules, or what is hooked to it, is not known."""
    if isinstance(subject.network, ParticleNetwork):
        return _particles(subject.network)
    if any(_GLOBAL_HOOKS):
        raise Unknown("hooks on all modules")
    names = {id(tensor): name for name, tensor in subject.network.named_parameters()}
    names |= {id(tensor): name for name, tensor in subject.network.named_buffers()}
    return _layers(subject.network, Names(names))


class Names:
    """Names of parameters and buffers, by the tensors themselves: shared ones have one name."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names

    def __call__(self, tensor: Any) -> str:
        if id(tensor) not in self.names:
            raise Unknown("a tensor that is no parameter")
        return self.names[id(tensor)]

    def value(self, tensor: Any) -> Value:
        if not isinstance(tensor, nn.Parameter):
            raise Unknown("a weight that is no parameter")
        return itemgetter(self(tensor))

    def maybe(self, tensor: Any) -> Value | None:
        return None if tensor is None else self.value(tensor)


_GLOBAL_HOOKS = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
)


def _layers(module: nn.Module, names: Names) -> list[Layer]:
    kind = type(module)
    if kind not in READERS:
        raise Unknown(f"a module of type {kind.__name__}")
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise Unknown(f"a {kind.__name__} with hooks")
    return READERS[kind](module, names)


def _sequential(module: Any, names: Names) -> list[Layer]:
    return [layer for child in module for layer in _layers(child, names)]


def _convolution(module: Any, names: Names) -> list[Layer]:
    if module.padding_mode != "zeros":
        raise Unknown(f"a Conv2d with padding_mode={module.padding_mode!r}")
    where = (module.stride, module.padding, module.dilation, module.groups)
    return [Convolution(names.value(module.weight), names.maybe(module.bias), *where)]


def _linear(module: Any, names: Names) -> list[Layer]:
    return [Dense(names.value(module.weight), names.maybe(module.bias))]


def _norm(module: Any, names: Names) -> list[Layer]:
    if module.running_mean is None or module.running_var is None:
        raise Unknown("a batch norm without running statistics")
    statistics = names(module.running_mean), names(module.running_var)
    return [Norm(*statistics, names.maybe(module.weight), names.maybe(module.bias), module.eps)]


def _flatten(module: Any, names: Names) -> list[Layer]:
    if module.start_dim < 1:
        raise Unknown(f"a Flatten with start_dim={module.start_dim}")
    return [Flatten(module.start_dim, module.end_dim)]


def _max_pool(module: Any, names: Names) -> list[Layer]:
    if module.return_indices:
        raise Unknown("a MaxPool2d that returns indices")
    return [MaxPool(module)]


def _elementwise(module: Any, names: Names) -> list[Layer]:
    return [Plain(module, rises=RISES[type(module)](module))]


def _plain(module: Any, names: Names) -> list[Layer]:
    return [Plain(module)]


def _residual(module: Any, names: Names) -> list[Layer]:
    activate = _activation(module.activation)
    inner = [*_layers(module.conv1, names), *_layers(module.norm1, names)]
    outer = [*_layers(module.conv2, names), *_layers(module.norm2, names)]
    return [Residual(Chain([*inner, activate, *outer]), Chain(_layers(module.shortcut, names))), activate]


def _finite(module: Any, names: Names) -> list[Layer]:
    *factors, last = module.forward_factors
    kernels = [_scaled(names(kernel), factor) for kernel, factor in zip(module.kernels, factors)]
    biases = [names.maybe(bias) for bias in module.biases]
    return _continuous(module.architecture, kernels, biases, _scaled(names(module.readout), last))


def _particles(network: ParticleNetwork) -> list[Layer]:
    channels, masses = network.architecture.input_shape[0], network.masses
    sources = [1 / channels, *(each[None, :, None, None] for each in masses[:-1])]
    kernels = [_scaled(f"kernels.{layer}", source) for layer, source in enumerate(sources)]
    biases = [None if bias is None else itemgetter(f"biases.{layer}") for layer, bias in enumerate(network.biases)]
    readout = _scaled("readout", along_axis(masses[-1], network.readout, 1))
    return _continuous(network.architecture, kernels, biases, readout)


def _scaled(name: str, factor: Tensor | float) -> Value:
    return lambda values: values[name] * factor


def _continuous(
    architecture: Architecture, kernels: Sequence[Value], biases: Sequence[Value | None], readout: Value
) -> list[Layer]:
    """`network.propagate` and the readout after it."""
    pools = {"average": lambda size: Plain(nn.AvgPool2d(size)), "max": lambda size: MaxPool(nn.MaxPool2d(size))}
    found: list[Layer] = []
    for layer, kernel, bias in zip(architecture.layers, kernels, biases):
        found.append(Convolution(kernel, bias, layer.stride, layer.padding))  # type: ignore[arg-type]
        found.append(_activation(layer.h))
        found += [pools[layer.pooling](layer.pool_size)] if layer.pooling in pools else []
    if architecture.readout == "average":
        return [*found, Plain(architecture.readout_features), Dense(readout, None)]
    share = 1 / architecture.readout_positions
    return [*found, Dense(lambda values: share * readout(values).flatten(1), None, flat=True)]


def _activation(activation: Activation) -> Plain:
    module = activation.module()
    rises = RISES.get(type(module))
    return Plain(activation.function) if rises is None else Plain(module, rises=rises(module))


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, Sequence) else (size, size)
    return height, width


def _always(module: Any) -> bool:
    return True


def _never(module: Any) -> bool:
    return False


# of elementwise modules, whether they are nondecreasing
RISES: dict[type[nn.Module], Callable[[Any], bool]] = {
    nn.ReLU: _always,
    nn.ReLU6: _always,
    nn.Tanh: _always,
    nn.Sigmoid: _always,
    nn.LeakyReLU: lambda module: module.negative_slope >= 0,
    nn.ELU: lambda module: module.alpha >= 0,
    nn.GELU: _never,
    nn.Softplus: _never,  # it falls where its linear part begins
    nn.SiLU: _never,
}
READERS: dict[type[nn.Module], Callable[[Any, Names], list[Layer]]] = {
    nn.Sequential: _sequential,
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    nn.BatchNorm2d: _norm,
    nn.Flatten: _flatten,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _plain,
    nn.AdaptiveAvgPool2d: _plain,
    nn.Identity: lambda module, names: [],
    nn.Dropout: lambda module, names: [],  # in evaluation mode
    nn.Dropout2d: lambda module, names: [],
    ResidualBlock: _residual,
    FiniteCNN: _finite,
    **dict.fromkeys(RISES, _elementwise),
}
