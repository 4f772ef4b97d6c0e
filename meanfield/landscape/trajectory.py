"""The path of a training seen in a plane: what the plane shows of it, what chance would show, and what it misses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import aslinearoperator, eigsh
from torch import Tensor, nn

from meanfield.landscape.directions import Plane, difference, inner
from meanfield.landscape.objective import Objective, data_sets, scores
from meanfield.landscape.planes import parameters_of, principal
from meanfield.rates import LEVEL, Interval
from meanfield.signatures import Count, Seed, checked
from meanfield.subject import Network, Parameters, Subject

DENSE = 200  # steps up to which all eigenvalues are found and not two of them


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Checkpoints seen in a plane whose origin is the last of them.

    coordinates: (T, 2), the nearest points of the plane in the units of its directions, as a surface has them.
    residuals: (T,), distances from the plane.  distances: (T,), from the last checkpoint.
    explained: the share of the sum of squared distances that lies in the plane.
    null: the same share of random walks with the same step lengths, each in the plane of its own principal components
        (mean and 95% of draws); None for a plane that was not fitted to the path.
    figures: with images, of the checkpoints, name -> (T,): "train loss", "train accuracy", "held out loss", ...
    plane_figures: of the points of the plane in their place.  Where these differ the picture shows another path.
    warnings: what the plane leaves out.
    """

    plane: Plane
    coordinates: Tensor
    residuals: Tensor
    distances: Tensor
    explained: float
    null: Interval | None
    figures: Mapping[str, Tensor]
    plane_figures: Mapping[str, Tensor]
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        beside = "" if self.null is None else f", random walks {self.null}"
        return f"Trajectory({len(self.coordinates)} checkpoints, explained={self.explained:.3g}{beside})"


@checked
@torch.no_grad()
def trajectory(
    checkpoints: Sequence[Any],
    images: Any = None,
    targets: Any = None,
    *,
    loss: Callable[..., Tensor] | None = None,
    held_out: Any = None,
    plane: Plane | None = None,
    network: Network | None = None,
    draws: Count = 100,
    seed: Seed = 0,
) -> Trajectory:
    """Where the checkpoints of a training lie in a plane.

    checkpoints: networks, or state dicts of `network`, in their order; the last one is the origin.
    images, targets, held_out, loss: as for `join`; without images there are no figures.
    plane: default `principal`, that of the two principal components of theta_t - theta_T, not centred (Li et al. 2018,
        section 7): it passes through the last checkpoint, from which distances are taken.
    draws: random walks for the null.

    Parameters move, buffers do not: running statistics of batch norm, or masses of particles, are those of the last
    checkpoint, or of `network` where it is given, throughout.  `warnings` says where they differ.
    """
    subject, points = parameters_of(checkpoints, network)
    found = principal(checkpoints, network) if plane is None else plane
    seen = [found.coordinates(point) for point in points]
    coordinates = torch.tensor([spot for spot, _ in seen], dtype=torch.float64)
    distances = _distances(points, points[-1])
    figures, plane_figures = {}, {}
    if images is not None:
        data = data_sets(images, targets, held_out)
        objectives = {name: Objective(subject, each, loss=loss) for name, each in data.items()}
        figures = _columns([scores(objectives, point) for point in points])
        plane_figures = _columns([scores(objectives, found.at(a, b)) for (a, b), _ in seen])
    return Trajectory(
        found,
        coordinates,
        torch.tensor([residual for _, residual in seen], dtype=torch.float64),
        distances,
        _share(found, coordinates - coordinates[-1], distances),
        _null(points, draws, seed) if plane is None else None,
        figures,
        plane_figures,
        (*found.warnings, *_warnings(subject, checkpoints)),
    )


def walks(lengths: Tensor, dimension: int, draws: int, seed: int = 0) -> Tensor:
    """Shares (draws,) of the sum of squared distances from the end of a random walk that two components explain.

    lengths: (n,), of its steps, in independent uniform directions of so many dimensions.  Without drawing vectors: the
    Gram matrix of n standard normal ones is that of a triangle, which has square roots of chi-squares with
    dimension, dimension - 1, ... degrees of freedom on its diagonal and standard normals below (Bartlett 1933).
    In many dimensions, for n equal steps, the share is that of 1 / sin^2((2k - 1) pi / (4n + 2)), k = 1, 2, in the sum
    of these over k = 1, ..., n: 8 / pi^2 (1 + 1/9) = 0.90 for large n.  About the mean in place of the end it would be
    6 / pi^2 (1 + 1/4) = 0.76 (Antognini & Sohl-Dickstein 2018).
    """
    generator = np.random.default_rng(seed)
    return torch.tensor([_walk(lengths, dimension, generator) for _ in range(draws)], dtype=torch.float64)


def _walk(lengths: Tensor, dimension: int, generator: np.random.Generator) -> float:
    count = len(lengths)
    rows = generator.standard_normal((count, min(count, dimension)))
    if dimension >= count:
        rows = np.tril(rows)
        np.fill_diagonal(rows, np.sqrt(generator.chisquare(dimension - np.arange(count))))
    steps = lengths.numpy()[:, None] * rows / np.linalg.norm(rows, axis=1, keepdims=True)
    offsets = steps[::-1].cumsum(0)  # from the end, backwards
    return float(_largest_two(offsets) / np.square(offsets).sum())


def _largest_two(matrix: np.ndarray) -> float:
    """The sum of the two largest squared singular values."""
    if min(matrix.shape) <= DENSE:
        return float(np.square(np.linalg.svd(matrix, compute_uv=False)[:2]).sum())
    factor: Any = aslinearoperator(matrix)
    start = np.ones(matrix.shape[1])  # the default is drawn anew each time
    found: Any = eigsh(factor.T @ factor, k=2, v0=start, return_eigenvectors=False)
    return float(found.sum())


def _null(points: Sequence[Parameters], draws: int, seed: int) -> Interval:
    lengths = torch.cat([_distances([here], there) for here, there in itertools.pairwise(points)])
    shares = walks(lengths, sum(tensor.numel() for tensor in points[0].values()), draws, seed)
    low, high = np.quantile(shares.numpy(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(shares.mean()), float(low), float(high))


def _distances(points: Sequence[Parameters], end: Parameters) -> Tensor:
    offsets = (difference(point, end) for point in points)
    return torch.stack([inner(offset, offset).sqrt().cpu() for offset in offsets])


def _share(plane: Plane, coordinates: Tensor, distances: Tensor) -> float:
    """Of the sum of squared distances that lies along the directions."""
    first, second = plane.first, plane.second
    a, b = coordinates.T
    inside = a.square() * float(inner(first, first)) + b.square() * float(inner(second, second))
    inside = inside + 2 * a * b * float(inner(first, second))
    return float(inside.sum() / distances.square().sum())


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}


def _warnings(subject: Subject, checkpoints: Sequence[Any]) -> tuple[str, ...]:
    """That buffers move, which a plane of parameters does not see."""
    moving = {}
    for checkpoint in checkpoints:
        if isinstance(checkpoint, Mapping):
            buffers = checkpoint
        elif isinstance(checkpoint, nn.Module):
            buffers = dict(checkpoint.named_buffers())
        else:
            buffers = Subject(checkpoint).buffers
        for name, own in subject.buffers.items():
            if own.is_floating_point() and name in buffers and not torch.equal(buffers[name].to(own), own):
                moving[name] = None
    if not moving:
        return ()
    return (f"not seen by the plane, and held at one value: {', '.join(moving)}",)
