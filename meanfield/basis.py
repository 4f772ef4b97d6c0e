"""The linear constraints of a layer: its design matrix, and an orthonormal basis of that matrix's row space.

A has one row per image and position and one column per (source, offset), and one more where the layer has a bias.  It is
the same for every feature of the layer, so one basis serves all of them.  A is never held as a whole: its products are
taken in blocks, and the basis itself is the largest thing in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from meanfield.architecture import Conv

RANK_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
BLOCK_ENTRIES = 2**22  # of A at a time: 32 MiB in float64
RESOLVED = 1e-5  # singular values above this share of the largest are read off the Gram matrix, which squares them


class ConstraintBasis(NamedTuple):
    """right (columns of A, rank): orthonormal basis of the row space.  preimage (rows of A, rank): A^T preimage = right.

    Directions with singular values below `tolerance` times the largest are left out.
    """

    right: Tensor
    preimage: Tensor
    tolerance: float

    @property
    def rank(self) -> int:
        return self.right.shape[1]


@dataclass(frozen=True, eq=False)
class Design:
    """A of one layer: conv its convolution, features (N, M_{l-1}, H, W) what it acts on."""

    conv: Conv
    features: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N P, M_{l-1} S + bias)."""
        height, width = self.conv.sizes(*self.features.shape[2:], where="the layer")[0]
        return len(self.features) * height * width, self.features.shape[1] * self.conv.offsets + self.conv.bias

    def rows(self, images: slice = slice(None)) -> Tensor:
        """The rows of some images, all of them by default."""
        rows = self.conv.patches(self.features[images]).flatten(0, 1)
        return torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if self.conv.bias else rows

    def row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows of A, their entries), a few images at a time."""
        count = len(self.features)
        per_image = self.shape[0] // count
        step = max(1, BLOCK_ENTRIES // (per_image * self.shape[1]))
        for first in range(0, count, step):
            last = min(first + step, count)
            yield slice(first * per_image, last * per_image), self.rows(slice(first, last))

    def column_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns of A, their entries), a few sources at a time; the bias comes last."""
        sources, offsets = self.features.shape[1], self.conv.offsets
        step = max(1, BLOCK_ENTRIES // (self.shape[0] * offsets))
        for first in range(0, sources, step):
            last = min(first + step, sources)
            yield slice(first * offsets, last * offsets), self.conv.patches(self.features[:, first:last]).flatten(0, 1)
        if self.conv.bias:
            yield slice(sources * offsets, sources * offsets + 1), self.features.new_ones(self.shape[0], 1)

    def gram(self) -> Tensor:
        """A A^T or A^T A, whichever is smaller."""
        wide, blocks = _is_wide(self), self.column_blocks() if _is_wide(self) else self.row_blocks()
        total = self.features.new_zeros(min(self.shape), min(self.shape))
        for _, block in blocks:
            left = block if wide else block.T
            total.addmm_(left, left.T)
        return total

    def apply(self, vectors: Tensor) -> Tensor:
        """A vectors, (columns, k) -> (rows, k)."""
        result = self.features.new_empty(self.shape[0], vectors.shape[1])
        for where, block in self.row_blocks():
            torch.mm(block, vectors, out=result[where])
        return result

    def apply_adjoint(self, vectors: Tensor) -> Tensor:
        """A^T vectors, (rows, k) -> (columns, k)."""
        result = self.features.new_empty(self.shape[1], vectors.shape[1])
        for where, block in self.column_blocks():
            torch.mm(block.T, vectors, out=result[where])
        return result

    def basis(self) -> ConstraintBasis:
        """Computed in float64, whatever the features' dtype; the memory is that of the basis and one copy of it."""
        exact, tolerance = Design(self.conv, self.features.double()), RANK_TOLERANCE[self.features.dtype]
        left = exact._range(tolerance)
        if not _is_wide(self):
            left = torch.linalg.qr(exact.apply(left))[0]
        # Householder QR is orthonormal to rounding however small the singular values are
        right, triangle = torch.linalg.qr(exact.apply_adjoint(left))
        preimage = torch.linalg.solve_triangular(triangle, left, upper=True, left=False)
        return ConstraintBasis(right.to(self.features), preimage.to(self.features), tolerance)

    def _range(self, tolerance: float) -> Tensor:
        """Orthonormal singular directions of A on its smaller side, those above the rank tolerance.

        Squared singular values below RESOLVED^2 drown in the Gram matrix's rounding: those directions are looked at
        again through A itself.
        """
        values, vectors = torch.linalg.eigh(self.gram())
        largest = values[-1].clamp_min(torch.finfo(values.dtype).tiny)
        resolved = values > RESOLVED**2 * largest
        rest = vectors[:, ~resolved]
        image = self.apply_adjoint(rest) if _is_wide(self) else self.apply(rest)
        finer, turn = torch.linalg.eigh(image.T @ image)
        return torch.cat([vectors[:, resolved], rest @ turn[:, finer > tolerance**2 * largest]], 1)


def _is_wide(design: Design) -> bool:
    return design.shape[0] <= design.shape[1]
