"""What alpha Delta makes of images on a start that is not drawn: Gaussian moments carried through the layers.

Given the features below, a pre-activation of start + alpha Delta is Gaussian: its mean is the displacement's answer,
its variance the start's deviation times the norm of the features.  Carried on are the mean of every entry and

  - the covariances of the positions of a channel; channels of a convolution are taken as uncorrelated, as they are in
    the limit of many channels of an independent start;
  - all covariances of the units of a fully connected layer.

With one layer below the last one, and no maxima, the mean is that over starts exactly, whatever the width; with more
its distance from it vanishes with the width.  docs/theory.md, section 14.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.quasirandom import SobolEngine

from meanfield import limits, validation
from meanfield.activations import ACTIVATIONS, Activation, Pointwise
from meanfield.signatures import checked
from meanfield.transfer.chain import chain
from meanfield.transfer.displacement import Displacement
from meanfield.transfer.gaussian import Field, activated, maximum
from meanfield.transfer.start_law import StartLaw, constant
from meanfield.validation import Misuse

POINTS = 1024  # of the quasi-random normals by which shares of classes are counted
POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
SILENT = (nn.Dropout, nn.Dropout2d, nn.Identity, nn.Flatten)  # in evaluation mode, on what is known by its entries

Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean (N, K) and covariance (N, K, K) of the logits of one image over starts, image by image."""

    mean: Tensor
    covariance: Tensor

    def accuracy(self, labels: Tensor) -> float:
        """The expected share of images whose largest logit is that of their label (N,), with Gaussian logits.

        The logits of a single start differ from their mean by what its readout adds to all images alike; the accuracy
        of the mean logits leaves that out.
        """
        validation.shaped(labels, (len(self.mean),), "labels")
        values, vectors = torch.linalg.eigh(self.covariance.double())
        root = vectors * values.clamp(min=0).sqrt()[:, None, :]
        uniform = SobolEngine(self.mean.shape[1], scramble=True, seed=0).draw(POINTS, dtype=torch.float64)
        tiny = torch.finfo(torch.float64).eps
        points = torch.special.ndtri(uniform.clamp(tiny, 1 - tiny)).to(root.device)
        logits = self.mean.double()[:, None, :] + points @ root.mT
        return float((logits.argmax(2) == labels[:, None]).double().mean())


@checked
def predict(displacement: Displacement, start_law: StartLaw, images: Tensor, alpha: float = 1.0) -> Tensor:
    """Mean logits (N, K) of fresh start + alpha Delta over starts of a law, on images (N, ...); no start is drawn.

    For a chain of layers (nn.Sequential of convolutions, linear layers, activations of `architecture.ACTIVATIONS` and
    pools), a FiniteCNN or a ParticleNetwork.  For one layer of particles this is the exact

        F_alpha(x) = alpha int Delta_u E_xi[ h(alpha Delta_w . x + sigma |x| xi) ] d mu_Delta .
    """
    return moments(displacement, start_law, images, alpha).mean


@checked
@torch.no_grad()
def moments(displacement: Displacement, start_law: StartLaw, images: Tensor, alpha: float = 1.0) -> Moments:
    """As `predict`, with the covariance of the logits of every image over starts.  In float64 throughout."""
    subject = displacement.subject
    movement = subject.at({name: alpha * delta for name, delta in displacement.delta.items()})
    spread = subject.at(constant(subject, start_law))
    steps = _steps(chain(movement, "displacement"), chain(spread, "displacement"))
    subject.taken(images, "images")
    signal = images.double()
    shape = _shape(signal)
    found = []
    for block in limits.blocks(len(images), _bytes_each(steps, shape)):
        field, size = Field(signal[block].reshape(len(signal[block]), shape[0], -1)), shape
        for step in steps:
            field, size = step.carry(field, size)
        found.append(_whole(field))
    return Moments(*(torch.cat(parts).to(images) for parts in zip(*found)))


def _shape(images: Tensor) -> Shape:
    """(C, H, W); vectors are one channel of one row."""
    if images.ndim not in (2, 4):
        raise Misuse("images", tuple(images.shape), "must be images (N, C, H, W) or vectors (N, D)")
    return tuple(images.shape[1:]) if images.ndim == 4 else (1, 1, images.shape[1])  # type: ignore[return-value]


def _whole(field: Field) -> tuple[Tensor, Tensor]:
    """Entries of all channels as one vector (N, K), and their covariance (N, K, K)."""
    (count, channels, places), variance = field.mean.shape, field.covariance
    if variance is None:
        variance = field.mean.new_zeros(count, channels, places, places)
    eye = torch.eye(channels).to(variance)
    full = torch.einsum("ncpq,cd->ncpdq", variance.expand(count, channels, places, places), eye)
    return field.mean.flatten(1), full.reshape(count, channels * places, -1)


