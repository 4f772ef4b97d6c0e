"""Moves kernels onto the linear constraints of a layer, and then inside the bounds without leaving them again.

For a feature of mass p the constraints are a cone in (W, p), so that rows x = W / (B p) meet  x V = fixed coordinates,
sum_i |x_i| <= 1  and  |x_bias| <= 1.  All distances are those of  |x|^2 = sum x_k^2 / s_k,  s_k > 0 on sources with
mass.  Let y be the row's projection on the bounds, n = x - y and d the projection of n on the null space of V.  The
bounds lie in the half-space <n, z - y> <= 0; the row's projection on its part that meets the linear constraints is

    x - (|n|^2 / |d|^2) d,

for <n, d> = |d|^2 (Gurin, Polyak & Raik 1967).  No such step moves away from any point that meets all constraints;
where one bound is active it is Newton's method for it, and the excess falls quadratically.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from meanfield import limits
from meanfield.penalties import Penalty, shrinkage_root

RIDGE = {torch.float32: 1e-5, torch.float64: 1e-12}  # of the mean diagonal; repeated use closes what it leaves open
STEPS = 50  # each is Newton's where one bound is active: a handful; two active bounds share them
# a sum of three roundings a term, added up pairwise over up to 2^13 terms: what cannot be told from the bound
ROUNDINGS = 16


def least_weighted(right: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """y (rows, rank) -> the rows x of least sum x^2 / scale^2 with x right = y, columns of scale 0 staying 0.

    A Cholesky factor of the smaller Gram matrix of the scaled basis, with a ridge that repeated use closes.
    """
    alive = torch.nonzero(scale > 0).flatten()
    rows = right[alive] * scale[alive, None]  # (alive columns, rank)
    few = rows.shape[0] < rows.shape[1]
    gram = rows @ rows.T if few else rows.T @ rows
    ridge = RIDGE[gram.dtype] * gram.diagonal().mean()
    factor = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).L

    def solve(wanted: Tensor) -> Tensor:
        step = wanted.new_zeros(len(wanted), len(scale))
        chosen = torch.cholesky_solve(rows @ wanted.T, factor) if few else rows @ torch.cholesky_solve(wanted.T, factor)
        step[:, alive] = chosen.T * scale[alive]
        return step

    return solve


@dataclass(frozen=True, eq=False)
class BoundedRows:
    """The bounds of a layer's rows x = (W, bias) / (B p), (rows, columns).

    shape (sources, kh, kw) of a kernel; scale (columns,) the roots of s; bias: whether the last column is one.
    """

    penalty: Penalty
    shape: tuple[int, ...]
    scale: Tensor
    bias: bool

    def excess(self, rows: Tensor) -> Tensor:
        """max(sum_i |x_i|, |x_bias|) - 1, (rows,)."""
        reached = self.penalty.norms(self._kernels(rows)).sum(1)
        return (torch.maximum(reached, rows[:, -1].abs()) if self.bias else reached) - 1

    def nearest(self, rows: Tensor) -> Tensor:
        """The nearest rows inside the bounds, by ROUNDINGS roundings: atoms shrink in proportion to their s."""
        level = 1 - ROUNDINGS * torch.finfo(rows.dtype).eps
        kernels, squares = self._kernels(rows), self.scale[: self._size].square()
        slopes = squares.reshape(self.shape[0], -1)[:, :1]
        theta = shrinkage_root(self.penalty.atoms(kernels), slopes, 1.0, (1, 2), level=level)
        inside = self.penalty.shrink(kernels, theta * slopes).flatten(1)
        return torch.cat([inside, rows[:, -1:].clamp(-level, level)], 1) if self.bias else inside

    def square(self, rows: Tensor) -> Tensor:
        """|x|^2, (rows, 1)."""
        return torch.where(self.scale > 0, rows / self.scale, 0.0).square().sum(1, keepdim=True)

    @property
    def _size(self) -> int:
        return len(self.scale) - self.bias

    def _kernels(self, rows: Tensor) -> Tensor:
        return rows[:, : self._size].reshape(-1, *self.shape)


def into_bounds(rows: Tensor, right: Tensor, solve: Callable[[Tensor], Tensor], bounds: BoundedRows) -> Tensor:
    """Rows with the same coordinates `rows right`, inside the bounds wherever some kernel of these coordinates is well
    inside; `solve` is `least_weighted` of the same scale.

    A row whose coordinates leave nothing to move, or whose excess did not fall within STEPS, stays as it was.
    """
    wanted, before = rows @ right, bounds.excess(rows)
    rounding = ROUNDINGS * torch.finfo(rows.dtype).eps
    result = rows.clone()
    chosen = torch.nonzero(before > rounding).flatten()
    for _ in range(STEPS):
        if not len(chosen):
            break
        limits.look()
        x = result[chosen]
        n = x - bounds.nearest(x)
        d = n - solve(n @ right)
        length, along = bounds.square(n), bounds.square(d)
        # d carries rounding of the size of n: below the root of it nothing of d is known, and steps are n^2 / d
        movable = along > torch.finfo(rows.dtype).eps * length
        x = x - torch.where(movable, length / along, 0.0) * d
        result[chosen] = x - solve(x @ right - wanted[chosen])
        chosen = chosen[movable.flatten() & (bounds.excess(result[chosen]) > rounding)]
    return torch.where((bounds.excess(result) <= before)[:, None], result, rows)


def towards(rows: Tensor, anchors: Tensor, bounds: BoundedRows) -> Tensor:
    """The least convex combination of each row with an anchor inside the bounds that is inside as well.

    The excess of a combination is at most that of the same combination of excesses, so that a share of
    e / (e - e_anchor) of the anchor is enough; an anchor on the bound itself is taken as a whole.
    """
    excess, slack = bounds.excess(rows).clamp_min(0), (-bounds.excess(anchors)).clamp_min(0)
    share = torch.where(excess > 0, excess / (excess + slack), 0.0)[:, None]
    return (1 - share) * rows + share * anchors
