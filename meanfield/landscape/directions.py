"""Directions in the space of parameters, and the planes that they span."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from meanfield.landscape.subject import Network, Parameters, Subject
from meanfield.network import along_axis
from meanfield.signatures import Seed, checked
from meanfield.starts import normal
from meanfield.validation import one_of

NORMALISATIONS = ("filter", "layer", "element", "none")


@dataclass(frozen=True, eq=False)
class Plane:
    """origin + a first + b second, (a, b) in the plane.

    origin, first, second: parameters by name.  kind: "random", "eigen", "pca", "line" or "triangle".  marks: what lies
    where, name -> (a, b).  warnings: what a reader must know before he trusts a picture.
    """

    origin: Parameters
    first: Parameters
    second: Parameters
    kind: str = "random"
    normalise: str = "none"
    marks: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def at(self, a: float | Tensor, b: float | Tensor) -> Parameters:
        """The parameters at one point."""
        return {name: start + a * self.first[name] + b * self.second[name] for name, start in self.origin.items()}


@checked
def plane(network: Network, seed: Seed = 0, normalise: str = "filter") -> Plane:
    """Two Gaussian directions at a network."""
    one_of(normalise, "normalise", NORMALISATIONS)
    origin = Subject(network).parameters
    generator = torch.Generator().manual_seed(seed)
    first, second = (gaussian(origin, generator, normalise) for _ in range(2))
    return Plane(origin, first, second, "random", normalise)


def gaussian(parameters: Parameters, generator: torch.Generator, normalise: str = "none") -> Parameters:
    """A direction of independent standard normals, normalised; parameters of one dimension get zero."""
    drawn = {name: normal(tensor.shape, generator, tensor) for name, tensor in parameters.items()}
    return {name: _normalised(drawn[name], tensor, normalise) for name, tensor in parameters.items()}


def _normalised(direction: Tensor, weight: Tensor, normalise: str) -> Tensor:
    if weight.ndim < 2:
        return torch.zeros_like(direction)
    if normalise == "filter":
        rows = weight.flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1).clamp_min(math.ulp(0.0))
        return direction * along_axis(rows, direction, 0)
    raise NotImplementedError(normalise)


def inner(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
    """The inner product of two directions, 0-dimensional, in float64."""
    products: list[Any] = [(first[name].double() * second[name].double()).sum() for name in first]
    return torch.stack(products).sum()
