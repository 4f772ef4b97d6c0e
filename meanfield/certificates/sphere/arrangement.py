"""Exact maxima in up to three dimensions: the arrangement of the planes on which a row vanishes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from meanfield.certificates.sphere.response import Found, Response, chunk, unit

# Largest number of distinct planes listed exactly, by dimension: time grows as its square and its cube.
MAX_PLANES = {2: 3000, 3: 250}
# Planes closer than this in angle are left to branch and bound: where they meet is then too uncertain to list pieces.
LEAST_ANGLE = 1e-6
# A gradient this close to the border of its cell counts as inside.
BORDER = 1e-11


def listable(rows: Tensor) -> bool:
    """Whether the planes are few and far enough apart to be listed exactly."""
    count, dimension = rows.shape
    if count > MAX_PLANES.get(dimension, -1):
        return False
    cosines = (rows @ rows.T).abs().fill_diagonal_(0)
    return dimension < 3 or count < 2 or float(cosines.max()) <= 1 - 0.5 * LEAST_ANGLE**2


def maximise_line(response: Response) -> Found:
    ends = response.linear.new_tensor([[1.0], [-1.0]])
    lengths = response(ends).norm(dim=1)
    best = int(lengths.argmax())
    return Found(float(lengths[best]), float(lengths[best]), ends[best], "arrangement", 2)


def maximise_arrangement(response: Response) -> Found:
    """Exact for one output in two dimensions (the cells are arcs) and three (arcs on every plane, then the cells
    beside them).
    """
    rows, dimension = response.rows, response.rows.shape[1]
    if not len(rows):
        return Found(
            float(response.linear.norm()), float(response.linear.norm()), unit(response.linear.T)[0], "arrangement", 1
        )
    planes = torch.eye(2, dtype=rows.dtype, device=rows.device)[None] if dimension == 2 else _plane_bases(rows)
    own = torch.full((1,), -1, device=rows.device) if dimension == 2 else torch.arange(len(rows), device=rows.device)
    lower, upper, argmax, cells = 0.0, 0.0, unit(response.linear.T)[0], 0
    for index in own.clamp_min(0).split(chunk(2 * len(rows) ** 2)):
        values, points = _piece_maxima(response, planes[index], own[index])
        cells += len(values)
        reached = response(points).abs().flatten()
        best = int(reached.argmax())
        upper = max(upper, float(values.max()))
        if float(reached[best]) > lower:
            lower, argmax = float(reached[best]), points[best]
    return Found(lower, upper, argmax, "arrangement", cells)


def _plane_bases(rows: Tensor) -> Tensor:
    """Orthonormal bases of the planes orthogonal to unit rows, (m, 3) -> (m, 2, 3)."""
    axes = torch.eye(3, dtype=rows.dtype, device=rows.device)[rows.abs().argmin(1)]
    first = unit(torch.linalg.cross(rows, axes))
    return torch.stack([first, torch.linalg.cross(rows, first)], 1)


def _piece_maxima(response: Response, planes: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima of |q| over the arcs of circles, and where a cell beside an arc contains its gradient: values (k,),
    points (k, r).

    planes (b, 2, r); own (b,): the row whose plane it is, -1 for none.
    """
    rows, weights = response.rows, response.weights[:, 0]
    cuts = torch.einsum("ber,mr->bme", planes, rows)
    angles = (torch.atan2(cuts[..., 1], cuts[..., 0]) + 0.5 * math.pi).remainder(math.pi).sort(1).values
    starts = torch.cat([angles, angles + math.pi], 1)
    ends = torch.cat([starts[:, 1:], starts[:, :1] + 2 * math.pi], 1)
    middles = _on_circle(planes, 0.5 * (starts + ends))
    counted = weights.repeat(len(planes), 1)
    if int(own[0]) >= 0:
        counted = counted.scatter(1, own[:, None], 0.0)
    gradients = ((middles @ rows.T > 0) * counted[:, None]) @ rows + response.linear[:, 0]
    arcs = [_arc_maxima(sign * gradients, planes, starts, ends) for sign in (1.0, -1.0)]
    found = arcs if int(own[0]) < 0 else [*arcs, _interior_maxima(response, gradients, middles, own)]
    return torch.cat([value for value, _ in found]), torch.cat([point for _, point in found])


def _on_circle(planes: Tensor, angles: Tensor) -> Tensor:
    """(b, 2, r), (b, k) -> unit vectors (b, k, r)."""
    return torch.stack([angles.cos(), angles.sin()], 2) @ planes


def _arc_maxima(gradients: Tensor, planes: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """max of <gradient, z> over every arc, and where: gradients (b, k, r), starts and ends angles (b, k)."""
    flat = gradients @ planes.mT
    top = torch.atan2(flat[..., 1], flat[..., 0])
    middle = 0.5 * (starts + ends)
    offset = (top - middle + math.pi).remainder(2 * math.pi) - math.pi
    half = 0.5 * (ends - starts)
    inside = offset.abs() <= half + BORDER
    # <gradient, z> falls with the angle from its top: of the two ends the nearer one counts
    angle = torch.where(inside, top, middle + torch.where(offset > 0, half, -half))
    points = _on_circle(planes, angle)
    values = torch.where(inside, flat.norm(dim=2), (gradients * points).sum(2))
    return values.flatten(), points.flatten(0, 1)


def _interior_maxima(response: Response, gradients: Tensor, middles: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """|gradient| of the cells on both sides of every arc, where the gradient or its opposite lies in the cell."""
    normals = response.rows[own][:, None]
    beyond = gradients + response.weights[own, 0][:, None, None] * normals
    values, points = [], []
    for sign in (1.0, -1.0):
        for side, gradient in ((1.0, beyond), (-1.0, gradients)):
            tops = unit(sign * gradient)
            kept = side * (tops * normals).sum(2) >= -BORDER
            heights, places = tops[kept] @ response.rows.T, middles[kept] @ response.rows.T
            # the own row vanishes at the middle up to rounding: its side has been looked at
            places = places.scatter(1, own[:, None].expand_as(kept)[kept][:, None], 0.0)
            agree = ((heights * places.sign()) >= -BORDER).all(1)
            values.append(gradient[kept][agree].norm(dim=1))
            points.append(tops[kept][agree])
    return torch.cat(values), torch.cat(points)
