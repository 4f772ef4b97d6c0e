"""Exact maxima of one output in up to three dimensions: the arrangement of the planes on which a row vanishes.

`patterns` lists the cells in floating point.  M, the largest maximum of q and -q over a listed cell, bounds |q| with
the terms below, however close the planes are:

On a plane.  A facet carries the pattern evaluated at its middle.  Between its computed ends a row of another sign is at
most ROW_ROUNDING: the angle at which its plane crosses is known up to that over the sine of the planes' angle.  So
q <= M + rounding on every listed facet, and on dropped pieces q exceeds that by no more than its Lipschitz constant
times their angle. In a listed cell.  The maximum over it lies at its gradient, where M counts it, or on a plane. In a
cell that is not listed.  Every facet lies in dropped pieces or where other rows are below ROW_ROUNDING, hence is
shorter than pi ROW_ROUNDING / sin(least angle of two planes) + dropped; n of them allow no chord longer than delta,
half their sum.  A point of a chord is mu_1 x_1 + mu_2 x_2 for its ends x on planes, with mu_1 + mu_2 at most 1 /
cos(delta / 2), and q is linear along it: q is larger than on planes by that factor, 1 + delta^2 / 8, at most.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from meanfield.certificates.sphere.response import Found, Response, unit
from meanfield.convex import patterns
from meanfield.convex.patterns import Arrangement

# Largest number of distinct planes that are listed, by dimension: time and memory grow as its square and its cube, to
# about 0.2 s on one core.  Beyond, branch and bound gets to a relative gap of 1e-9 sooner.
MAX_PLANES = {2: 3000, 3: 250}
# Largest value of a unit row at a unit vector where `patterns` may have its sign wrong, under 50 units of rounding: 12
# from the angle at which its plane crosses another, 38 from the middle of the facet and from the row's value there.
ROW_ROUNDING = 64 * torch.finfo(torch.float64).eps


def listable(response: Response) -> bool:
    """Whether there is one output and the planes are few enough to be listed."""
    dimension, outputs = response.linear.shape
    return outputs == 1 and len(response.rows) <= MAX_PLANES.get(dimension, -1)


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
    apart = rows - cells.row_side[:, None] * cells.normals[cells.row_normal]  # of rows whose planes count as one
    moved = np.abs(weights[:, 0]) @ np.linalg.norm(apart, axis=1)
    lipschitz = np.linalg.norm(linear) + np.abs(weights).sum()
    upper = (maxima.max() + moved + lipschitz * cells.dropped) / math.cos(0.5 * _unlisted(cells))
    return Found(float(reached[top]), float(upper), points[top], "arrangement", len(cells.cells))


def _unlisted(cells: Arrangement) -> float:
    """delta, at most pi: no chord of a cell that is not listed is longer; 0 in two dimensions, where all are listed."""
    count, dimension = cells.normals.shape
    if dimension == 2:
        return 0.0
    sines = np.linalg.norm(np.cross(cells.normals[:, None], cells.normals), axis=2) + np.eye(count)
    return min(0.5 * count * (math.pi * ROW_ROUNDING / float(sines.min()) + cells.dropped), math.pi)