# --- steps: a module each, from a field of one shape to a field of another ------------------------------------------


class _Step(NamedTuple):
    """carry: (field, shape of its images) -> the same behind the module.  module: for the shape."""

    carry: Callable[[Field, Shape], tuple[Field, Shape]]
    module: nn.Module


def _steps(movement: list[tuple[str, nn.Module]], spread: list[tuple[str, nn.Module]]) -> list[_Step]:
    """Maxima go before the activations that they follow: the same for increasing h, and exact of Gaussians first."""
    pairs = [(name, moving, random) for (name, moving), (_, random) in zip(movement, spread)]
    for place, (first, second) in enumerate(pairwise(list(pairs))):
        if isinstance(second[1], nn.MaxPool2d) and (kind := _activation(first[1])) is not None:
            _require_increasing(first[0], kind)
            pairs[place : place + 2] = [second, first]
    return [_Step(_carrier(name, moving, random), moving) for name, moving, random in pairs]


def _carrier(name: str, moving: nn.Module, random: nn.Module) -> Callable[[Field, Shape], tuple[Field, Shape]]:
    if isinstance(moving, nn.Linear) and isinstance(random, nn.Linear):
        return lambda field, shape: _connected(name, moving, _deviations(random), field, shape)
    if isinstance(moving, nn.Conv2d) and isinstance(random, nn.Conv2d):
        if moving.groups > 1 or isinstance(moving.padding, str) or moving.padding_mode != "zeros":
            raise _refusal(name, moving)
        return lambda field, shape: _convolved(moving, _deviations(random), field, shape)
    if isinstance(moving, POOLS):
        return lambda field, shape: _averaged(moving, field, shape)
    if isinstance(moving, nn.MaxPool2d) and not moving.ceil_mode and not moving.return_indices and not moving.padding:
        return lambda field, shape: _maximised(moving, field, shape)
    if (kind := _activation(moving)) is not None:
        function = kind.function  # the module may work in place
        return lambda field, shape: (activated(field, function, relu=kind.name == "relu"), shape)
    if isinstance(moving, SILENT):
        return lambda field, shape: (field, shape)
    raise _refusal(name, moving)


def _refusal(name: str, module: nn.Module) -> Misuse:
    kinds = f"Conv2d, Linear, pools, Flatten, {', '.join(ACTIVATIONS)}"
    return Misuse("displacement", f"{name} ({type(module).__name__})", f"has no prediction: known are {kinds}")


def _activation(module: nn.Module) -> Activation | None:
    """A module with settings that are not the registered ones is another activation."""
    if isinstance(module, Pointwise):
        return module.activation
    said = repr(module).replace("inplace=True", "")
    return next((each for each in ACTIVATIONS.values() if repr(each.module()) == said), None)


def _require_increasing(name: str, kind: Activation) -> None:
    grid = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    if bool((kind.function(grid).diff() < 0).any()):
        remedy = "has no prediction before a maximum, which it would have to follow: it is not increasing"
        raise Misuse("displacement", f"{name} ({kind})", remedy)


def _deviations(module: nn.Linear | nn.Conv2d) -> tuple[float, float]:
    """Of weights and of the bias."""
    return float(module.weight.flatten()[0]), 0.0 if module.bias is None else float(module.bias[0])


def _connected(
    name: str, module: nn.Linear, deviations: tuple[float, float], field: Field, shape: Shape
) -> tuple[Field, Shape]:
    """g = (alpha D + s xi) f + alpha d + s_b eta: units are one channel of `out_features` places."""
    if module.in_features != prod(shape):
        raise Misuse("displacement", f"{name} (Linear)", f"reads {module.in_features} features of a map {shape}")
    weight, (count, channels, _) = module.weight.double(), field.mean.shape
    bias = None if module.bias is None else module.bias.double()
    mean = functional.linear(field.mean.flatten(1), weight, bias)[:, None]
    power = (field.mean.square() + field.variance).sum((1, 2))
    noise = deviations[0] ** 2 * power + deviations[1] ** 2
    covariance = torch.diag_embed(noise[:, None].expand(count, module.out_features))[:, None]
    if field.covariance is not None:
        split = weight.reshape(len(weight), channels, -1).movedim(1, 0)  # (C, units, places)
        half = split @ field.covariance.expand(count, channels, -1, -1)
        covariance = covariance + (half.movedim(1, 2).flatten(2) @ weight.T)[:, None]
    return Field(mean, covariance), (1, 1, module.out_features)


