"""The linear constraints of a layer: its design matrix, and an orthonormal basis of that matrix's row space.

A has one row per image and position and one column per (source, offset), and one more where the layer has a bias.  It
is the same for every feature of the layer, so one basis serves all of them.  A is never held as a whole: its products
are taken in blocks, and the basis itself is the largest thing in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.linalg import get_lapack_funcs
from torch import Tensor

from meanfield import limits
from meanfield.architecture import Conv

RANK_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
BLOCK_ENTRIES = 2**22  # of A at a time: 32 MiB in float64
RESOLVED = 1e-5  # the Gram matrix squares: only directions above this share of the largest are read off it
POWER_STEPS = 20


class ConstraintBasis(NamedTuple):
    """right (columns of A, rank): orthonormal basis of the row space.  preimage (rows of A, rank): A^T preimage =
    right.

    Directions that rows contribute below `tolerance` times the largest singular value are left out.
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
            limits.look()
            yield slice(first * per_image, last * per_image), self.rows(slice(first, last))

    def column_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns of A, their entries), a few sources at a time; the bias comes last."""
        sources, offsets = self.features.shape[1], self.conv.offsets
        step = max(1, BLOCK_ENTRIES // (self.shape[0] * offsets))
        for first in range(0, sources, step):
            last = min(first + step, sources)
            limits.look()
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

    def apply_adjoint(self, vectors: Tensor) -> Tensor:
        """A^T vectors, (rows, k) -> (columns, k)."""
        result = self.features.new_empty(self.shape[1], vectors.shape[1])
        for where, block in self.column_blocks():
            torch.mm(block.T, vectors, out=result[where])
        return result

    def lines(self, chosen: Tensor) -> Tensor:
        """The chosen rows of a wide A, or columns of a tall one, as columns, (larger side, k)."""
        result = self.features.new_empty(max(self.shape), len(chosen))
        for where, block in self.column_blocks() if _is_wide(self) else self.row_blocks():
            result[where] = block[chosen].T if _is_wide(self) else block[:, chosen]
        return result

    def basis(self) -> ConstraintBasis:
        """Computed in float64, whatever the features' dtype; the memory is that of the basis and one copy of it."""
        exact, tolerance = Design(self.conv, self.features.double()), RANK_TOLERANCE[self.features.dtype]
        right, preimage = exact._span(tolerance)
        if not _is_wide(self):  # what is spanned are the columns of A: its rows are those of A^T left
            left = right
            right, triangle = torch.linalg.qr(exact.apply_adjoint(left))
            preimage = torch.linalg.solve_triangular(triangle, left, upper=True, left=False)
        return ConstraintBasis(right.to(self.features), preimage.to(self.features), tolerance)

    def _span(self, tolerance: float) -> tuple[Tensor, Tensor]:
        """An orthonormal basis of the lines' span, (larger side, rank), and the combinations of lines that give it.

        Lines are chosen by pivoted Cholesky factors of their Gram matrix, in two passes: the second looks at what the
        lines left over in the first one add, which drowns in the rounding of the first Gram matrix.
        """
        gram = self.gram()
        largest = _largest(gram)
        chosen, rest = _independent(gram, RESOLVED * largest)
        basis, triangle = torch.linalg.qr(self.lines(chosen))
        shares = gram.new_zeros(len(gram), len(chosen))
        shares[chosen] = torch.linalg.solve_triangular(triangle, torch.eye(len(chosen)).to(gram), upper=True)
        left_over = self.lines(rest)
        overlap = gram.new_zeros(len(chosen), len(rest))
        for _ in range(2):  # once leaves rounding of the size of A, twice rounding of the size of what is left
            along = basis.T @ left_over
            left_over -= basis @ along
            overlap += along
        fine, _ = _independent(left_over.T @ left_over, tolerance * largest)
        finer, triangle = torch.linalg.qr(left_over[:, fine])
        further = -(shares @ overlap[:, fine])
        further[rest[fine], torch.arange(len(fine), device=gram.device)] += 1
        further = torch.linalg.solve_triangular(triangle, further, upper=True, left=False)
        return torch.cat([basis, finer], 1), torch.cat([shares, further], 1)


def _largest(gram: Tensor) -> float:
    """The square root of the largest eigenvalue, from below, to a few per cent."""
    vector = gram.sum(1) + gram.diagonal()
    for _ in range(POWER_STEPS):
        vector = gram @ (vector / torch.linalg.vector_norm(vector).clamp_min(torch.finfo(gram.dtype).tiny))
    return float(torch.linalg.vector_norm(vector).sqrt())


def _independent(gram: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Lines whose distance from the span of those chosen before exceeds the threshold, largest
    first, and the others.
    """
    order, rank = torch.arange(len(gram)), 0
    stop = max(threshold**2, torch.finfo(gram.dtype).tiny)
    if len(gram) and float(gram.diagonal().max()) > stop:  # LAPACK does not hold the first pivot against the threshold
        (pivoted_cholesky,) = get_lapack_funcs(("pstrf",), dtype="float64")
        _, pivots, rank, _ = pivoted_cholesky(gram.numpy(force=True), tol=stop, lower=1)
        order = torch.as_tensor(pivots).long() - 1
    return order[:rank].to(gram.device), order[rank:].to(gram.device)


def _is_wide(design: Design) -> bool:
    return design.shape[0] <= design.shape[1]
