"""Directions in the space of parameters, and the planes that they span.

Filter normalisation: Li, Xu, Taylor, Studer & Goldstein 2018, section 4.  Its point is that rescaling a layer and its
reader, which leaves the function of a network with positively homogeneous activations as it is, leaves the surface as
it is too.  It does so for one factor per layer; for one per channel only after `balanced`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn

from meanfield.landscape.balance import balanced
from meanfield.landscape.caution import cautions
from meanfield.network import along_axis
from meanfield.signatures import Seed, checked
from meanfield.starts import normal, salted
from meanfield.subject import Network, Parameters, Subject
from meanfield.validation import Misuse, choice, one_of

NORMALISATIONS = ("filter", "layer", "element", "none")
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # their weights have sources first
SINGULAR = 1e-12  # of the squared size of the larger direction: below it two of them span a line
Point = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Plane:
    """origin + a first + b second at the coordinates (a, b).

    origin, first, second: parameters by name, as a state dict has them.
    kind: "random", "eigen", "pca", "line" or "triangle".  normalise: of random directions.
    marks: what lies where, name -> (a, b).
    warnings: what to know before a picture is believed: what does not move, and where scale invariance does not hold.
    """

    origin: Parameters
    first: Parameters
    second: Parameters
    kind: str = "random"
    normalise: str = "none"
    marks: Mapping[str, Point] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Plane(kind={self.kind!r}, normalise={self.normalise!r}, {len(self.origin)} tensors)"

    def at(self, a: float | Tensor, b: float | Tensor) -> Parameters:
        """The parameters at one point."""
        return {name: start + a * self.first[name] + b * self.second[name] for name, start in self.origin.items()}

    def coordinates(self, parameters: Mapping[str, Tensor]) -> tuple[Point, float]:
        """The point of the plane that is nearest, in the units of its directions, and the distance from it.

        Least squares: the directions need be neither orthogonal nor of unit length.
        """
        offset = difference(parameters, self.origin)
        gram = torch.stack([torch.stack([inner(d, e) for e in self._directions]) for d in self._directions])
        sizes = gram.diagonal()
        if not float(gram.det()) > SINGULAR * float(sizes.prod()):
            raise Misuse("plane", self.kind, "has directions that span no plane, and so no coordinates")
        found = torch.linalg.solve(gram, torch.stack([inner(d, offset) for d in self._directions]))
        a, b = found.tolist()
        rest = {name: offset[name] - a * self.first[name] - b * self.second[name] for name in offset}
        return (a, b), float(inner(rest, rest).sqrt())

    @property
    def _directions(self) -> tuple[Parameters, Parameters]:
        return self.first, self.second


@checked
def plane(
    network: Network,
    seed: Seed = 0,
    normalise: Annotated[str, choice(NORMALISATIONS)] = "filter",
    *,
    biases: bool = False,
    balance: bool = False,
) -> Plane:
    """The plane of two Gaussian directions at a network, which is its origin.

    normalise: "filter", every filter of a direction as long as the network's own: rows of a linear layer, output
        channels of a convolution, of a ParticleNetwork a particle's kernels and the readout's rows.  "layer": every
        tensor as a whole.  "element": entries times |w|.  "none": standard normals.
    biases: let parameters of one dimension move as well, which otherwise have direction zero.  They are normalised as
        whole vectors: a bias on its own would be a filter of one entry, and move by itself or its negative; and with
        its filter it would break the invariance, since a rescaled layer below changes the one and not the other.
    balance: first rescale channels as `balanced` does, so that the plane, and the surface, no longer depend on how a
        network of homogeneous activations spreads its scale over channels.
    A filter of zeros has direction zero; `Plane.warnings` names it, and what else a picture hides.
    """
    subject = Subject(balanced(network) if balance else network)
    generator = generator_of(seed)
    first, second = (gaussian(subject, generator, normalise, biases=biases) for _ in range(2))
    warnings = cautions(subject.network, scaled=normalise != "none") + _unmoved(subject, first, normalise, biases)
    return Plane(subject.parameters, first, second, "random", normalise, {"network": (0.0, 0.0)}, warnings)


def gaussian(
    subject: Subject, generator: torch.Generator, normalise: str = "filter", *, biases: bool = False
) -> Parameters:
    """A direction of independent standard normals, normalised; see `plane`."""
    one_of(normalise, "normalise", NORMALISATIONS)
    found = {}
    for name, weight in subject.parameters.items():
        drawn, moves = normal(weight.shape, generator, weight), weight.ndim > 1 or biases
        found[name] = _normalised(drawn, weight, normalise, _axis(subject, name)) if moves else torch.zeros_like(drawn)
    return found


def generator_of(seed: int) -> torch.Generator:
    """Of the random numbers of directions, which no start has."""
    return salted(f"directions {seed}")


def _axis(subject: Subject, name: str) -> int:
    """Along which the filters of a weight are counted."""
    if not isinstance(subject.network, nn.Module):
        return 0
    return int(isinstance(subject.network.get_submodule(name.rpartition(".")[0]), TRANSPOSED))


def _normalised(direction: Tensor, weight: Tensor, normalise: str, axis: int) -> Tensor:
    if normalise == "none":
        return direction
    if normalise == "element":
        return direction * weight.abs()
    if normalise == "filter" and weight.ndim > 1:
        return direction * along_axis(_filter_norms(weight, axis) / _filter_norms(direction, axis), direction, axis)
    return direction * (weight.norm() / direction.norm())


def _filter_norms(tensor: Tensor, axis: int) -> Tensor:
    return tensor.movedim(axis, 0).flatten(1).norm(dim=1)


def _unmoved(subject: Subject, direction: Parameters, normalise: str, biases: bool) -> tuple[str, ...]:
    """Sentences about parameters whose direction is zero."""
    found = []
    for name, weight in subject.parameters.items():
        if weight.ndim < 2 or normalise == "none":
            continue
        axis = _axis(subject, name)
        dead = (_filter_norms(direction[name], axis) == 0).nonzero().flatten().tolist()
        if dead:
            count = weight.shape[axis]
            found.append(f"dead filters in {name}, {len(dead)} of {count} ({_short(dead)}): they do not move")
    still = [name for name, weight in subject.parameters.items() if weight.ndim < 2]
    if still and not biases:
        found.append(f"parameters of one dimension do not move: {', '.join(still)} (biases=True moves them)")
    return tuple(found)


def _short(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")


def inner(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
    """The inner product of two directions, 0-dimensional, in float64."""
    return torch.stack([torch.sum(first[name].double() * second[name].double()) for name in first]).sum()


def difference(end: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Parameters:
    """end - start."""
    return {name: end[name] - tensor for name, tensor in start.items()}
