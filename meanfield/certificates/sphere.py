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

import math
import time
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from meanfield.validation import finite, nonnegative, positive, shaped

# Largest number of distinct planes listed exactly, by dimension: time grows as its square and its cube.
MAX_PLANES = {2: 3000, 3: 250}
# Rows closer than this in direction are one row; what this moves q by enters the bound.
SAME_DIRECTION = 1e-12
# Planes closer than this in angle are left to branch and bound: where they meet is then too uncertain to list pieces.
LEAST_ANGLE = 1e-6
# A gradient this close to the border of its cell counts as inside.
BORDER = 1e-11
# Entries of one temporary tensor: small enough for a cache, large enough to keep calls few.
CHUNK = 1 << 19
MAX_BATCH = 4096
BATCH_ENTRIES = 1 << 22  # of all rows over all cells of a batch: the time limit is looked at in between
# Cells kept open: beyond, the search stops with what it has proven (16 d + 32 bytes each, 350 MB for d = 9).
MAX_OPEN = 2_000_000
# Rows of opposite weight are paired when closer than this in direction; at most so many of each kind.
PAIR_DISTANCE = 1.0
MAX_PAIRED = 4000
# Half of |cos| between a direction and the difference of a pair, to choose between the two bounds of the pair.
TYPICAL_COSINE = 0.15
ASCENT_STEPS = 120
STARTS = 512


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


@dataclass(frozen=True, eq=False)
class _Response:
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
        return torch.cat([self._value(part) for part in directions.split(_chunk(len(self.rows)))])

    def _value(self, directions: Tensor) -> Tensor:
        return (directions @ self.rows.T).clamp_min_(0) @ self.weights + directions @ self.linear

    def gradient(self, directions: Tensor, outputs: Tensor) -> Tensor:
        """A subgradient of <outputs, q> at every direction, (b, r), (b, C) -> (b, r)."""
        size = _chunk(len(self.rows))
        return torch.cat([self._gradient(*part) for part in zip(directions.split(size), outputs.split(size))])

    def _gradient(self, directions: Tensor, outputs: Tensor) -> Tensor:
        return ((directions @ self.rows.T > 0) * (outputs @ self.weights.T)) @ self.rows + outputs @ self.linear.T


def maximise(A: Tensor, W: Tensor, *, max_seconds: float = 10.0, tolerance: float = 1e-9, start: Tensor | None = None) -> SphereMaximum:
    """Bounds of max_{|z| = 1} |W^T relu(A z)| for patches A (n, d) and weights W (n, C), in float64.

    One output and up to three dimensions (of the row space of A) are solved exactly, beyond MAX_PLANES and for nearly
    equal planes by branch and bound like anything else: until upper <= (1 + tolerance) lower up to rounding or
    `max_seconds` have passed (looked at between batches; the set-up is not interrupted).  The bounds hold at any time.
    start (k, d) or (d,): directions to try first.  The answer is in the units of W times those of A.
    Raises TypeError for what is no tensor, ValueError for shapes that do not fit and entries that are not finite.
    """
    began = time.perf_counter()
    A, W, starts = _checked(A, W, start)
    deadline = began + positive(max_seconds, "max_seconds")
    tolerance = nonnegative(tolerance, "tolerance")
    response = _reduce(A.double(), W.double())
    dimension, outputs = response.linear.shape
    if dimension == 0:
        found = _Found(0.0, 0.0, response.linear.new_zeros(0), "arrangement", 0)
    elif dimension == 1:
        found = _maximise_line(response)
    elif outputs == 1 and _listable(response.rows):
        found = _maximise_arrangement(response)
    else:
        found = _maximise_branching(response, starts @ response.basis, deadline, tolerance)
    argmax = response.basis @ found.argmax if dimension else torch.eye(1, A.shape[1], dtype=torch.float64, device=A.device)[0]
    upper = max(found.upper, found.lower) + response.rounding
    return SphereMaximum(found.lower, upper, argmax, found.method, found.cells, time.perf_counter() - began)


