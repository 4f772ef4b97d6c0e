"""Passes of images through a network at points of a plane: as the network makes them, or in a chain of known layers.

The first layer of a chain is linear in its parameters, so that on fixed images its pre-activations at
origin + a first + b second are g_0 + a g_1 + b g_2: three convolutions serve all points.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from meanfield import limits
from meanfield.landscape.directions import Plane, Point
from meanfield.landscape.layers import Affine, Chain, Flatten, Layer, MaxPool, Plain, Unknown, Values, recognise
from meanfield.subject import Parameters, Subject

# Of all signals of the images that pass at once.  From 2**25 on torch gives the largest of them back to the system and
# asks for it anew, three times the time of the pass (measured, CNN of 16 and 32 channels on 8x8 pixels)
SIGNAL_BYTES = 2**24
TRIED = 16  # images on which a chain is held against the network, once
Place = tuple[Point, Parameters]  # a point, and statistics that take the place of buffers
Prepared = tuple[Tensor, ...]


class PlainPasses:
    """As the network itself makes them."""

    def __init__(self, subject: Subject, plane: Plane) -> None:
        self.subject, self.plane = subject, plane

    def prepared(self, images: Tensor) -> Prepared:
        """What all points share."""
        return (images,)

    def at_once(self, images: Tensor) -> int:
        """How many images pass at once: batches as they come, for who knows what the network makes of another."""
        return len(images)

    def outputs(self, prepared: Prepared, places: Iterable[Place]) -> Iterator[Tensor]:
        """(N, ...) at one place after another."""
        for (a, b), statistics in places:
            yield self.subject({**self.plane.at(a, b), **statistics}, *prepared)


class ChainPasses:
    """In a chain of layers."""

    def __init__(self, layers: list[Layer], subject: Subject, plane: Plane) -> None:
        self.subject, self.plane, self.flat = subject, plane, _Flat(plane)
        first = next((place for place, layer in enumerate(layers) if not isinstance(layer, _FIXED)), len(layers))
        shared = first < len(layers) and isinstance(layers[first], Affine)
        self.first = layers[first] if shared else None
        self.before = Chain(layers[:first] if shared else [])
        self.after = Chain(layers[first + 1 :] if shared else layers, owned=shared)

    def prepared(self, images: Tensor) -> Prepared:
        """g_0, g_1, g_2; or the images, where the first layer is of another kind."""
        signal = self.before({}, _channels_last(images))
        if not isinstance(self.first, Affine):
            return (signal,)
        # of one channel a convolution leaves the layout open
        return tuple(_channels_last(self.first(self.flat.named(each), signal)) for each in self.flat.vectors)

    def outputs(self, prepared: Prepared, places: Iterable[Place]) -> Iterator[Tensor]:
        """(N, ...) at one place after another, each valid until the next."""
        signals, parameters = _Along(prepared), _Along(self.flat.vectors)
        for point, statistics in places:
            yield self.after(self._values(parameters(point), statistics), signals(point))

    def values(self, point: Point) -> Values:
        return self._values(_Along(self.flat.vectors)(point), {})

    def _values(self, parameters: Tensor, statistics: Parameters) -> Values:
        return {**self.subject.buffers, **self.flat.named(parameters), **statistics}

    def statistics(self, prepared: Prepared, point: Point, names: Iterable[str]) -> Parameters:
        """The statistics of these names at a point, over the images that were prepared."""
        values = self.values(point)
        for name in names:
            del values[name]
        self.after(values, _Along(prepared)(point))
        return {name: values[name] for name in names}

    def at_once(self, images: Tensor) -> int:
        """How many images pass at once."""
        return max(1, min(SIGNAL_BYTES, limits.block_bytes()) // self.bytes_each(images))

    def bytes_each(self, images: Tensor) -> int:
        """What all signals of one of the images take."""
        return self.after.bytes_each(self.values((0.0, 0.0)), self.prepared(images[:1])[0].clone())


_FIXED = (Plain, MaxPool, Flatten)  # layers without parameters


class _Flat:
    """A plane in vectors, which are added up faster than many small tensors."""

    def __init__(self, plane: Plane) -> None:
        kinds = {(tensor.dtype, tensor.device) for tensor in plane.origin.values()}
        if len(kinds) > 1:
            raise Unknown("parameters of several dtypes or devices")
        self.shapes = {name: tensor.shape for name, tensor in plane.origin.items()}
        parts = (plane.origin, plane.first, plane.second)
        self.vectors = tuple(torch.cat([part[name].flatten() for name in self.shapes]) for part in parts)

    def named(self, vector: Tensor) -> Values:
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts)}


def _channels_last(signal: Tensor) -> Tensor:
    return signal.contiguous(memory_format=torch.channels_last) if signal.ndim == 4 else signal


class _Along:
    """origin + a first + b second of three tensors, an only one as it is; of points in one row of a grid, which have a
    in common, the first two terms are added up once.  Every sum takes the place of the one before: memory that is asked
    for anew at each point costs more than the sum.
    """

    def __init__(self, tensors: Prepared) -> None:
        self.tensors, self.a, self.start = tensors, math.nan, tensors[0]
        self.row, self.sum = (torch.empty_like(tensors[0]) if len(tensors) > 1 else None for _ in range(2))

    def __call__(self, point: Point) -> Tensor:
        if len(self.tensors) == 1:
            return self.start
        (a, b), (origin, first, second) = point, self.tensors
        if a != self.a:
            self.a, self.start = a, torch.add(origin, first, alpha=a, out=self.row)
        return torch.add(self.start, second, alpha=b, out=self.sum)


def passes(subject: Subject, plane: Plane, images: Tensor) -> tuple[PlainPasses | ChainPasses, str | None]:
    """The fastest that are known to be right, and why they are not those of a chain, if they are not.

    A chain is held against the network on a few of the images, at the origin and at a random point, also in float64,
    where rounding hides no wrong formula: outputs may differ by sqrt(eps) of the largest.
    """
    plain = PlainPasses(subject, plane)
    try:
        layers = recognise(subject)
        found = ChainPasses(layers, subject, plane)
        for dtype in {images.dtype, torch.float64}:
            if not _agree(layers, subject, _converted(plane, dtype), images[:TRIED].to(dtype)):
                return plain, "the chain of its layers does something else"
    except Unknown as unknown:
        return plain, f"it has {unknown}"
    except Exception as error:  # of any layer that does not take the images: the network itself is to say so
        return plain, f"the chain of its layers fails ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return found, None


def _agree(layers: list[Layer], subject: Subject, plane: Plane, images: Tensor) -> bool:
    buffers = {name: _to(buffer, images.dtype) for name, buffer in subject.buffers.items()}
    generator = torch.Generator().manual_seed(0)
    points = [(0.0, 0.0), tuple((2 * torch.rand(2, generator=generator) - 1).tolist())]
    places: list[Place] = [((a, b), buffers) for a, b in points]
    ours, theirs = ChainPasses(layers, subject, plane), PlainPasses(subject, plane)
    return all(map(_alike, *(each.outputs(each.prepared(images), places) for each in (ours, theirs))))


def _alike(found: Tensor, wanted: Tensor) -> bool:
    size = float(wanted.abs().nan_to_num(0.0, 0.0, 0.0).max()) if wanted.numel() else 0.0
    tolerance = math.sqrt(torch.finfo(wanted.dtype).eps) * size
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=0, atol=tolerance, equal_nan=True)


def _converted(plane: Plane, dtype: torch.dtype) -> Plane:
    parts = (
        {name: _to(each, dtype) for name, each in part.items()} for part in (plane.origin, plane.first, plane.second)
    )
    origin, first, second = parts
    return replace(plane, origin=origin, first=first, second=second)


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
