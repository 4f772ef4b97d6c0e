"""Polynomials through values at nested Chebyshev points, barycentric (Berrut & Trefethen 2004, section 5)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_PLAIN: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def nodes(degree: int) -> Tensor:
    """cos(pi k / degree), k = 0..degree, float64, from 1 down to -1.

    Those of a degree are every second one of twice the degree, bit for bit, and symmetric; in the middle lies 0.
    """
    # as sines: of an odd argument, so that symmetric nodes are so in their bits, and the middle is no 6e-17
    return torch.tensor([math.sin(math.pi * (degree - 2 * k) / (2 * degree)) for k in range(degree + 1)], **_PLAIN)


def matrix(degree: int, places: Tensor) -> Tensor:
    """(P, degree + 1): values at the nodes -> values of their polynomial at places (P,) of [-1, 1]; float64.

    At a node the row picks its value.
    """
    distances = places.to(**_PLAIN)[:, None] - nodes(degree)
    shares = _weights(degree) / torch.where(distances == 0, 1.0, distances)
    shares = shares / shares.sum(1, keepdim=True)
    met = distances == 0
    return torch.where(met.any(1, keepdim=True), met.to(shares), shares)


def on_grid(values: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Values (n + 1, m + 1, F) at the nodes -> (P, Q, F) at all pairs of places (P,), (Q,)."""
    rows, columns = (matrix(size - 1, places) for size, places in zip(values.shape, (first, second)))
    return torch.einsum("pi,qj,ijf->pqf", rows, columns, values)


def at_points(values: Tensor, points: Tensor) -> Tensor:
    """Values (n + 1, m + 1, F) at the nodes -> (P, F) at points (P, 2)."""
    rows, columns = (matrix(size - 1, places) for size, places in zip(values.shape, points.T))
    return torch.einsum("pi,pj,ijf->pf", rows, columns, values)


def _weights(degree: int) -> Tensor:
    """(-1)^k, halved at both ends: those of these nodes up to a factor, which cancels."""
    weights = torch.ones(degree + 1, **_PLAIN)
    weights[1::2] = -1.0
    weights[0] /= 2
    weights[-1] /= 2
    return weights
