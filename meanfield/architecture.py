"""Convolutional architectures: layers, shapes, activations, pooling and patches.  No parameters live here.

Notation of the documentation: layer l has P_l output positions before pooling and S_l kernel offsets; the shift
T_s picks, for every output position, the input value at offset s (one column of `Conv.patches`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from meanfield.activations import ACTIVATIONS, Activation, resolve
from meanfield.precision import full_float32
from meanfield.validation import Misuse, boolean, instance, integer, one_of, pair

POOLINGS = ("none", "average", "max")
READOUTS = ("average", "flatten")


@dataclass(frozen=True)
class Conv:
    """One convolutional layer: shifts, activation h, then pooling.

    kernel_size, padding, stride and pool_size are integers or (height, width) pairs and are stored as pairs; padding
    is with zeros.  pooling works on non-overlapping pool_size windows, incomplete windows are dropped.
    activation: a name of `activations.ACTIVATIONS`, an Activation, or a function of which nothing is declared; stored
    as an Activation.
    """

    kernel_size: int | tuple[int, int] = 3
    padding: int | tuple[int, int] = 0
    stride: int | tuple[int, int] = 1
    activation: str | Activation | Callable[[Tensor], Tensor] = "relu"
    pooling: str = "none"
    pool_size: int | tuple[int, int] = 2
    bias: bool = False

    def __post_init__(self) -> None:
        for name, minimum in (("kernel_size", 1), ("padding", 0), ("stride", 1), ("pool_size", 1)):
            object.__setattr__(self, name, pair(getattr(self, name), name, minimum))
        object.__setattr__(self, "activation", resolve(self.activation))
        one_of(self.pooling, "pooling", POOLINGS)
        object.__setattr__(self, "bias", boolean(self.bias, "bias"))

    @property
    def kernel(self) -> tuple[int, int]:
        """Kernel (height, width)."""
        return self.kernel_size  # type: ignore[return-value]

    @property
    def offsets(self) -> int:
        """S_l, the number of kernel offsets."""
        return self.kernel[0] * self.kernel[1]

    @property
    def h(self) -> Activation:
        """The activation."""
        return self.activation  # type: ignore[return-value]

    def convolve(self, inputs: Tensor, kernels: Tensor, bias: Tensor | None = None) -> Tensor:
        """sum_i sum_s kernels[j, i, s] T_s inputs[:, i]: (N, C, H, W), (M, C, kh, kw) -> (N, M, H', W')."""
        with full_float32():
            return functional.conv2d(inputs, kernels, bias, stride=self.stride, padding=self.padding)  # type: ignore[arg-type]

    def patches(self, inputs: Tensor) -> Tensor:
        """The shifts T_s of every channel, (N, C, H, W) -> (N, P, C S), columns channel-major."""
        columns = functional.unfold(inputs, self.kernel, padding=self.padding, stride=self.stride)  # type: ignore[arg-type]
        return columns.transpose(1, 2)

    def chosen_patches(self, signals: Iterable[Tensor], chosen: Tensor) -> Tensor:
        """Rows `chosen` (R,), in any order, of the patches of all images and positions, (R, C S); the images come in
        blocks (n, C, H, W).
        """
        parts, places, first = [], [], 0
        for signal in signals:
            rows = self.patches(signal).flatten(0, 1)
            here = torch.nonzero((first <= chosen) & (chosen < first + len(rows))).flatten()
            parts.append(rows[chosen[here] - first])
            places.append(here)
            first += len(rows)
        return torch.cat(parts)[torch.cat(places).argsort()]

    def activate(self, preactivations: Tensor) -> Tensor:
        """f = pool(h(g)), (N, M, H', W') -> (N, M, H'', W'')."""
        return self.pool(self.h.function(preactivations))

    def pool(self, features: Tensor) -> Tensor:
        """(N, M, H', W') -> (N, M, H'', W'')."""
        if self.pooling == "average":
            return functional.avg_pool2d(features, self.pool_size)  # type: ignore[arg-type]
        if self.pooling == "max":
            return functional.max_pool2d(features, self.pool_size)  # type: ignore[arg-type]
        return features

    def sizes(self, height: int, width: int, where: str) -> tuple[tuple[int, int], tuple[int, int]]:
        """Spatial sizes (before pooling, after pooling) for an input of the given size."""
        output: list[int] = []
        for axis, size in enumerate((height, width)):
            padded = size + 2 * self.padding[axis]  # type: ignore[index]
            if self.kernel[axis] > padded:
                raise Misuse(
                    "kernel_size",
                    self.kernel,
                    f"does not fit the padded input of {where}, {padded} along {('height', 'width')[axis]} "
                    f"(input {size}, padding {self.padding[axis]}); "  # type: ignore[index]
                    "use a smaller kernel or more padding",
                )
            output.append((padded - self.kernel[axis]) // self.stride[axis] + 1)  # type: ignore[index]
        if self.pooling == "none":
            return (output[0], output[1]), (output[0], output[1])
        pooled = [size // step for size, step in zip(output, self.pool_size)]  # type: ignore[arg-type]
        if min(pooled) < 1:
            raise Misuse(
                "pooling",
                self.pooling,
                f"does not fit {where}: pool_size={self.pool_size} leaves no position of the output {tuple(output)}; "
                "pool less, or take larger images",
            )
        return (output[0], output[1]), (pooled[0], pooled[1])


class Geometry(NamedTuple):
    """Spatial (height, width) of one layer: its input, its pre-activations g, its features f after pooling."""

    input: tuple[int, int]
    output: tuple[int, int]
    pooled: tuple[int, int]


@dataclass(frozen=True)
class Architecture:
    """A continuous CNN without its measures: input shape (C_0, H, W), layers, readout rule and number of outputs K."""

    input_shape: tuple[int, int, int]
    layers: tuple[Conv, ...]
    readout: str = "average"
    outputs: int = 1

    def __post_init__(self) -> None:
        shape = tuple(self.input_shape) if isinstance(self.input_shape, Iterable) else (self.input_shape,)
        if len(shape) != 3:
            raise Misuse("input_shape", self.input_shape, "must be (channels, height, width)")
        object.__setattr__(self, "input_shape", tuple(integer(size, "input_shape") for size in shape))
        layers = tuple(self.layers) if isinstance(self.layers, Iterable) else (self.layers,)
        if not layers or not all(isinstance(layer, Conv) for layer in layers):
            raise Misuse("layers", self.layers, "must be a non-empty sequence of Conv")
        object.__setattr__(self, "layers", layers)
        one_of(self.readout, "readout", READOUTS)
        object.__setattr__(self, "outputs", integer(self.outputs, "outputs"))
        _ = self.geometry  # shapes are checked at construction

    @property
    def depth(self) -> int:
        """L, the number of convolutional layers."""
        return len(self.layers)

    @cached_property
    def geometry(self) -> tuple[Geometry, ...]:
        """Channels and sizes of every layer, in their order."""
        size = self.input_shape[1:]
        result: list[Geometry] = []
        for index, layer in enumerate(self.layers):
            output, pooled = layer.sizes(*size, where=f"layers[{index}]")
            result.append(Geometry(size, output, pooled))
            size = pooled
        return tuple(result)

    @property
    def readout_positions(self) -> int:
        """Positions of the last layer after pooling."""
        height, width = self.geometry[-1].pooled
        return height * width

    def kernel_shapes(self, widths: Sequence[int]) -> list[tuple[int, int, int, int]]:
        """Shapes (M_l, M_{l-1}, kh, kw) of the kernels, target first; M_0 = C_0."""
        sources = (self.input_shape[0], *widths[:-1])
        return [(m, c, *layer.kernel) for m, c, layer in zip(widths, sources, self.layers, strict=True)]

    def entries(self, widths: Sequence[int], copies: int = 1) -> int:
        """Numbers that one image takes on its way: its pixels and, before and after pooling, the features of every
        layer, `copies` times, and the largest patches, which a convolution in float64 writes out.
        """
        maps = (width * (prod(size.output) + prod(size.pooled)) for width, size in zip(widths, self.geometry))
        sources = zip((self.input_shape[0], *widths), self.layers, self.geometry)
        patches = (source * layer.offsets * prod(size.output) for source, layer, size in sources)
        return copies * (prod(self.input_shape) + sum(maps)) + max(patches)

    def row_shapes(self, widths: Sequence[int]) -> list[tuple[int, int]]:
        """Of every layer >= 2, what an image adds to its shifted features: (positions, columns)."""
        layers = zip(self.geometry[1:], widths, self.layers[1:])
        return [(prod(size.output), width * conv.offsets + conv.bias) for size, width, conv in layers]

    def readout_shape(self, width: int) -> tuple[int, ...]:
        """(K, M_L), or (K, M_L, positions) for the flattened readout."""
        return (self.outputs, width) if self.readout == "average" else (self.outputs, width, self.readout_positions)

    def readout_features(self, features: Tensor) -> Tensor:
        """What the readout multiplies: mean_q f, (N, M), or f / positions, (N, M, positions)."""
        flat = features.flatten(2)
        return flat.mean(2) if self.readout == "average" else flat / self.readout_positions

    def check_inputs(self, inputs: Tensor, argument: str = "inputs") -> Tensor:
        """`inputs`, if they are images (N, C_0, H, W) of this architecture; Misuse by the name `argument` otherwise."""
        instance(inputs, argument, torch.Tensor)
        if inputs.ndim != 4 or tuple(inputs.shape[1:]) != self.input_shape:
            expected = f"(N, {', '.join(map(str, self.input_shape))})"
            raise ValueError(f"{argument} has shape {tuple(inputs.shape)}; the architecture expects {expected}")
        return inputs

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` inverts it."""
        layers = tuple({**vars(layer), "activation": layer.h.name} for layer in self.layers)
        return {**{each.name: getattr(self, each.name) for each in fields(self)}, "layers": layers}

    @classmethod
    def from_dict(cls, description: dict[str, Any], activations: Iterable[Activation] = ()) -> Architecture:
        """What `to_dict` described; ValueError where it is no architecture.

        activations: those of the description that are not in `activations.ACTIVATIONS`.
        """
        given = {each.name: each for each in activations}
        try:
            layers = tuple(Conv(**{**layer, **_known(layer, given)}) for layer in description["layers"])
            return cls(**{**description, "layers": layers})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"architecture description {description!r} is not one written by to_dict: {error}"
            ) from error


def _known(layer: dict[str, Any], given: dict[str, Activation]) -> dict[str, Activation]:
    """The activation that a layer's description names; ValueError where nobody knows it."""
    name = layer.get("activation")
    if name is None:
        return {}
    if name not in given and name not in ACTIVATIONS:
        raise Misuse(
            "activations", tuple(given), f"must hold {name!r}, an Activation that was in use when this was written"
        )
    return {"activation": given.get(name) or ACTIVATIONS[name]}