def _convolved(module: nn.Conv2d, deviations: tuple[float, float], field: Field, shape: Shape) -> tuple[Field, Shape]:
    """The start's part is the same for every channel; the displacement carries the covariances of its sources."""
    count, weight = len(field.mean), module.weight.double()
    geometry = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
    bias = None if module.bias is None else module.bias.double()
    mean = functional.conv2d(field.mean.reshape(count, *shape), weight, bias, **geometry)
    noise = deviations[0] ** 2 * _shifted(module, _second_moments(field), shape) + deviations[1] ** 2
    covariance = noise[:, None]
    if field.covariance is not None:
        covariance = covariance + _sandwiched(field.covariance.expand(count, shape[0], -1, -1), weight, shape, geometry)
    return Field(mean.flatten(2), covariance), (len(weight), mean.shape[2], mean.shape[3])


def _sandwiched(covariance: Tensor, weight: Tensor, shape: Shape, geometry: dict[str, Any]) -> Tensor:
    """sum_i B_ji cov_i B_ji^T, (N, targets, P', P'), of covariances (N, sources, P, P): B_ji convolves by w_ji.

    Both ways are convolutions: over the rows, every source for all targets, then over the columns, summed by target.
    """
    (count, sources, places, _), targets = covariance.shape, len(weight)
    apart = weight.movedim(1, 0).reshape(-1, 1, *weight.shape[2:])
    maps = covariance.movedim(3, 1).reshape(count * places, sources, *shape[1:])
    rows = functional.conv2d(maps, apart, groups=sources, **geometry).reshape(count, places, sources, targets, -1)
    maps = rows.permute(0, 4, 3, 2, 1).reshape(-1, targets * sources, *shape[1:])
    columns = functional.conv2d(maps, weight, groups=targets, **geometry).flatten(2)
    return columns.unflatten(0, (count, -1)).movedim(1, 2)


def _second_moments(field: Field) -> Tensor:
    """sum over channels of E f(p) f(q), (N, P, P)."""
    found = field.mean.mT @ field.mean
    if field.covariance is None:
        return found
    return found + field.covariance.expand(*field.mean.shape[:2], -1, -1).sum(1)


def _shifted(module: nn.Conv2d, moments: Tensor, shape: Shape) -> Tensor:
    """sum_s moments(p + s, q + s), (N, P', P'): 0 outside of the map."""
    padded = functional.pad(moments, (1, 0, 1, 0))  # place 0 is outside
    places = torch.arange(1, prod(shape[1:]) + 1, dtype=torch.float64, device=moments.device).reshape(1, 1, *shape[1:])
    taps = functional.unfold(places, module.kernel_size, module.dilation, module.padding, module.stride)[0].long()  # type: ignore[arg-type]
    return torch.stack([padded[:, tap][:, :, tap] for tap in taps]).sum(0)


def _averaged(module: nn.Module, field: Field, shape: Shape) -> tuple[Field, Shape]:
    places = prod(shape[1:])
    basis = module(torch.eye(places).to(field.mean).reshape(places, 1, *shape[1:]))
    return field.mapped(basis.flatten(1).T), (shape[0], *basis.shape[2:])


def _maximised(module: nn.MaxPool2d, field: Field, shape: Shape) -> tuple[Field, Shape]:
    places = torch.arange(prod(shape[1:]), dtype=torch.float64).reshape(1, 1, *shape[1:])
    windows = functional.unfold(places, module.kernel_size, module.dilation, 0, module.stride)[0].long().T  # type: ignore[arg-type]
    return maximum(field, windows.to(field.mean.device)), (shape[0], *module(places).shape[2:])


def _bytes_each(steps: list[_Step], shape: Shape) -> int:
    """That one image takes: a few fields of the largest step, and what a convolution holds between its two passes."""
    largest, random = 1, False
    for step in steps:
        module, places = step.module, prod(shape[1:])
        if isinstance(module, nn.Conv2d):
            after = module(torch.zeros(1, *shape).to(module.weight)).shape[1:]
            crossed = shape[0] * after[0] * places * prod(after[1:]) if random else 0
            largest, shape, random = max(largest, crossed, after[0] * prod(after[1:]) ** 2), tuple(after), True
        elif isinstance(module, nn.Linear):
            units, shape = module.out_features, (1, 1, module.out_features)
            largest = max(largest, units**2, units * module.in_features)
        elif isinstance(module, (*POOLS, nn.MaxPool2d)):
            shape = tuple(module(torch.zeros(1, *shape)).shape[1:])
    return 6 * 8 * largest
