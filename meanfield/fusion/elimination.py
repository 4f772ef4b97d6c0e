"""Backward elimination of channels: which of them the layers that read them can best do without, and what these layers
then make of the others.

A layer that reads channels is a least-squares problem, min over W of |A W - B|^2, its columns in groups of one channel.
With H = A'A and the minimiser W, leaving out the group g raises the least error by exactly W_g' (H^-1_gg)^-1 W_g, and
the new minimiser and inverse are

    W - H^-1_.g (H^-1_gg)^-1 W_g,   H^-1 - H^-1_.g (H^-1_gg)^-1 H^-1_g.

(Hassibi & Stork 1993, equations (5) and (10), for groups.)  Moments are taken once; a step then costs one downdate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meanfield.grafting.least_squares import Products

RIDGE = 1e-8  # of the mean square of a column: unobserved directions of the weights stay, and H has an inverse


@dataclass
class Reader:
    """The least-squares problem of one layer in `groups` channels of `size` columns each, at its minimum.

    inverse: H^-1, (groups size, groups size).  weights: (groups size, K).  unit: what errors are counted in.  All
    float64.
    """

    inverse: Tensor
    weights: Tensor
    groups: int
    unit: float

    @classmethod
    def of(cls, moments: Products, current: Tensor, groups: int, *, offset: bool) -> Reader:
        """From the moments of the design and of what the layer is to give, with weights (groups size, K) so far.

        The minimiser is the one nearest to `current`, by a ridge of RIDGE on the way from there.  unit: the least
        squares that a constant leaves, or 1 where that is zero.
        """
        sums = moments.sums(offset=offset)
        ridge = RIDGE * float(sums.design.diagonal().mean()) or 1.0  # a design of zeros determines nothing
        square = sums.design + ridge * torch.eye(len(sums.design)).to(sums.design)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(square))
        weights = current.to(inverse) + inverse @ (sums.mixed - sums.design @ current.to(inverse))
        return cls(inverse, weights, groups, moments.total or 1.0)

    @property
    def size(self) -> int:
        return len(self.weights) // self.groups

    def losses(self) -> Tensor:
        """By how much the least error rises without each channel, (groups,), in units."""
        blocks = self.inverse.unflatten(0, (self.groups, -1)).unflatten(2, (self.groups, -1))
        own = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        weights = self.weights.unflatten(0, (self.groups, -1))
        return (weights * torch.linalg.solve(own, weights)).sum((1, 2)) / self.unit

    def without(self, channel: int) -> Reader:
        """The problem of the other channels, at its minimum."""
        out = torch.zeros(len(self.weights), dtype=torch.bool, device=self.weights.device)
        out[channel * self.size : (channel + 1) * self.size] = True
        kept, across = ~out, self.inverse[~out][:, out]
        # H^-1_gg is symmetric, so that both downdates share one solution
        carried = torch.linalg.solve(self.inverse[out][:, out], across.T)
        inverse = self.inverse[kept][:, kept] - across @ carried
        weights = self.weights[kept] - carried.T @ self.weights[out]
        return Reader((inverse + inverse.T) / 2, weights, self.groups - 1, self.unit)


def eliminate(readers: Sequence[Reader], count: int) -> tuple[Tensor, list[Reader]]:
    """Leave out channels, always the one without which the sum of the readers' errors is least, until `count` are left.

    Returns the indices of those left, (count,) in increasing order, and the readers' problems in them.
    """
    readers = list(readers)
    left = torch.arange(readers[0].groups, device=readers[0].weights.device)
    while len(left) > count:
        losses = torch.stack([reader.losses() for reader in readers]).sum(0)
        least = int(losses.argmin())
        left = torch.cat([left[:least], left[least + 1 :]])
        readers = [reader.without(least) for reader in readers]
    return left, readers


def keep(readers: Sequence[Reader], kept: Tensor) -> list[Reader]:
    """The readers' problems in the channels `kept` (increasing) alone."""
    readers = list(readers)
    for channel in range(readers[0].groups - 1, -1, -1):
        if not bool((kept == channel).any()):
            readers = [reader.without(channel) for reader in readers]
    return readers
