"""Planes through what is known of a landscape: solutions, checkpoints of a training, directions of large curvature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from meanfield.landscape.caution import cautions
from meanfield.landscape.curvature import extremes
from meanfield.landscape.directions import Plane, Point, difference, gaussian, generator_of, inner
from meanfield.landscape.hessian import Hessian
from meanfield.landscape.objective import Objective
from meanfield.signatures import Seed, checked
from meanfield.subject import Network, Parameters, Subject, moved
from meanfield.validation import Misuse, instance

Checkpoint = Network | Mapping[str, Tensor]
COLLINEAR = 1e-6  # sine of the least angle between the sides of a triangle


@checked
def line(first: Network, second: Network, seed: Seed = 0) -> Plane:
    """The plane of the line between two networks and of one filter-normalised random direction.

    The origin lies midway; the first direction leads from one to the other, which stand at (-1/2, 0) and (1/2, 0).
    """
    subject = Subject(first, "first")
    end = _finite(subject.sibling(second, "second"), "second")
    side = difference(end, _finite(subject.parameters, "first"))
    if not float(inner(side, side)) > 0:
        raise Misuse("second", "the same parameters", "must differ from the first network's")
    middle = moved(subject.parameters, side, 0.5)
    halfway = Subject(subject.at(middle))
    across = gaussian(halfway, generator_of(seed))
    marks = {"first": (-0.5, 0.0), "second": (0.5, 0.0)}
    return Plane(halfway.parameters, side, across, "line", "filter", marks, cautions(subject.network))


@checked
def triangle(first: Network, second: Network, third: Network) -> Plane:
    """The plane of three networks, as it is: directions are orthogonal, as long as the side from the first to the
    second, and the origin is the mean of the three.
    """
    subject = Subject(first, "first")
    corners = [subject.parameters, subject.sibling(second, "second"), subject.sibling(third, "third")]
    corners = [_finite(*each) for each in zip(corners, ("first", "second", "third"))]
    side, other = (difference(corner, corners[0]) for corner in corners[1:])
    length, across = inner(side, side), inner(other, side)
    height = moved(other, side, -float(across / length.clamp_min(torch.finfo(torch.float64).tiny)))
    rise = inner(height, height)
    if not float(rise) > COLLINEAR**2 * float(inner(other, other)):
        raise Misuse("third", "a network on the line of the others", "must lie off it, so that three span a plane")
    ratio = float((length / rise).sqrt())
    upward = {name: ratio * tensor for name, tensor in height.items()}
    middle = {name: torch.stack([corner[name] for corner in corners]).mean(0) for name in side}
    found = Plane(middle, side, upward, "triangle", warnings=cautions(subject.network, scaled=False))
    return _marked(found, dict(zip(("first", "second", "third"), corners)))


@checked
def principal(checkpoints: Sequence[Any], network: Network | None = None) -> Plane:
    """The plane of the two principal components of theta_t - theta_T (Li et al. 2018, section 7), uncentred.

    checkpoints: networks, or state dicts of `network`, in their order; the last one, theta_T, is the origin.  Both
    directions have the length of the largest distance along either, so that the path stays in [-1, 1]^2.
    Through the Gram matrix of the differences: the number of parameters enters linearly.
    """
    subject, points = parameters_of(checkpoints, network)
    offsets = [difference(point, points[-1]) for point in points[:-1]]
    values, vectors = torch.linalg.eigh(gram(offsets))
    if len(offsets) < 2 or not float(values[-2]) > 1e-24 * float(values[-1]):
        raise Misuse("checkpoints", len(points), "lie on a line or at a point: give at least three that span a plane")
    # unit components sum_t v_t / sqrt(value) offset_t; coordinates of the path along them are sqrt(value) v_t
    units = [vectors[:, index] / values[index].sqrt() for index in (-1, -2)]
    reach = float((values[-2:].sqrt() * vectors[:, -2:]).abs().max())
    first, second = (_combined(offsets, reach * unit) for unit in units)
    found = Plane(points[-1], first, second, "pca", warnings=cautions(subject.network, scaled=False))
    return _marked(found, {"start": points[0], "end": points[-1]})


@checked
def eigenplane(
    network: Network, images: Any, targets: Any = None, *, loss: Callable[..., Tensor] | None = None, seed: Seed = 0
) -> Plane:
    """The plane of the two largest eigenvalues of the Hessian of the mean loss, at a network, which is its origin.

    images, targets, loss: as for `Objective`.  seed: of the start of Lanczos.
    The directions are unit eigenvectors, not normalised again: a is a distance, and the surface bends by the
    eigenvalues, which the marks name.  Of a ReLU network the Hessian is that of the smooth piece at hand.
    """
    objective = Objective(Subject(network), images, targets, loss)
    subject = objective.subject
    hessian = Hessian(objective, subject.parameters)
    if hessian.size < 2:
        raise Misuse("network", type(network).__name__, "has one parameter, and so no plane")
    found = extremes(hessian, generator_of(seed), largest=2, smallest=0)
    first, second = (hessian.named(pair.vector) for pair in found.largest)
    values = " and ".join(f"{pair.value.value:.3g}" for pair in found.largest)
    warnings = cautions(subject.network, scaled=False)
    if found.status != "converged":
        residuals = " and ".join(f"{pair.residual:.1e}" for pair in found.largest)
        warnings += (f"the eigenvectors are not converged: eigenvalues {values}, residuals {residuals}",)
    marks = {f"network, eigenvalues {values}": (0.0, 0.0)}
    return Plane(subject.parameters, first, second, "eigen", marks=marks, warnings=warnings)


def parameters_of(checkpoints: Sequence[Any], network: Network | None = None) -> tuple[Subject, list[Parameters]]:
    """The network that the checkpoints are of, the last one, and the parameters of each."""
    entries = list(instance(checkpoints, "checkpoints", Sequence))
    if not entries:
        raise Misuse("checkpoints", checkpoints, "must be networks, or state dicts together with their network")
    if network is None and any(isinstance(each, Mapping) for each in entries):
        raise Misuse("checkpoints", "state dicts", "do not say which network they are of; give network=")
    subject = Subject(entries[-1] if network is None else network, "checkpoints" if network is None else "network")
    names = [f"checkpoints[{index}]" for index in range(len(entries))]
    return subject, [_finite(_parameters(subject, each, name), name) for each, name in zip(entries, names)]


def _finite(parameters: Parameters, argument: str) -> Parameters:
    """The same; Misuse where they are of a training that ran away."""
    for name, tensor in parameters.items():
        if not bool(tensor.isfinite().all()):
            raise Misuse(argument, name, "has entries that are infinite or nan, and so no place in a plane")
    return parameters


def _parameters(subject: Subject, checkpoint: Any, argument: str) -> Parameters:
    if not isinstance(checkpoint, Mapping):
        return subject.sibling(checkpoint, argument)
    found = {}
    for name, own in subject.parameters.items():
        if name not in checkpoint or checkpoint[name].shape != own.shape:
            came = tuple(checkpoint[name].shape) if name in checkpoint else "missing"
            raise Misuse(f"{argument}[{name!r}]", came, f"must have the shape {tuple(own.shape)} of the network")
        found[name] = checkpoint[name].detach().to(own)
    return found


def gram(directions: Sequence[Parameters]) -> Tensor:
    """Inner products of directions, (n, n), in float64, tensor by tensor."""
    found = torch.zeros(len(directions), len(directions), dtype=torch.float64)
    for name in directions[0] if directions else ():
        rows = torch.stack([each[name].flatten() for each in directions]).double()
        found += (rows @ rows.T).to(found)
    return found


def _combined(directions: Sequence[Parameters], factors: Tensor) -> Parameters:
    """sum_t factors_t directions_t."""
    stacked = {name: torch.stack([each[name] for each in directions]) for name in directions[0]}
    return {
        name: torch.tensordot(factors.to(rows.double()), rows.double(), 1).to(rows) for name, rows in stacked.items()
    }


def _marked(plane: Plane, places: Mapping[str, Parameters]) -> Plane:
    marks: dict[str, Point] = {name: plane.coordinates(parameters)[0] for name, parameters in places.items()}
    return Plane(plane.origin, plane.first, plane.second, plane.kind, plane.normalise, marks, plane.warnings)