@dataclass(frozen=True, eq=False)
class _Found:
    """What a method found, in the coordinates of a `_Response` and without its rounding."""

    lower: float
    upper: float
    argmax: Tensor
    method: str
    cells: int


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


def _chunk(entries: int) -> int:
    return max(1, CHUNK // max(1, entries))


# --- the smallest equal problem ---------------------------------------------------------------------------------------


def _reduce(A: Tensor, W: Tensor) -> _Response:
    """Drop rows that do not count, go to the row space, merge parallel rows; what that moves q by enters `rounding`."""
    sizes = A.norm(dim=1) * W.norm(dim=1)
    A, W, sizes = A[sizes > 0], W[sizes > 0], sizes[sizes > 0]
    basis = _row_space(A / A.norm(dim=1, keepdim=True) * sizes[:, None])
    rows = A @ basis
    dropped = float(((A - rows @ basis.T).norm(dim=1) * W.norm(dim=1)).sum())
    lengths = rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
    rows, weights = rows / lengths, W * lengths
    rows, weights, linear, moved = _merge_parallel(rows, weights)
    terms = len(A) + 8 * basis.shape[1] ** 2 + 64  # roundings on the longest path from the data to a bound
    rounding = 8 * terms * torch.finfo(A.dtype).eps * float(sizes.sum()) * math.sqrt(W.shape[1])
    return _Response(rows, weights, linear, basis, rounding + 2 * (dropped + moved))


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
    first = torch.full((count,), len(rows), device=rows.device).scatter_reduce(0, group, torch.arange(len(rows), device=rows.device), "amin")
    merged = weights.new_zeros(count, weights.shape[1]).index_add(0, group, weights)
    linear = -(lines[(sides < 0).flatten()].T @ weights[(sides < 0).flatten()])
    moved = float(((lines - lines[first][group]).norm(dim=1) * weights.norm(dim=1)).sum())
    return lines[first], merged, linear, moved


# --- exact: the arrangement of the planes -----------------------------------------------------------------------------


def _listable(rows: Tensor) -> bool:
    """Whether the planes are few and far enough apart to be listed exactly."""
    count, dimension = rows.shape
    if count > MAX_PLANES.get(dimension, -1):
        return False
    cosines = (rows @ rows.T).abs().fill_diagonal_(0)
    return dimension < 3 or count < 2 or float(cosines.max()) <= 1 - 0.5 * LEAST_ANGLE**2


def _maximise_line(response: _Response) -> _Found:
    ends = response.linear.new_tensor([[1.0], [-1.0]])
    lengths = response(ends).norm(dim=1)
    best = int(lengths.argmax())
    return _Found(float(lengths[best]), float(lengths[best]), ends[best], "arrangement", 2)


def _maximise_arrangement(response: _Response) -> _Found:
    """Exact for one output in two dimensions (the cells are arcs) and three (arcs on every plane, then the cells beside them)."""
    rows, dimension = response.rows, response.rows.shape[1]
    if not len(rows):
        return _Found(float(response.linear.norm()), float(response.linear.norm()), _unit(response.linear.T)[0], "arrangement", 1)
    planes = torch.eye(2, dtype=rows.dtype, device=rows.device)[None] if dimension == 2 else _plane_bases(rows)
    own = torch.full((1,), -1, device=rows.device) if dimension == 2 else torch.arange(len(rows), device=rows.device)
    lower, upper, argmax, cells = 0.0, 0.0, _unit(response.linear.T)[0], 0
    for index in own.clamp_min(0).split(_chunk(2 * len(rows) ** 2)):
        values, points = _piece_maxima(response, planes[index], own[index])
        cells += len(values)
        reached = response(points).abs().flatten()
        best = int(reached.argmax())
        upper = max(upper, float(values.max()))
        if float(reached[best]) > lower:
            lower, argmax = float(reached[best]), points[best]
    return _Found(lower, upper, argmax, "arrangement", cells)


def _plane_bases(rows: Tensor) -> Tensor:
    """Orthonormal bases of the planes orthogonal to unit rows, (m, 3) -> (m, 2, 3)."""
    axes = torch.eye(3, dtype=rows.dtype, device=rows.device)[rows.abs().argmin(1)]
    first = _unit(torch.linalg.cross(rows, axes))
    return torch.stack([first, torch.linalg.cross(rows, first)], 1)


def _piece_maxima(response: _Response, planes: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima of |q| over the arcs of circles, and where a cell beside an arc contains its gradient: values (k,), points (k, r).

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


def _interior_maxima(response: _Response, gradients: Tensor, middles: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """|gradient| of the cells on both sides of every arc, where the gradient or its opposite lies in the cell."""
    normals = response.rows[own][:, None]
    beyond = gradients + response.weights[own, 0][:, None, None] * normals
    values, points = [], []
    for sign in (1.0, -1.0):
        for side, gradient in ((1.0, beyond), (-1.0, gradients)):
            tops = _unit(sign * gradient)
            kept = side * (tops * normals).sum(2) >= -BORDER
            heights, places = tops[kept] @ response.rows.T, middles[kept] @ response.rows.T
            # the own row vanishes at the middle up to rounding: its side has been looked at
            places = places.scatter(1, own[:, None].expand_as(kept)[kept][:, None], 0.0)
            agree = ((heights * places.sign()) >= -BORDER).all(1)
            values.append(gradient[kept][agree].norm(dim=1))
            points.append(tops[kept][agree])
    return torch.cat(values), torch.cat(points)


def _unit(vectors: Tensor) -> Tensor:
    """Unit vectors along the last axis; zero vectors become the first axis."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    first = torch.zeros_like(vectors)
    first[..., 0] = 1.0
    return torch.where(lengths > 0, vectors / lengths.clamp_min(torch.finfo(vectors.dtype).tiny), first)


# --- branch and bound -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Cells:
    """Cones over boxes on the facets of the cube [-1, 1]^r.

    middles, halves (b, r): the box; on its facet's axis the middle is 1 or -1 and the half-width 0.  facets (b,): that
    axis.  signs (b,): 1 or -1, whether q or -q is bounded (one output).  uppers (b,): bound of |q|; splits (b,): the
    axis to halve.
    """

    middles: Tensor
    halves: Tensor
    facets: Tensor
    signs: Tensor
    uppers: Tensor
    splits: Tensor

    def __len__(self) -> int:
        return len(self.facets)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.middles, self.halves, self.facets, self.signs, self.uppers, self.splits

    def __getitem__(self, index: Tensor) -> _Cells:
        return _Cells(*(tensor[index] for tensor in self._tensors()))

    def join(self, other: _Cells) -> _Cells:
        return _Cells(*(torch.cat(pair) for pair in zip(self._tensors(), other._tensors())))

    @classmethod
    def roots(cls, response: _Response) -> _Cells:
        """All facets; twice, with both signs, for one output."""
        dimension, outputs = response.linear.shape
        eye = torch.eye(dimension, dtype=response.linear.dtype, device=response.linear.device)
        copies = 4 if outputs == 1 else 2
        middles = torch.cat([eye, -eye] * (copies // 2))
        facets = torch.arange(dimension, device=eye.device).repeat(copies)
        signs = torch.where(torch.arange(len(facets), device=eye.device) < 2 * dimension, 1.0, -1.0).to(eye)
        return cls(middles, (1 - eye).repeat(copies, 1), facets, signs, torch.full_like(signs, torch.inf), (facets + 1) % dimension)

    def halved(self) -> _Cells:
        """Both halves of every cell along its split axis."""
        at = self.splits[:, None]
        halves = self.halves.scatter(1, at, 0.5 * self.halves.gather(1, at))
        step = torch.zeros_like(halves).scatter(1, at, halves.gather(1, at))
        twins = _Cells(self.middles - step, halves, self.facets, self.signs, self.uppers, self.splits)
        return twins.join(_Cells(self.middles + step, *twins._tensors()[1:]))


@dataclass(frozen=True, eq=False)
class _Relaxed:
    """q = single + sum flows (relu(left z) - relu(right z)): opposite rows that nearly cancel are bounded together.

    left, right (p, r), a row or zero; flows (p,) > 0.  With one output every row is in a pair, otherwise none.
    """

    single: _Response
    left: Tensor
    right: Tensor
    flows: Tensor

    @cached_property
    def apart(self) -> tuple[Tensor, Tensor]:
        """|left - right| (p,) and the products of the entries of (left - right) / |left - right|^(1/2), (p, r r)."""
        apart = self.left - self.right
        lengths = apart.norm(dim=1).clamp_min(torch.finfo(apart.dtype).tiny)
        return lengths, (apart[:, :, None] * (apart / lengths[:, None])[:, None, :]).flatten(1)

    @classmethod
    def of(cls, response: _Response) -> _Relaxed:
        rows, linear = response.rows, response.linear
        if linear.shape[1] > 1:
            return cls(response, rows[:0], rows[:0], rows.new_zeros(0))
        weights = response.weights[:, 0]
        rise, fall, flows = _match(rows, weights)
        left, right = rows[rise], rows[fall]
        turned = (left * right).sum(1, keepdim=True) < 0  # -relu(x) = -relu(-x) - x: lines count, not directions
        linear = linear - (flows @ torch.where(turned, right, 0.0))[:, None]
        right = torch.where(turned, -right, right)
        rest = weights.index_add(0, rise, -flows).index_add(0, fall, flows)
        left = torch.cat([left, rows[rest > 0], torch.zeros_like(rows[rest < 0])])
        right = torch.cat([right, torch.zeros_like(rows[rest > 0]), rows[rest < 0]])
        flows = torch.cat([flows, rest[rest > 0], -rest[rest < 0]])
        return cls(_Response(rows[:0], response.weights[:0], linear, response.basis, response.rounding), left, right, flows)


def _match(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of rows of positive and of negative weight: indices (p,), (p,) and the weight each pair carries, (p,).

    Greedy: in every round the rows that are each other's nearest are paired, until none of opposite weight is near.
    """
    rise, fall = ((side * weights > 0).nonzero()[:, 0] for side in (1, -1))
    rise, fall = (index[weights[index].abs().topk(min(len(index), MAX_PAIRED)).indices] for index in (rise, fall))
    left, right = weights[rise], -weights[fall]
    near = (rows[rise] @ rows[fall].T).abs()
    near = torch.where(near > 1 - 0.5 * PAIR_DISTANCE**2, near, -1.0)
    found = [(rise[:0], fall[:0], left[:0])]
    while near.numel():
        best, partner = near.max(1)
        mutual = ((near.argmax(0)[partner] == torch.arange(len(rise), device=rows.device)) & (best > 0)).nonzero()[:, 0]
        if not len(mutual):
            break
        other = partner[mutual]
        flow = torch.minimum(left[mutual], right[other])
        found.append((rise[mutual], fall[other], flow))
        left, right = left.index_add(0, mutual, -flow), right.index_add(0, other, -flow)
        keep, hold = left > 0, right > 0
        if keep.float().mean() < 0.8 or hold.float().mean() < 0.8:
            near, rise, fall, left, right = near[keep][:, hold], rise[keep], fall[hold], left[keep], right[hold]
        else:
            near[mutual[left[mutual] <= 0]] = -1.0
            near[:, other[right[other] <= 0]] = -1.0
    return tuple(torch.cat(column) for column in zip(*found))  # type: ignore[return-value]


def _maximise_branching(response: _Response, starts: Tensor, deadline: float, tolerance: float) -> _Found:
    """Best-first search in batches: the open cells of the largest bounds are halved, those that cannot matter dropped."""
    cells, relaxed = _Cells.roots(response), _Relaxed.of(response)
    lower, argmax = _ascend(response, _start_directions(response, starts))
    batch = max(64, min(MAX_BATCH, BATCH_ENTRIES // max(1, len(response.rows))))
    looked, dropped = 0, 0.0
    fresh, cells = cells, cells[cells.facets < 0]
    while len(fresh):
        fresh, candidates = _bound(relaxed, fresh)
        looked += len(fresh)
        reached, where = _improve(response, candidates, lower)
        if reached > lower:
            lower, argmax = reached, where
        cells = cells.join(fresh)
        alive = cells.uppers > lower * (1 + tolerance) + response.rounding
        dropped = max(dropped, float(cells.uppers.masked_fill(alive, 0.0).max()))
        cells = cells[alive]
        if time.perf_counter() >= deadline or len(cells) > MAX_OPEN:
            break
        chosen = cells.uppers.topk(min(len(cells), batch, max(64, len(cells) // 4))).indices
        left = torch.ones(len(cells), dtype=torch.bool, device=chosen.device).index_fill(0, chosen, False)
        fresh, cells = cells[chosen].halved(), cells[left]
    upper = max(dropped, lower, float(cells.uppers.max()) if len(cells) else 0.0)
    return _Found(lower, upper, argmax, "branch and bound", looked)


def _bound(relaxed: _Relaxed, cells: _Cells) -> tuple[_Cells, Tensor]:
    """Cells (in another order) with bounds and split axes, and the directions (b, r) at which their relaxations are largest."""
    outputs = relaxed.single.linear.shape[1]
    size = _chunk(len(relaxed.single.rows) * 2 * outputs if outputs > 1 else len(relaxed.single.rows) + 2 * len(relaxed.flows))
    order = cells.signs.argsort(descending=True)
    count = int((cells.signs > 0).sum())  # cells of one sign share a chunk
    parts = [part for half in (order[:count], order[count:]) if len(half) for part in half.split(size)]
    found = [(_bound_scalar if outputs == 1 else _bound_vector)(relaxed, cells[part]) for part in parts]
    uppers, scores, tops = (torch.cat(column) for column in zip(*found))
    cells = cells[order]
    # a child lies in its parent: the parent's bound holds for it
    uppers = torch.minimum(uppers, cells.uppers)
    return _Cells(cells.middles, cells.halves, cells.facets, cells.signs, uppers, scores.argmax(1)), tops


def _bound_scalar(relaxed: _Relaxed, cells: _Cells) -> tuple[Tensor, Tensor, Tensor]:
    return _bound_outputs(relaxed, cells, cells.signs[:, None])


def _bound_vector(relaxed: _Relaxed, cells: _Cells) -> tuple[Tensor, Tensor, Tensor]:
    """|q|^2 as a sum over orthonormal outputs, the first of them along q at the middle.

    The others are small in a small cell, so that their bounds matter to second order only.
    """
    frames = _frames(_unit(relaxed.single(cells.middles)))
    count, outputs = frames.shape[:2]
    index = torch.arange(count, device=frames.device).repeat_interleave(2 * outputs)
    both = torch.stack([frames, -frames], 2).reshape(-1, outputs)
    uppers, scores, tops = _bound_outputs(relaxed, cells[index], both)
    lengths = uppers.reshape(count, outputs, 2).amax(2).norm(dim=1)
    return lengths, scores.reshape(count, 2 * outputs, -1)[:, :2].sum(1), tops.reshape(count, 2 * outputs, -1)[:, 0]


def _frames(first: Tensor) -> Tensor:
    """Orthonormal frames (b, C, C) whose first row is +- the unit vector given, (b, C): Householder reflections."""
    eye = torch.eye(first.shape[1], dtype=first.dtype, device=first.device)
    mirror = _unit(first + torch.where(first[:, :1] < 0, -1.0, 1.0) * eye[0])
    frames = eye - 2 * mirror[:, :, None] * mirror[:, None, :]
    # the reflection sends e_1 to -+ first: turn the frame so that its first row is `first` itself
    return frames * torch.where(first[:, :1, None] < 0, 1.0, -1.0)


def _bound_outputs(relaxed: _Relaxed, cells: _Cells, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Upper bounds (b,) of <outputs, q(z)> over the unit vectors of each cone, split scores (b, r), tops (b, r).

    outputs (b, C): one direction per cell.  The score of an axis is its share in the widths of the mixed rows.
    """
    above = _pair_bound(relaxed, cells) if outputs.shape[1] == 1 else _single_bound(relaxed.single, cells, outputs)
    axis = cells.facets[:, None]
    linear = above.linear + outputs @ relaxed.single.linear.T
    linear = linear.scatter_add(1, axis, cells.middles.gather(1, axis) * above.offset[:, None])  # on the facet that coordinate is +-1
    uppers, tops = _cone_maxima(linear, cells)
    widest = cells.halves * torch.finfo(linear.dtype).tiny  # without mixed rows any axis will do
    return uppers + above.slack, above.widths * cells.halves.square() + widest, tops


def _chord(heights: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset of the chord above relu on [heights - reach, heights + reach]; relu itself where the sign is fixed."""
    slopes = (heights / reach.clamp_min(torch.finfo(reach.dtype).tiny)).add_(1).mul_(0.5).clamp_(0, 1)
    return slopes, (reach - heights).clamp_min_(0).mul_(slopes)


@dataclass(frozen=True, eq=False)
class _Above:
    """<linear, z> + offset + slack |z| lies above a function on each box: (b, r), (b,), (b,); widths (b, r) of its mixed rows by axis."""

    linear: Tensor
    offset: Tensor
    slack: Tensor
    widths: Tensor


def _single_bound(single: _Response, cells: _Cells, outputs: Tensor) -> _Above:
    """Above <outputs, q> less its linear part: every row by itself."""
    rows, weights = single.rows, outputs @ single.weights.T
    heights, reach = cells.middles @ rows.T, cells.halves @ rows.abs().T
    chords, offsets = _chord(heights, reach)
    slopes = torch.where(weights > 0, chords, (heights > 0).to(rows.dtype)).mul_(weights)
    offset = (offsets * weights.clamp_min(0)).sum(1)
    widths = ((reach > heights.abs()) * weights.abs()) @ rows.square()
    return _Above(slopes @ rows, offset, torch.zeros_like(offset), widths)


def _pair_bound(relaxed: _Relaxed, cells: _Cells) -> _Above:
    """Above sum flows (relu(left z) - relu(right z)) times the sign that the cells share, term by term the lower at the middle of

    relu(x)'s chord less a supporting plane of relu(y), and (x - y) / 2 + |x - y| / 2.  Over unit vectors the second kind
    adds up to less than sum flows |(left - right) z| <= (K lambda_max(M))^(1/2) by Cauchy and Schwarz, with
    K = sum flows |left - right| and M = sum flows (left - right)(left - right)^T / |left - right|.
    """
    flows, (lengths, squares) = relaxed.flows, relaxed.apart
    left, right = (relaxed.left, relaxed.right) if float(cells.signs[0]) > 0 else (relaxed.right, relaxed.left)
    x, y = cells.middles @ left.T, cells.middles @ right.T
    reach = cells.halves @ left.abs().T
    slopes, offsets = _chord(x, reach)
    alone = (slopes - 0.5) * x + offsets - (y.clamp_min(0) - 0.5 * y)
    mixed = reach > x.abs()
    likely = TYPICAL_COSINE * cells.middles.norm(dim=1, keepdim=True) * lengths
    together = (mixed & (alone > likely)).to(x.dtype) * flows
    apart = flows - together
    rising = torch.addcmul(0.5 * together, slopes, apart)
    falling = torch.addcmul(0.5 * together, (y > 0).to(y.dtype), apart)
    moment = (together @ squares).unflatten(1, (left.shape[1], left.shape[1]))
    slack = 0.5 * ((together @ lengths) * torch.linalg.eigvalsh(moment)[:, -1].clamp_min(0)).sqrt()
    widths = torch.addcmul(together * lengths, mixed, apart) @ left.square()
    return _Above(rising @ left - falling @ right, (offsets * apart).sum(1), slack, widths)


def _cone_maxima(linear: Tensor, cells: _Cells) -> tuple[Tensor, Tensor]:
    """max of <linear, z> over the unit vectors of each cone: upper bounds (b,), where attained (b, r).

    The maximum is the length of the projection on the cone.  On the slice where the facet's coordinate is s the
    projection clips the others to s times the box, and s is the root of a monotone piecewise linear function.  Any p of
    the polar cone bounds the maximum by |linear - p|, so that no accuracy of the root is needed.
    """
    axis = cells.facets[:, None]
    side = cells.middles.gather(1, axis)
    height = (linear.gather(1, axis) * side).flatten()
    others = linear.scatter(1, axis, 0.0)
    low, high = (cells.middles - cells.halves).scatter(1, axis, 0.0), (cells.middles + cells.halves).scatter(1, axis, 0.0)
    s = _slice_root(height, others, low, high)
    rest = others - others.clamp(s[:, None] * low, s[:, None] * high)
    polar = torch.minimum(height - s, -torch.maximum(rest * low, rest * high).sum(1))
    kept = (others - rest).scatter(1, axis, (height - polar)[:, None] * side)
    box = (others / s[:, None].clamp_min(torch.finfo(s.dtype).tiny)).clamp(low, high).scatter(1, axis, side)
    return kept.norm(dim=1), _unit(box)


def _slice_root(height: Tensor, others: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The s >= 0 that minimises (s - height)^2 + |others - clip(others, s low, s high)|^2, (b,); Newton inside a bracket."""
    left, right = torch.zeros_like(height), torch.sqrt(height.square() + others.square().sum(1))
    s = height.clamp_min(0)
    for _ in range(12):
        above, below = others > s[:, None] * high, others < s[:, None] * low
        bounds = torch.where(above, high, torch.where(below, low, 0.0))
        curvature = 1 + bounds.square().sum(1)
        slope = s * curvature - height - (bounds * others).sum(1)
        left, right = torch.where(slope < 0, s, left), torch.where(slope > 0, s, right)
        new = s - slope / curvature
        s = torch.where((new >= left) & (new <= right), new, 0.5 * (left + right))
    return s


# --- lower bounds -----------------------------------------------------------------------------------------------------


def _start_directions(response: _Response, starts: Tensor) -> Tensor:
    """Given ones, the axes, the rows and random ones, (k, r)."""
    rows, dimension = response.rows, response.rows.shape[1]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(STARTS, dimension, generator=generator, dtype=rows.dtype).to(rows.device)
    heaviest = rows[response.weights.norm(dim=1).topk(min(len(rows), 64)).indices]
    eye = torch.eye(dimension, dtype=rows.dtype, device=rows.device)
    return _unit(torch.cat([starts, eye, -eye, heaviest, -heaviest, drawn]))


def _ascend(response: _Response, directions: Tensor) -> tuple[float, Tensor]:
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
        pull = _unit(response.gradient(directions, _unit(values)))
        directions = _unit(directions + 0.8 ** max(0, step - 20) * pull)
    return best, where


def _improve(response: _Response, candidates: Tensor, lower: float) -> tuple[float, Tensor]:
    """The best of some candidate directions (b, r)."""
    values = response(candidates).norm(dim=1)
    best = int(values.argmax())
    return float(values[best]), candidates[best]
