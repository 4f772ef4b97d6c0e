"""Output multipliers of which branch and bound proves more than of the optimal ones, for one output.

On a partition of the sphere the bound of max |q| is the largest over cells of U_c(r), and U_c(r) = <r, G_c> along the
choices that the relaxation makes: G_c is what it takes a feature in that cell for.  The cuts <r, G_c> <= price of these
relaxed features beside those of true ones lead to multipliers that are smoother over the images: rows of both signs
cancel less, and the cancelling is what the relaxation loses.  How much smoother they had better be depends on how small
cells can be made, so that the partition is a sample of the cells of a search that has gone some way.  Nothing is proven
here: any r will do for a bound, and the better ones pay.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from meanfield import limits
from meanfield.certificates import sphere
from meanfield.certificates.cuts import Features, Program, best_scale
from meanfield.certificates.sphere.branching import bounded
from meanfield.certificates.sphere.cones import Cones, cone_maxima
from meanfield.certificates.sphere.pairs import LEAST_REACH, SHORTEST, TYPICAL_COSINE, Pairs
from meanfield.certificates.sphere.response import Response, reduced

RELAXED_CLOSED = 2e-3  # relative to the value of the program with relaxed features: what need not be gained any more
STAY = 0.7  # of a step from the best multipliers towards those of the program
CUTS = 64  # of one pass, those of the cells with the largest bounds


@dataclass(frozen=True, eq=False)
class Partition:
    """Cones of directions, and the responses of single images (an output each) in their coordinates."""

    images: Response
    cells: Cones

    @classmethod
    def of(cls, features: Features, search: sphere.Search, count: int) -> Self:
        """So many cells of a search."""
        patches, weights = features.patches, features.weights
        single = torch.eye(len(patches) // len(weights), dtype=patches.dtype, device=patches.device)
        cells, basis = search.sample(count)
        return cls(reduced(patches, features.weighted(single), basis), cells.unbounded())

    def bound(self, output: Tensor) -> tuple[float, Tensor]:
        """The bound of max |q| at r = `output` (N, 1) on these cells, and the relaxed features G (CUTS, N, 1) of those
        where it is largest: the largest <G, r> is the bound.
        """
        images = self.images
        weights = (images.weights @ output).requires_grad_()
        response = Response(images.rows, weights, images.linear @ output, images.basis, images.rounding)
        # flows, and through turned rows the linear part, follow from the weights of the rows
        pairs = Pairs.of(response)
        fixed = Pairs(pairs.linear.detach(), pairs.left, pairs.right, pairs.flows.detach())
        cells = bounded(fixed, self.cells)
        top = cells[cells.uppers.topk(min(CUTS, len(cells))).indices]
        tops, heights = _heights(fixed, top)
        values = heights @ pairs.flows + top.signs * (tops @ pairs.linear)
        eye = torch.eye(len(top), dtype=values.dtype, device=values.device)
        slopes = torch.autograd.grad(values, weights, eye, is_grads_batched=True)[0][..., 0]
        features = slopes @ images.weights + (top.signs[:, None] * tops) @ images.linear
        return float(cells.uppers.max()), features[..., None]


def relaxed_passes(program: Program, output: Tensor, partition: Partition, passes: int) -> Iterator[Tensor]:
    """Multipliers near the best on a partition, pass by pass, from `output` on: steps from the best so far towards
    those of the program with the relaxed features of all passes, whose value no multipliers exceed there.
    """
    program, best = copy.copy(program), (-math.inf, output)
    for _ in range(passes):
        limits.look()
        upper, relaxed = partition.bound(output)
        scale, value = best_scale(program.problem, output, upper)
        best = max(best, (value, scale * output), key=lambda each: each[0])
        yield best[1]
        program.extend(relaxed)
        towards = program.solve(output)
        if best[0] >= program.value * (1 - RELAXED_CLOSED):
            return
        output = STAY * best[1] + (1 - STAY) * towards


def _heights(pairs: Pairs, cells: Cones) -> tuple[Tensor, Tensor]:
    """Where the relaxations of `Pairs.above` are largest (b, r), and there the derivatives of the bounds in the flows
    (b, p): the bound is heights flows + sign linear top.
    """
    left, right, apart, flows = pairs.left, pairs.right, pairs.left - pairs.right, pairs.flows
    lengths = apart.norm(dim=1).clamp_min(SHORTEST)
    positive = cells.signs[:, None] > 0
    size = cells.middles.norm(dim=1, keepdim=True)

    def of(directions: Tensor, rows: Tensor, others: Tensor) -> Tensor:
        """Products with the row of each pair that counts positively, where `rows` does so for q and `others` for -q."""
        return torch.where(positive, directions @ rows.T, directions @ others.T) / lengths

    x, y = of(cells.middles / size, left, right), of(cells.middles / size, right, left)
    reach = of(cells.halves / size, left.abs(), right.abs()) + LEAST_REACH
    together = reach - y.abs() > TYPICAL_COSINE
    chord = torch.maximum(x.abs(), reach)
    rising = torch.where(together, 0.0, x / chord)
    falling = torch.where(together, 0.0, y.sign())
    raised = torch.where(together, 0.0, size * (chord - rising * x))
    axis = cells.facets[:, None]
    side = cells.middles.gather(1, axis)
    slopes = torch.where(positive, rising, -falling) @ (flows[:, None] * left)
    slopes += torch.where(positive, -falling, rising) @ (flows[:, None] * right)
    linear = cells.signs[:, None] * (pairs.linear + 0.5 * flows @ apart) + 0.5 * slopes
    tops = cone_maxima(linear.scatter_add(1, axis, 0.5 * side * (raised @ (flows * lengths))[:, None]), cells)[1]
    bent = _bent(apart / lengths[:, None], together * (flows * lengths))
    alone = rising * of(tops, left, right) - falling * of(tops, right, left) + raised * side * tops.gather(1, axis)
    return tops, 0.5 * (cells.signs[:, None] * (tops @ apart.T) + lengths * (alone + together * bent))


def _bent(directions: Tensor, weights: Tensor) -> Tensor:
    """Derivatives of (K lambda_max(M))^(1/2) in the weights (b, p) of unit directions d (p, r); K is the sum of weights
    and M that of weights d d^T.
    """
    total = weights.sum(1, keepdim=True)
    values, vectors = torch.linalg.eigh((weights[:, None, :] * directions.T) @ directions)
    largest = values[:, -1:].clamp_min(0)
    along = (vectors[:, :, -1] @ directions.T).square()
    return (largest + total * along) / (2 * (total * largest).sqrt().clamp_min(torch.finfo(total.dtype).tiny))
