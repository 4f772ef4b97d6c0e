"""Maxima of ReLU responses over the unit sphere of kernels: exact for up to three entries, bounded for more.

For patches a_i (rows of A) and weights w_i (rows of W) the response of a kernel z is q(z) = sum_i w_i relu(a_i z); its
largest length over |z| = 1 says whether any ReLU feature, tried or not, could improve a network.  q is positively
homogeneous and piecewise linear, a difference of convex functions.  Both methods return an upper bound that no kernel
exceeds, rounding included, and a kernel that attains the lower one.

arrangement: the planes a_i z = 0 cut the sphere into cells on which q is linear, so a maximum lies inside a cell, at
its normalised gradient, or on a plane, where the same holds one dimension lower (Edelsbrunner, Algorithms in
Combinatorial Geometry, 1987, ch. 7).
branch and bound: cones over boxes on the facets of the cube cover all directions.  On a cone a row of one sign is
linear, a row of both signs lies under its chord where it counts positively and over any of its supporting planes where
it counts negatively (McCormick, Math. Program. 10, 1976); the linear function that results is maximised exactly over
the unit vectors of the cone, by projection on it.  Where positive and negative rows nearly cancel, as for the residuals
of a trained network, they are bounded in pairs by how far apart they are.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meanfield.certificates.sphere.arrangement import listable, maximise_arrangement, maximise_line
from meanfield.certificates.sphere.branching import maximise_branching
from meanfield.certificates.sphere.response import Found, Response, reduced
from meanfield.signatures import Nonnegative, Positive, checked
from meanfield.validation import finite, shaped


@dataclass(frozen=True, eq=False)
class SphereMaximum:
    """lower <= max_{|z| = 1} |q(z)| <= upper, attained at the unit vector argmax (d,) from below.

    upper holds with rounding; cells: linear pieces (arrangement) or cones (branch and bound) that were looked at.
    """

    lower: float
    upper: float
    argmax: Tensor
    method: str
    cells: int
    seconds: float


@checked
def maximise(
    A: Tensor, W: Tensor, *, max_seconds: Positive = 10.0, tolerance: Nonnegative = 1e-9, start: Tensor | None = None
) -> SphereMaximum:
    """Bounds of max_{|z| = 1} |W^T relu(A z)| for patches A (n, d) and weights W (n, C), in float64.

    One output and up to three dimensions (of the row space of A) are solved exactly.  Beyond MAX_PLANES, and where
    nearly equal planes leave more open than `tolerance`, it is branch and bound as for anything else: until upper <=
    (1 + tolerance) lower up to rounding or `max_seconds` have passed (looked at between batches; the set-up is not
    interrupted).  The bounds hold at any time.
    start (k, d) or (d,): directions to try first.  The answer is in the units of W times those of A.
    Raises TypeError for what is no tensor, ValueError for shapes that do not fit and entries that are not finite.
    """
    began = time.perf_counter()
    A, W, starts = _checked(A, W, start)
    deadline = began + max_seconds
    response = reduced(A.detach().double(), W.detach().double())
    dimension = response.linear.shape[0]
    found = _found(response, starts @ response.basis, deadline, tolerance)
    argmax = (
        response.basis @ found.argmax
        if dimension
        else torch.eye(1, A.shape[1], dtype=torch.float64, device=A.device)[0]
    )
    upper = max(found.upper, found.lower) + response.rounding
    return SphereMaximum(found.lower, upper, argmax, found.method, found.cells, time.perf_counter() - began)


def _found(response: Response, starts: Tensor, deadline: float, tolerance: float) -> Found:
    """By the arrangement where that is listed, by branch and bound where it is not or does not meet the tolerance."""
    dimension = response.linear.shape[0]
    if dimension == 0:
        return Found(0.0, 0.0, response.linear.new_zeros(0), "arrangement", 0)
    if dimension == 1:
        return maximise_line(response)
    if not listable(response):
        return maximise_branching(response, starts, deadline, tolerance)
    listed = maximise_arrangement(response)
    if listed.upper <= (1 + tolerance) * listed.lower + response.rounding:
        return listed
    found = maximise_branching(response, torch.cat([listed.argmax[None], starts]), deadline, tolerance)
    return replace(found, upper=min(found.upper, listed.upper))


def _checked(A: Tensor, W: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    for tensor, name, shape in ((A, "A", "(n, d)"), (W, "W", "(n, C)")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor of shape {shape}, not {type(tensor).__name__}")
        if tensor.ndim != 2 or tensor.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape} with at least one column")
        finite(tensor, name)
    shaped(W, (A.shape[0], W.shape[1]), "W")
    if start is None:
        return A, W, A.new_zeros(0, A.shape[1], dtype=torch.float64)
    starts = start[None] if isinstance(start, Tensor) and start.ndim == 1 else start
    count = starts.shape[0] if isinstance(starts, Tensor) and starts.ndim == 2 else 1
    return A, W, finite(shaped(starts, (count, A.shape[1]), "start"), "start").to(A.device, torch.float64)
