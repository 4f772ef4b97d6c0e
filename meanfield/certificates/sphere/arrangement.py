"""Exact maxima of one output in up to three dimensions: the arrangement of the planes on which a row vanishes.

`patterns` lists the cells in floating point.  Let M be the largest maximum of q or -q over a listed cell.  Then M, with
the terms below, bounds |q| everywhere, however close planes are:

On a plane.  A facet carries the pattern evaluated at its middle.  Where a row has another sign somewhere between the
facet's computed ends, it is at most ROW_ROUNDING there: the angle at which its plane crosses was computed with an error
of that over the sine of the angle between both planes.  So q <= M up to rounding on every listed facet, and on the
pieces that were dropped q rises above that by at most its Lipschitz constant times their angle.
In a listed cell q is at most its maximum over the cell, or on the cell's boundary it is larger than in the cell.
In a cell that is not listed every facet lies in dropped pieces or where another row is below ROW_ROUNDING: each is
shorter than pi ROW_ROUNDING / sin(least angle) + dropped, and a chord through any z at most delta, half of the sum.
With its ends on planes z = mu_1 x_1 + mu_2 x_2, mu_1 + mu_2 <= 1 / cos(delta / 2), where q is linear: q exceeds what
it is on planes by no more than that factor, 1 + delta^2 / 8.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from meanfield.certificates.sphere.response import Found, Response, unit
from meanfield.convex import patterns
from meanfield.convex.patterns import Arrangement

# Largest number of distinct planes that are listed, by dimension: time and memory grow as its square and its cube, to
# 0.2 and 0.3 s on one core.  Beyond, branch and bound takes less time for a relative gap of 1e-9.
MAX_PLANES = {2: 3000, 3: 250}
# What a unit row at a unit vector of a plane, as `patterns` computes it, can be wrong by: under 50 units of rounding,
# 12 from the angle of a crossing, 38 from the middle and the row's value there.
ROW_ROUNDING = 64 * torch.finfo(torch.float64).eps


def maximise_line(response: Response) -> Found:
    """Exact in one dimension, for any number of outputs."""
    ends = response.linear.new_tensor([[1.0], [-1.0]])
    lengths = response(ends).norm(dim=1)
    best = int(lengths.argmax())
    return Found(float(lengths[best]), float(lengths[best]), ends[best], "arrangement", 2)


def maximise_arrangement(response: Response) -> Found:
    """The maximum of one output in two or three dimensions, exact up to what nearly equal planes leave open."""
    rows, weights, linear = (t.numpy(force=True) for t in (response.rows, response.weights, response.linear[:, 0]))
    cells = patterns.arrangement(response.rows)
    turned = np.zeros_like(cells.normals)
    np.add.at(turned, cells.row_normal, cells.row_side[:, None] * weights * rows)
    # rows against their normal are active where it is not
    gradients = cells.active_sums(turned) + (weights * rows)[cells.row_side < 0].sum(0) + linear
    maxima = cells.maxima(gradients)
    side, best = np.unravel_index(maxima.argmax(), maxima.shape)
    directions = cells.candidates(int(best), (1 - 2 * int(side)) * gradients[best])
    points = unit(torch.as_tensor(directions).to(response.rows))
    reached = response(points)[:, 0].abs()
    top = int(reached.argmax())
    moved = np.abs(weights[:, 0]) @ np.linalg.norm(rows - cells.row_side[:, None] * cells.normals[cells.row_normal], axis=1)
    lipschitz = np.linalg.norm(linear) + np.abs(weights).sum()
    upper = (maxima.max() + moved + lipschitz * cells.dropped) / math.cos(0.5 * _unlisted(cells))
    return Found(float(reached[top]), float(upper), points[top], "arrangement", len(cells.cells))


def _unlisted(cells: Arrangement) -> float:
    """delta: no chord of a cell that is not listed is longer, at most pi; 0 in two dimensions, where none is missing."""
    count, dimension = cells.normals.shape
    if dimension == 2:
        return 0.0
    cosine = np.abs(cells.normals @ cells.normals.T - np.eye(count)).max()
    sine = math.sqrt(max(1 - cosine**2 - ROW_ROUNDING, 0.0))  # too small rather than too large
    return min(0.5 * count * (math.pi * ROW_ROUNDING / max(sine, ROW_ROUNDING) + cells.dropped), math.pi)
