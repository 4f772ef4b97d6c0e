"""Output multipliers of which branch and bound proves more than of the optimal ones, for one output.

On a partition of the sphere the bound of max |q| is the largest over cells of U_c(r), and U_c(r) = <r, G_c> along the
choices that the relaxation makes: G_c is what it takes a feature in that cell for.  The cuts <r, G_c> <= price of these
relaxed features beside those of true ones lead to multipliers that are smoother over the images: rows of both signs
cancel less, and the cancelling is what the relaxation loses.  Nothing is proven here: any r will do for a bound, and
the better ones pay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from meanfield.certificates.sphere.cones import Cones, cone_maxima
from meanfield.certificates.sphere.pairs import Pairs
from meanfield.certificates.sphere.response import Response, reduced

CUTS = 64  # of one pass, those of the cells with the largest bounds
CHUNK = 256  # cells at once
# A pair is taken by its difference where that is below this share of its length: |cos| between typical directions.
TYPICAL_COSINE = 0.15


@dataclass(frozen=True, eq=False)
class Partition:
    """Cones that cover all directions, and the responses of single images (an output each) in their coordinates."""

    images: Response
    cells: Cones

    @classmethod
    def refined(cls, patches: Tensor, weights: Tensor, output: Tensor, cells: int) -> Partition:
        """So many cones, smaller where the bound at r = `output` (N, 1) is large; patches (N P, d), weights (P,) of
        positions.
        """
        single = torch.eye(len(output), dtype=patches.dtype, device=patches.device)
        images = reduced(patches, (single[:, None] * weights[None, :, None]).flatten(0, 1))
        response = _at(images, output)
        pairs = _Pairs.of(response)
        found = pairs.bounded(Cones.roots(response))
        while len(found) < cells:
            chosen = found.uppers.topk(max(1, len(found) // 4)).indices
            left = torch.ones(len(found), dtype=torch.bool, device=chosen.device).index_fill(0, chosen, False)
            found = found[left].join(pairs.bounded(found[chosen].halved()))
        return cls(images, found)

    def bound(self, output: Tensor) -> tuple[float, Tensor]:
        """The bound of max |q| at r = `output` (N, 1), and the relaxed features G (CUTS, N, 1) of the largest cells:
        the largest <G, r> is the bound.
        """
        response = _at(self.images, output)
        weights = response.weights.clone().requires_grad_()
        paired = _Pairs.of(Response(response.rows, weights, response.linear, response.basis, response.rounding))
        pairs = _Pairs(paired.linear.detach(), paired.left, paired.right, paired.flows.detach())
        cells = pairs.bounded(self.cells)
        top = cells[cells.uppers.topk(min(CUTS, len(cells))).indices]
        top, tops, heights = pairs.heights(top)
        # flows, and through turned rows the linear part, follow from the weights of the rows
        values = heights @ paired.flows + top.signs * (tops @ paired.linear)
        eye = torch.eye(len(top), dtype=values.dtype, device=values.device)
        slopes = torch.autograd.grad(values, weights, eye, is_grads_batched=True)[0][..., 0]
        features = slopes @ self.images.weights + (top.signs[:, None] * tops) @ self.images.linear
        return float(cells.uppers.max()), features[..., None]


def _at(images: Response, output: Tensor) -> Response:
    return Response(images.rows, images.weights @ output, images.linear @ output, images.basis, images.rounding)


class _Pairs(Pairs):
    """Pairs whose bounds have derivatives in the flows."""

    def bounded(self, cells: Cones) -> Cones:
        """With their bounds, and the axis along which mixed rows are widest to halve; in another order."""
        parts = [(part, self._relax(part)) for part in _parts(cells)]
        cells = reduce(Cones.join, (part for part, _ in parts))
        uppers = torch.cat([found.uppers for _, found in parts])
        splits = torch.cat([found.widths.argmax(1) for _, found in parts])
        return Cones(cells.middles, cells.halves, cells.facets, cells.signs, uppers, splits)

    def heights(self, cells: Cones) -> tuple[Cones, Tensor, Tensor]:
        """Cells (in another order), where their relaxations are largest (b, r), and there the derivatives of the bounds
        in the flows (b, p): the bound is heights flows + sign linear top.
        """
        parts = [(part, self._relax(part)) for part in _parts(cells)]
        tops, heights = (torch.cat([getattr(found, name) for _, found in parts]) for name in ("tops", "heights"))
        return reduce(Cones.join, (part for part, _ in parts)), tops, heights

    def _relax(self, cells: Cones) -> _Relaxed:
        """Cells of one sign: of each pair the chord above one row less a plane below the other, or their difference,
        whose lengths add up to less than (K lambda_max(M))^(1/2) / 2 with K = sum flows |d|, M = sum flows d d^T / |d|.
        """
        sign = float(cells.signs[0])
        left, right = (self.left, self.right) if sign > 0 else (self.right, self.left)
        apart = left - right
        lengths = apart.norm(dim=1).clamp_min(torch.finfo(apart.dtype).tiny)
        x, y, reach = cells.middles @ left.T, cells.middles @ right.T, cells.halves @ left.abs().T
        slopes = (0.5 + 0.5 * x / reach.clamp_min(torch.finfo(reach.dtype).tiny)).clamp(0, 1)
        offsets = (reach - x).clamp_min(0) * slopes
        alone = (slopes - 0.5) * x + offsets - 0.5 * y.abs()
        close = (reach > x.abs()) & (alone > TYPICAL_COSINE * cells.middles.norm(dim=1, keepdim=True) * lengths)
        together = close * self.flows
        rising = torch.where(close, 0.5, slopes)
        falling = torch.where(close, 0.5, (y > 0).to(y.dtype))
        axis = cells.facets[:, None]
        side = cells.middles.gather(1, axis)
        raised = torch.where(close, 0.0, offsets)
        linear = sign * self.linear + (rising * self.flows) @ left - (falling * self.flows) @ right
        linear = linear.scatter_add(1, axis, side * (raised @ self.flows)[:, None])
        tops = cone_maxima(linear, cells)[1]
        total = together @ lengths
        values, vectors = torch.linalg.eigh(torch.einsum("bp,pi,pj->bij", together / lengths, apart, apart))
        largest = values[:, -1].clamp_min(0)
        slack = 0.5 * (total * largest).sqrt()
        along = (vectors[:, :, -1] @ apart.T).square() / lengths
        small = torch.finfo(slack.dtype).tiny
        bent = (largest[:, None] * lengths + total[:, None] * along) * (0.125 / slack.clamp_min(small))[:, None]
        heights = rising * (tops @ left.T) - falling * (tops @ right.T) + raised * side * tops.gather(1, axis)
        heights = heights + torch.where(close, bent, 0.0)
        mixed = (reach > x.abs()) * torch.where(close, self.flows * lengths, self.flows)
        widths = (mixed @ left.square()) * cells.halves.square() + cells.halves * small
        return _Relaxed((linear * tops).sum(1) + slack, widths, tops, heights)


@dataclass(frozen=True, eq=False)
class _Relaxed:
    uppers: Tensor
    widths: Tensor
    tops: Tensor
    heights: Tensor


def _parts(cells: Cones) -> list[Cones]:
    """Cells of one sign each, not many at once."""
    halves = [(cells.signs * sign > 0).nonzero()[:, 0] for sign in (1, -1)]
    return [cells[part] for half in halves for part in half.split(CHUNK) if len(part)]
