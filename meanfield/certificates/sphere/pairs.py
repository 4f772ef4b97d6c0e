"""One output over cones: opposite rows that nearly cancel are bounded together.

Over rows a, b of opposite weight, relu(a z) - relu(b z) = (a - b) z / 2 + (|a z| - |b z|) / 2.  On a box with the
middle m and the half-widths h, where |a| h = rho is the reach of a z, the second half lies under one of two:

alone: |a z| <= c a z + (1 - c^2) rho for c = a m / max(|a m|, rho), the chord where a z has both signs and |a z| itself
where it has one; it is max(|a m|, rho) at m.  |b z| >= sign(b m) b z.
together: | |a z| - |b z| | <= |(a - b) z|.  Over unit vectors these add up to less than sum flows |(a - b) z| <=
(K lambda_max(M))^(1/2) by Cauchy and Schwarz, with K = sum flows |a - b| and M = sum flows (a - b)(a - b)^T / |a - b|.

Rows are scaled by 1 / |a - b|, so that one threshold tells the two apart.

Rounding, in units of eps: sums over a block of n pairs are computed in either precision and added in double.  Whatever
c, whichever sign and choice come out are valid, so that an error enters by a m and rho (r + 3 roundings of r
products; the bound at m moves by no more than 1 and 3 times theirs) and by the three sums (n + 3 each), of sizes
|m|, |h| and 1 times sum flows / 2: at most N (|m| + 2 |h| + 1) sum flows / 2 for N = n + 2 r + 9, half of it with eps
twice the unit of rounding.  M's is at most N K.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from meanfield.certificates.sphere.cones import Cones
from meanfield.certificates.sphere.response import Response

# Rows of opposite weight are paired when closer than this in direction; at most so many of each kind.
PAIR_DISTANCE = 1.0
MAX_PAIRED = 4000
# |cos| between a direction and the difference of a pair above which the pair is bounded alone.
TYPICAL_COSINE = 0.3
BLOCK = 256  # pairs whose sums are taken at once: with as many cells they fit a cache, and they bound what is rounded
WIDTH_BLOCKS = 4  # one block of so many chooses the axis to halve
SHORTEST = 1e-15  # difference of a pair by which it is still scaled
LEAST_REACH = 1e-30  # keeps a m / max(|a m|, rho) from 0 / 0
# Single precision is taken where its rounding is below this share of what a bound is above the largest response met.
SINGLE_SHARE = 0.02


@dataclass(frozen=True, eq=False)
class Above:
    """<linear, z> + offset + slack |z| lies above a function on each box: (b, r), (b,), (b,); widths (b, r) of its
    mixed rows by axis.
    """

    linear: Tensor
    offset: Tensor
    slack: Tensor
    widths: Tensor


@dataclass(frozen=True, eq=False)
class _Block:
    """Some pairs, divided by their lengths, in one precision and for one sign of q."""

    left: Tensor  # (r, n)
    right: Tensor  # (r, n)
    reach: Tensor  # (r + 1, n): |left|, LEAST_REACH
    rising: Tensor  # (r, n): left times weights
    falling: Tensor  # (r, n)
    weights: Tensor  # (n,): flows times lengths
    moments: Tensor  # (n, _padded(r)): weighted products of two entries of left - right; last the weights
    lengths: Tensor  # (n,)
    squares: Tensor  # (r, n): flows times squares of the rows

    @property
    def size(self) -> int:
        return len(self.weights)


@dataclass(frozen=True, eq=False)
class Pairs:
    """q = linear z + sum flows (relu(left z) - relu(right z)), every row in a pair or with zero.

    linear (r,); left, right (p, r), a row or zero; flows (p,) > 0.
    """

    linear: Tensor
    left: Tensor
    right: Tensor
    flows: Tensor

    @classmethod
    def of(cls, response: Response) -> Self:
        """Of a response with one output."""
        rows, weights, linear = response.rows, response.weights[:, 0], response.linear[:, 0]
        rise, fall, flows = _match(rows, weights)
        left, right = rows[rise], rows[fall]
        turned = (left * right).sum(1, keepdim=True) < 0  # -relu(x) = -relu(-x) - x: lines count, not directions
        linear = linear - flows @ torch.where(turned, right, 0.0)
        right = torch.where(turned, -right, right)
        rest = weights.index_add(0, rise, -flows).index_add(0, fall, flows)
        left = torch.cat([left, rows[rest > 0], torch.zeros_like(rows[rest < 0])])
        right = torch.cat([right, torch.zeros_like(rows[rest > 0]), rows[rest < 0]])
        return cls(linear, left, right, torch.cat([flows, rest[rest > 0], -rest[rest < 0]]))

    def precision(self, gap: float) -> torch.dtype:
        """The one that bounds are taken in which are to be right to a small share of `gap`."""
        exact = self.flows.device.type != "cpu" or torch.get_float32_matmul_precision() != "highest"
        if exact or torch.is_autocast_enabled("cpu"):
            return torch.float64
        coarse = self._rounding(torch.float32) * float(self.flows.sum())
        return torch.float32 if coarse <= SINGLE_SHARE * gap else torch.float64

    def above(self, cells: Cones, sign: float, precision: torch.dtype = torch.float64) -> Above:
        """Above `sign` q, on each box."""
        size = cells.middles.norm(dim=1, keepdim=True)
        middles, halves = cells.middles / size, cells.halves / size
        total = self.flows.sum().clamp_min(torch.finfo(size.dtype).tiny)
        slopes, value, moments, widths = self._sums(middles, halves, sign, precision)
        half = 0.5 * total
        linear = sign * (self.linear + 0.5 * self.flows @ (self.left - self.right))
        rounding = self._rounding(precision)
        rounded = half * rounding * (size + 2 * halves.norm(dim=1, keepdim=True) * size + 1)[:, 0]
        weight = moments[:, -1]
        largest = torch.linalg.eigvalsh(self._square(moments))[:, -1].clamp_min(0)
        slack = half * (weight * (1 + rounding) * (largest + rounding * weight)).sqrt()
        offset = half * size[:, 0] * value
        return Above(linear + half * slopes, offset, slack + rounded, widths)

    def _rounding(self, precision: torch.dtype) -> float:
        return (BLOCK + 2 * self.left.shape[1] + 9) * torch.finfo(precision).eps

    def _square(self, flat: Tensor) -> Tensor:
        """Symmetric matrices (b, r, r) of their upper triangles."""
        size = self.left.shape[1]
        above, beside = torch.triu_indices(size, size, device=flat.device)
        places = torch.empty(size, size, dtype=torch.long, device=flat.device)
        places[above, beside] = places[beside, above] = torch.arange(len(above), device=flat.device)
        return flat.index_select(1, places.flatten()).unflatten(1, (size, size))

    def _sums(self, middles: Tensor, halves: Tensor, sign: float, precision: torch.dtype) -> tuple[Tensor, ...]:
        """Of all pairs, divided by sum flows / 2: slopes (b, r), value at facet 1 (b,), moments, widths."""
        count, dimension = middles.shape
        near = middles.to(precision)
        far = torch.cat([halves, torch.ones_like(halves[:, :1])], 1).to(precision)
        rising, falling = (middles.new_zeros(dimension, count) for _ in range(2))
        widths = middles.new_zeros(count, dimension)
        value, moments = middles.new_zeros(count), middles.new_zeros(count, _padded(dimension))
        scratch = near.new_empty(5, count * BLOCK)  # fresh memory for every step would take most of the time
        for index, block in enumerate(self._blocks[sign, precision]):
            x, y, reach, size, together = (each[: count * block.size].view(count, -1) for each in scratch)
            torch.mm(near, block.left, out=x)
            torch.mm(near, block.right, out=y)
            torch.mm(far, block.reach, out=reach)
            torch.abs(x, out=size)
            torch.abs(y, out=together)
            torch.sub(reach, together, out=together).gt_(TYPICAL_COSINE)
            chord = torch.maximum(size, reach, out=reach)  # of |x|, at the middle
            slopes = x.div_(chord)
            alone = torch.sub(1, together, out=size)
            value += chord.mul_(alone) @ block.weights
            moments += together @ block.moments
            falling += block.falling @ y.sign_().mul_(alone).T  # half the time of the other order
            own = torch.mul(slopes, alone, out=chord)
            rising += block.rising @ own.T
            if index % WIDTH_BLOCKS == 0:
                mixed = alone.addcmul_(own, slopes, value=-1)  # 1 - c^2
                widths += mixed.addcmul_(together, block.lengths) @ block.squares.T
        return (rising - falling).T, value - (rising.T * middles).sum(1), moments, widths

    @cached_property
    def _blocks(self) -> dict[tuple[float, torch.dtype], list[_Block]]:
        """By the sign of q and the precision; every block has pairs of all kinds."""
        lengths = (self.left - self.right).norm(dim=1).clamp_min(SHORTEST)
        flows = self.flows / self.flows.sum()
        count = -(-len(flows) // BLOCK)
        parts = [torch.arange(first, len(flows), count, device=flows.device) for first in range(count)]
        return {
            (sign, precision): [
                _block(left[part], right[part], flows[part], lengths[part], precision) for part in parts
            ]
            for sign, left, right in ((1.0, self.left, self.right), (-1.0, self.right, self.left))
            for precision in (torch.float32, torch.float64)
        }


def _padded(dimension: int) -> int:
    """Columns of `_Block.moments`: a product with a multiple of 16 takes two thirds of the time."""
    return 16 * (dimension * (dimension + 1) // 32 + 1)


def _block(left: Tensor, right: Tensor, flows: Tensor, lengths: Tensor, precision: torch.dtype) -> _Block:
    x, y, weights = left / lengths[:, None], right / lengths[:, None], flows * lengths
    above, beside = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
    moments = weights[:, None] * (x - y)[:, above] * (x - y)[:, beside]
    empty = x.new_zeros(len(x), _padded(x.shape[1]) - len(above) - 1)
    tensors = (
        x.T,
        y.T,
        torch.cat([x.abs(), torch.full_like(x[:, :1], LEAST_REACH)], 1).T,
        (flows[:, None] * left).T,
        (flows[:, None] * right).T,
        weights,
        torch.cat([moments, empty, weights[:, None]], 1),
        lengths,
        (flows[:, None] * left.square()).T,
    )
    return _Block(*(tensor.to(precision).contiguous() for tensor in tensors))


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
