"""The response of a kernel in the smallest equal problem: no two rows parallel, in coordinates of their row space; its
lower bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows closer than this in direction are one row; what this moves q by enters the bound.
SAME_DIRECTION = 1e-12
# Entries of one temporary tensor: small enough for a cache, large enough to keep calls few.
CHUNK = 1 << 19
# Squares of what is much smaller vanish: up to here nothing is told from 0, in the units of A, of W and of the answer.
VANISHING = 1e-150
ASCENT_STEPS = 120
STARTS = 512


@dataclass(frozen=True, eq=False)
class Response:
    """q(z) = linear^T z + weights^T relu(rows z) in coordinates of the row space, no two rows parallel.

    rows (m, r) unit vectors, weights (m, C), linear (r, C), basis (d, r) orthonormal; |q| is known up to `rounding`.
    """

    rows: Tensor
    weights: Tensor
    linear: Tensor
    basis: Tensor
    rounding: float

    def __call__(self, directions: Tensor) -> Tensor:
        """q, (b, r) -> (b, C)."""
        return torch.cat([self._value(part) for part in directions.split(chunk(len(self.rows)))])

    def _value(self, directions: Tensor) -> Tensor:
        return (directions @ self.rows.T).clamp_min_(0) @ self.weights + directions @ self.linear

    def gradient(self, directions: Tensor, outputs: Tensor) -> Tensor:
        """A subgradient of <outputs, q> at every direction, (b, r), (b, C) -> (b, r)."""
        size = chunk(len(self.rows))
        return torch.cat([self._gradient(*part) for part in zip(directions.split(size), outputs.split(size))])

    def _gradient(self, directions: Tensor, outputs: Tensor) -> Tensor:
        return ((directions @ self.rows.T > 0) * (outputs @ self.weights.T)) @ self.rows + outputs @ self.linear.T


@dataclass(frozen=True, eq=False)
class Found:
    """What a method found, in the coordinates of a `Response` and without its rounding."""

    lower: float
    upper: float
    argmax: Tensor
    method: str
    cells: int


def chunk(entries: int) -> int:
    return max(1, CHUNK // max(1, entries))


def reduced(A: Tensor, W: Tensor, basis: Tensor | None = None) -> Response:
    """Drop rows that do not count, go to the row space, merge parallel rows; what that moves q by enters `rounding`.

    basis (d, r): orthonormal coordinates to take in place of those of the row space.
    """
    sizes = A.norm(dim=1) * W.norm(dim=1)
    vanished = _vanished(A, W)
    A, W, sizes = A[sizes > 0], W[sizes > 0], sizes[sizes > 0]
    if basis is None:
        basis = _row_space(A / A.norm(dim=1, keepdim=True) * sizes[:, None])
    rows = A @ basis
    dropped = float(((A - rows @ basis.T).norm(dim=1) * W.norm(dim=1)).sum())
    lengths = rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
    rows, weights = rows / lengths, W * lengths
    rows, weights, linear, moved = _merge_parallel(rows, weights)
    terms = len(A) + 8 * basis.shape[1] ** 2 + 64  # roundings on the longest path from the data to a bound
    rounding = 8 * terms * torch.finfo(A.dtype).eps * float(sizes.sum()) * math.sqrt(W.shape[1])
    return Response(rows, weights, linear, basis, rounding + 2 * (dropped + moved) + vanished)


def _vanished(A: Tensor, W: Tensor) -> float:
    """More than q loses where squares of lengths vanish."""
    alive = (A != 0).any(1) & (W != 0).any(1)
    return VANISHING * float((1 + A.abs().amax(1) + W.abs().amax(1))[alive].sum())


def _row_space(M: Tensor) -> Tensor:
    """Orthonormal basis (d, r) of the row space, in the order of falling variance."""
    if not len(M):
        return M.new_zeros(M.shape[1], 0)
    _, values, vectors = torch.linalg.svd(M, full_matrices=False)
    keep = values > 4 * max(M.shape) * torch.finfo(M.dtype).eps * values[:1]
    return vectors[keep].T.contiguous()


def _merge_parallel(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Rows, weights, linear part and the error of one row for all rows on one line: relu(-x) = relu(x) - x."""
    if not len(rows):
        return rows, weights, weights.new_zeros(rows.shape[1], weights.shape[1]), 0.0
    leading = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    sides = torch.where(leading > 0, 1.0, -1.0).to(rows)
    lines = rows * sides
    _, group = torch.unique((lines / SAME_DIRECTION).round(), dim=0, return_inverse=True)
    count = int(group.max()) + 1
    first = torch.full((count,), len(rows), device=rows.device).scatter_reduce(
        0, group, torch.arange(len(rows), device=rows.device), "amin"
    )
    merged = weights.new_zeros(count, weights.shape[1]).index_add(0, group, weights)
    linear = -(lines[(sides < 0).flatten()].T @ weights[(sides < 0).flatten()])
    moved = float(((lines - lines[first][group]).norm(dim=1) * weights.norm(dim=1)).sum())
    return lines[first], merged, linear, moved


def unit(vectors: Tensor) -> Tensor:
    """Unit vectors along the last axis; zero vectors become the first axis."""
    sizes = vectors.abs().amax(-1, keepdim=True)
    vectors = vectors / sizes.where(sizes > 0, 1.0)  # squares of entries of 1e-170 would vanish
    lengths = vectors.norm(dim=-1, keepdim=True)
    first = torch.zeros_like(vectors)
    first[..., 0] = 1.0
    return torch.where(lengths > 0, vectors / lengths, first)


def start_directions(response: Response, starts: Tensor) -> Tensor:
    """Given ones, the axes, the rows and random ones, (k, r)."""
    rows, dimension = response.rows, response.rows.shape[1]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(STARTS, dimension, generator=generator, dtype=rows.dtype).to(rows.device)
    heaviest = rows[response.weights.norm(dim=1).topk(min(len(rows), 64)).indices]
    eye = torch.eye(dimension, dtype=rows.dtype, device=rows.device)
    return unit(torch.cat([starts, eye, -eye, heaviest, -heaviest, drawn]))


def uphill(response: Response, directions: Tensor, values: Tensor, step: float) -> Tensor:
    """Directions (b, r), at which q is `values` (b, C), moved along the gradient of |q|."""
    return unit(directions + step * unit(response.gradient(directions, unit(values))))


def ascend(response: Response, directions: Tensor) -> tuple[float, Tensor]:
    """The largest |q| that is met from many directions: normalised gradients first, then steps that shrink."""
    best, where = -1.0, directions[0]
    for step in range(ASCENT_STEPS):
        values = response(directions)
        lengths = values.norm(dim=1)
        top = int(lengths.argmax())
        if float(lengths[top]) > best:
            best, where = float(lengths[top]), directions[top]
        if step == 20:
            directions = directions[lengths.topk(min(len(directions), 64)).indices]
            values = response(directions)
        directions = uphill(response, directions, values, 0.8 ** max(0, step - 20))
    return best, where


def improve(response: Response, candidates: Tensor) -> tuple[float, Tensor]:
    """The best of some candidate directions (b, r)."""
    values = response(candidates).norm(dim=1)
    best = int(values.argmax())
    return float(values[best]), candidates[best]
