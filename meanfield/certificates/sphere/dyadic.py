"""Cones in a few bytes, to the last bit: what halving makes of an axis is a node of a binary tree.

An axis that was halved k times spans one of the intervals of half-width h = 2^-k in [-1, 1], that from -1 + 2 p h on,
p < 2^k.  Its node is the whole number 2^k + p, which says both; in the place of the facet's axis stands its side, 1 or
-1.  Nodes are whole in float64, and the sums below exact, up to k = DEEPEST.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meanfield.certificates.sphere.cones import Cones

# Cells of 2^-46 are below the rounding of a response, at least 2^-42 of the sum of its rows' sizes: none is halved.
DEEPEST = 52
ROWS = 1 << 16  # cells that are converted at once
WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64)


def coded(cells: Cones) -> Tensor:
    """(b, r + 3) of the smallest integer type that holds it: nodes, facet, sign and axis to halve; without bounds."""
    sizes = 1 / cells.halves.where(cells.halves > 0, 1.0)
    deepest = float(sizes.max()) if len(cells) else 1.0
    if deepest > 2.0**DEEPEST:
        raise ValueError(f"a cell was halved more than {DEEPEST} times along one axis, and has no code")
    kind = next(each for each in WHOLE if torch.iinfo(each).max >= max(2 * deepest - 1, cells.halves.shape[1]))
    parts = zip(*(each.split(ROWS) for each in (sizes, *cells.tensors())))
    return torch.cat([_coded(size, Cones(*part)).to(kind) for size, *part in parts])


def _coded(sizes: Tensor, cells: Cones) -> Tensor:
    axis = cells.facets[:, None]
    nodes = ((cells.middles * sizes - 1) + 3 * sizes) / 2
    nodes = nodes.scatter(1, axis, cells.middles.gather(1, axis))
    return torch.cat([nodes, torch.stack([cells.facets, cells.signs, cells.splits], 1).to(nodes)], 1)


def decoded(codes: Tensor, uppers: Tensor) -> Cones:
    """The cones of `coded`, with bounds (b,)."""
    parts = [_decoded(part) for part in codes.split(ROWS)]
    middles, halves, facets, signs, splits = (torch.cat(column) for column in zip(*parts))
    return Cones(middles, halves, facets, signs, uppers, splits)


def _decoded(codes: Tensor) -> tuple[Tensor, ...]:
    nodes, columns = codes.double().split([codes.shape[1] - 3, 3], 1)
    facets, signs, splits = columns.unbind(1)
    axis = facets.long()[:, None]
    sizes = nodes / (2 * torch.frexp(nodes).mantissa)  # 2^k: a power of two, which no rounding touches
    middles = ((2 * nodes - 3 * sizes) + 1) / sizes
    middles = middles.scatter(1, axis, nodes.gather(1, axis))
    return middles, (1 / sizes).scatter(1, axis, 0.0), facets.long(), signs, splits.long()
