"""Branch and bound over cones of directions, for any dimension and any number of outputs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from meanfield.certificates.sphere.response import Found, Response, ascend, chunk, improve, start_directions, unit

MAX_BATCH = 4096
BATCH_ENTRIES = 1 << 22  # of all rows over all cells of a batch: the time limit is looked at in between
# Cells kept open: beyond, the search stops with what it has proven (16 d + 32 bytes each, 350 MB for d = 9).
MAX_OPEN = 2_000_000
# Rows of opposite weight are paired when closer than this in direction; at most so many of each kind.
PAIR_DISTANCE = 1.0
MAX_PAIRED = 4000
# Half of |cos| between a direction and the difference of a pair, to choose between the two bounds of the pair.
TYPICAL_COSINE = 0.15


@dataclass(frozen=True, eq=False)
class Cones:
    """Cones over boxes on the facets of the cube [-1, 1]^r, together all directions or some of them.

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

    def __getitem__(self, index: Tensor) -> Cones:
        return Cones(*(tensor[index] for tensor in self._tensors()))

    def join(self, other: Cones) -> Cones:
        return Cones(*(torch.cat(pair) for pair in zip(self._tensors(), other._tensors())))

    @classmethod
    def roots(cls, response: Response) -> Cones:
        """All facets; twice, with both signs, for one output."""
        dimension, outputs = response.linear.shape
        eye = torch.eye(dimension, dtype=response.linear.dtype, device=response.linear.device)
        copies = 4 if outputs == 1 else 2
        middles = torch.cat([eye, -eye] * (copies // 2))
        facets = torch.arange(dimension, device=eye.device).repeat(copies)
        signs = torch.where(torch.arange(len(facets), device=eye.device) < 2 * dimension, 1.0, -1.0).to(eye)
        return cls(
            middles,
            (1 - eye).repeat(copies, 1),
            facets,
            signs,
            torch.full_like(signs, torch.inf),
            (facets + 1) % dimension,
        )

    def halved(self) -> Cones:
        """Both halves of every cell along its split axis."""
        at = self.splits[:, None]
        halves = self.halves.scatter(1, at, 0.5 * self.halves.gather(1, at))
        step = torch.zeros_like(halves).scatter(1, at, halves.gather(1, at))
        twins = Cones(self.middles - step, halves, self.facets, self.signs, self.uppers, self.splits)
        return twins.join(Cones(self.middles + step, *twins._tensors()[1:]))


@dataclass(frozen=True, eq=False)
class _Relaxed:
    """q = single + sum flows (relu(left z) - relu(right z)): opposite rows that nearly cancel are bounded together.

    left, right (p, r), a row or zero; flows (p,) > 0.  With one output every row is in a pair, otherwise none.
    """

    single: Response
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
    def of(cls, response: Response) -> _Relaxed:
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
        return cls(
            Response(rows[:0], response.weights[:0], linear, response.basis, response.rounding), left, right, flows
        )


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


def maximise_branching(response: Response, starts: Tensor, deadline: float, tolerance: float) -> Found:
    """Best-first search in batches: the open cells of the largest bounds are halved, those that
    cannot matter dropped.
    """
    cells, relaxed = Cones.roots(response), _Relaxed.of(response)
    lower, argmax = ascend(response, start_directions(response, starts))
    batch = max(64, min(MAX_BATCH, BATCH_ENTRIES // max(1, len(response.rows))))
    looked, dropped = 0, 0.0
    fresh, cells = cells, cells[cells.facets < 0]
    while len(fresh):
        fresh, candidates = _bound(relaxed, fresh)
        looked += len(fresh)
        reached, where = improve(response, candidates, lower)
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
    return Found(lower, upper, argmax, "branch and bound", looked)


def bounded_cones(response: Response, halvings: int) -> Cones:
    """Cones that cover all directions, every one halved so often, with their bounds."""
    relaxed, cells = _Relaxed.of(response), Cones.roots(response)
    for _ in range(halvings):
        cells = _bound(relaxed, cells)[0].halved()
    return _bound(relaxed, cells)[0]


def _bound(relaxed: _Relaxed, cells: Cones) -> tuple[Cones, Tensor]:
    """Cells (in another order) with bounds and split axes, and the directions (b, r) at which their relaxations are
    largest.
    """
    outputs = relaxed.single.linear.shape[1]
    size = chunk(
        len(relaxed.single.rows) * 2 * outputs if outputs > 1 else len(relaxed.single.rows) + 2 * len(relaxed.flows)
    )
    order = cells.signs.argsort(descending=True)
    count = int((cells.signs > 0).sum())  # cells of one sign share a chunk
    parts = [part for half in (order[:count], order[count:]) if len(half) for part in half.split(size)]
    found = [(_bound_scalar if outputs == 1 else _bound_vector)(relaxed, cells[part]) for part in parts]
    uppers, scores, tops = (torch.cat(column) for column in zip(*found))
    cells = cells[order]
    # a child lies in its parent: the parent's bound holds for it
    uppers = torch.minimum(uppers, cells.uppers)
    return Cones(cells.middles, cells.halves, cells.facets, cells.signs, uppers, scores.argmax(1)), tops


def _bound_scalar(relaxed: _Relaxed, cells: Cones) -> tuple[Tensor, Tensor, Tensor]:
    return _bound_outputs(relaxed, cells, cells.signs[:, None])


def _bound_vector(relaxed: _Relaxed, cells: Cones) -> tuple[Tensor, Tensor, Tensor]:
    """|q|^2 as a sum over orthonormal outputs, the first of them along q at the middle.

    The others are small in a small cell, so that their bounds matter to second order only.
    """
    frames = _frames(unit(relaxed.single(cells.middles)))
    count, outputs = frames.shape[:2]
    index = torch.arange(count, device=frames.device).repeat_interleave(2 * outputs)
    both = torch.stack([frames, -frames], 2).reshape(-1, outputs)
    uppers, scores, tops = _bound_outputs(relaxed, cells[index], both)
    lengths = uppers.reshape(count, outputs, 2).amax(2).norm(dim=1)
    return lengths, scores.reshape(count, 2 * outputs, -1)[:, :2].sum(1), tops.reshape(count, 2 * outputs, -1)[:, 0]


def _frames(first: Tensor) -> Tensor:
    """Orthonormal frames (b, C, C) whose first row is +- the unit vector given, (b, C): Householder reflections."""
    eye = torch.eye(first.shape[1], dtype=first.dtype, device=first.device)
    mirror = unit(first + torch.where(first[:, :1] < 0, -1.0, 1.0) * eye[0])
    frames = eye - 2 * mirror[:, :, None] * mirror[:, None, :]
    # the reflection sends e_1 to -+ first: turn the frame so that its first row is `first` itself
    return frames * torch.where(first[:, :1, None] < 0, 1.0, -1.0)


def _bound_outputs(relaxed: _Relaxed, cells: Cones, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Upper bounds (b,) of <outputs, q(z)> over the unit vectors of each cone, split scores (b, r), tops (b, r).

    outputs (b, C): one direction per cell.  The score of an axis is its share in the widths of the mixed rows.
    """
    above = _pair_bound(relaxed, cells) if outputs.shape[1] == 1 else _single_bound(relaxed.single, cells, outputs)
    axis = cells.facets[:, None]
    linear = above.linear + outputs @ relaxed.single.linear.T
    # on the facet that coordinate is +-1
    linear = linear.scatter_add(1, axis, cells.middles.gather(1, axis) * above.offset[:, None])
    uppers, tops = _cone_maxima(linear, cells)
    widest = cells.halves * torch.finfo(linear.dtype).tiny  # without mixed rows any axis will do
    return uppers + above.slack, above.widths * cells.halves.square() + widest, tops


def _chord(heights: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset of the chord above relu on [heights - reach, heights + reach]; relu itself where the sign is
    fixed.
    """
    slopes = (heights / reach.clamp_min(torch.finfo(reach.dtype).tiny)).add_(1).mul_(0.5).clamp_(0, 1)
    return slopes, (reach - heights).clamp_min_(0).mul_(slopes)


@dataclass(frozen=True, eq=False)
class _Above:
    """<linear, z> + offset + slack |z| lies above a function on each box: (b, r), (b,), (b,); widths (b, r) of its
    mixed rows by axis.
    """

    linear: Tensor
    offset: Tensor
    slack: Tensor
    widths: Tensor


def _single_bound(single: Response, cells: Cones, outputs: Tensor) -> _Above:
    """Above <outputs, q> less its linear part: every row by itself."""
    rows, weights = single.rows, outputs @ single.weights.T
    heights, reach = cells.middles @ rows.T, cells.halves @ rows.abs().T
    chords, offsets = _chord(heights, reach)
    slopes = torch.where(weights > 0, chords, (heights > 0).to(rows.dtype)).mul_(weights)
    offset = (offsets * weights.clamp_min(0)).sum(1)
    widths = ((reach > heights.abs()) * weights.abs()) @ rows.square()
    return _Above(slopes @ rows, offset, torch.zeros_like(offset), widths)


def _pair_bound(relaxed: _Relaxed, cells: Cones) -> _Above:
    """Above sum flows (relu(left z) - relu(right z)) times the sign that the cells share, term by term the lower at
    the middle of

    relu(x)'s chord less a supporting plane of relu(y), and (x - y) / 2 + |x - y| / 2.  Over unit vectors the second
    kind adds up to less than sum flows |(left - right) z| <= (K lambda_max(M))^(1/2) by Cauchy and Schwarz, with
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


def _cone_maxima(linear: Tensor, cells: Cones) -> tuple[Tensor, Tensor]:
    """max of <linear, z> over the unit vectors of each cone: upper bounds (b,), where attained (b, r).

    The maximum is the length of the projection on the cone.  On the slice where the facet's coordinate is s the
    projection clips the others to s times the box, and s is the root of a monotone piecewise linear function.  Any p of
    the polar cone bounds the maximum by |linear - p|, so that no accuracy of the root is needed.
    """
    axis = cells.facets[:, None]
    side = cells.middles.gather(1, axis)
    height = (linear.gather(1, axis) * side).flatten()
    others = linear.scatter(1, axis, 0.0)
    low, high = (
        (cells.middles - cells.halves).scatter(1, axis, 0.0),
        (cells.middles + cells.halves).scatter(1, axis, 0.0),
    )
    s = _slice_root(height, others, low, high)
    rest = others - others.clamp(s[:, None] * low, s[:, None] * high)
    polar = torch.minimum(height - s, -torch.maximum(rest * low, rest * high).sum(1))
    kept = (others - rest).scatter(1, axis, (height - polar)[:, None] * side)
    box = (others / s[:, None].clamp_min(torch.finfo(s.dtype).tiny)).clamp(low, high).scatter(1, axis, side)
    return kept.norm(dim=1), unit(box)


def _slice_root(height: Tensor, others: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The s >= 0 that minimises (s - height)^2 + |others - clip(others, s low, s high)|^2, (b,); Newton inside a
    bracket.
    """
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
