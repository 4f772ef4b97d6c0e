"""Cones over boxes on the facets of the cube, and linear functions on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meanfield.certificates.sphere.response import Response, unit


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

    def tensors(self) -> tuple[Tensor, ...]:
        return self.middles, self.halves, self.facets, self.signs, self.uppers, self.splits

    def __getitem__(self, index: Tensor) -> Cones:
        return Cones(*(tensor[index] for tensor in self.tensors()))

    def join(self, other: Cones) -> Cones:
        return Cones(*(torch.cat(pair) for pair in zip(self.tensors(), other.tensors())))

    def bounded(self, uppers: Tensor, splits: Tensor) -> Cones:
        return replace(self, uppers=uppers, splits=splits)

    def unbounded(self) -> Cones:
        return replace(self, uppers=torch.full_like(self.uppers, torch.inf))

    def table(self) -> Tensor:
        """One row for each, (b, 2 r + 4)."""
        columns = torch.stack([self.facets.to(self.signs), self.signs, self.splits.to(self.signs), self.uppers], 1)
        return torch.cat([self.middles, self.halves, columns], 1)

    @classmethod
    def of_table(cls, table: Tensor) -> Cones:
        dimension = (table.shape[1] - 4) // 2
        middles, halves, columns = table.split([dimension, dimension, 4], 1)
        facets, signs, splits, uppers = columns.unbind(1)
        return cls(middles, halves, facets.long(), signs, uppers, splits.long())

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
        return twins.join(Cones(self.middles + step, *twins.tensors()[1:]))


def cone_maxima(linear: Tensor, cells: Cones) -> tuple[Tensor, Tensor]:
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
