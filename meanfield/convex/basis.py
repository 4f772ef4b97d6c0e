"""The row space of a layer's shifted features, from one pass over the images.

A has one row per image and position and one column per (source, offset), and one more where the layer has a bias.  It
is the same for every feature of the layer.  All that the convex program needs of it is the space of its rows: A is
never held, and nothing here grows with images or positions once there are more rows than columns.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.linalg import get_lapack_funcs
from torch import Tensor

from meanfield import limits
from meanfield.architecture import Conv
from meanfield.folds import Fold
from meanfield.ranks import ALONE, Ranks

RANK_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
RESOLVED = 1e-5  # the Gram matrix squares: only directions above this share of the largest are read off it
POWER_STEPS = 20


class RowSpace(NamedTuple):
    """right (columns of A, rank): orthonormal, spanned by combinations of rows; always float64.

    Rows that stand out of the others' span by less than `tolerance` times the largest singular value add nothing.
    """

    right: Tensor
    tolerance: float

    @property
    def rank(self) -> int:
        return self.right.shape[1]


class StackedRows:
    """T with T^T T = A^T A, in float64, from A's rows in any blocks.

    Rows are kept as they are up to the number of columns, beyond that as the triangle of a QR decomposition of what is
    kept with what comes (TSQR; Demmel, Grigori, Hoemmen, Langou 2012), which does not square the condition number.
    """

    def __init__(self, rows: int, columns: int, device: torch.device | str | None = None) -> None:
        # a triangle costs 2 (columns + new rows) columns^2: many new rows at a time, where they fit a block
        height = min(rows, max(2 * columns, limits.block_bytes() // (8 * columns)))
        self._held = torch.empty(columns, height, dtype=torch.float64, device=device).T  # as LAPACK takes it
        self._count = 0

    def add(self, rows: Tensor) -> None:
        """Further rows of A, (any number, columns)."""
        while len(rows):
            if self._count == len(self._held):
                self._compress()
            taken = rows[: len(self._held) - self._count]
            self._held[self._count : self._count + len(taken)] = taken
            self._count, rows = self._count + len(taken), rows[len(taken) :]

    def _compress(self) -> None:
        triangle = torch.linalg.qr(self._held[: self._count], mode="r").R
        self._count = len(triangle)
        self._held[: self._count] = triangle

    def rows(self) -> Tensor:
        """T, of no more rows than columns."""
        if self._count > self._held.shape[1]:
            self._compress()
        found = self._held[: self._count]
        return found if len(found) == len(self._held) else found.T.clone().T


def stacked(first: Tensor, second: Tensor) -> Tensor:
    """T of the rows of both, of no more rows than columns."""
    rows = torch.cat([first, second])
    return torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows


def row_space(fold: Fold[Tensor], tolerance: float, like: Tensor, ranks: Ranks = ALONE) -> RowSpace:
    """The row space of all runs of images, whose T's were folded by `stacked`; like (any number, columns).

    One rank finds it for all: what is independent by a hair must not depend on the machine.
    """
    if ranks.count == 1:
        return RowSpace(_span(fold.result, tolerance), tolerance)
    every: Fold[Tensor] = Fold(fold.count, stacked)
    for span, rows in ranks.handed_over(fold, like):
        every.add(span, rows)
    right = _span(every.result, tolerance) if ranks.own == 0 else like.new_empty(like.shape[1], 0)
    rank = int(ranks.decided(float(right.shape[1])))
    return RowSpace(ranks.agreed(right if ranks.own == 0 else right.new_empty(len(right), rank)), tolerance)


def rows_of(conv: Conv, features: Tensor) -> Tensor:
    """The rows of A of some images, features (N, M_{l-1}, H, W) -> (N P, M_{l-1} S + bias)."""
    rows = conv.patches(features).flatten(0, 1)
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if conv.bias else rows


def _span(rows: Tensor, tolerance: float) -> Tensor:
    """An orthonormal basis of the rows' span, (columns, rank); the rows are scaled in place.

    Rows are chosen by pivoted Cholesky factors of their Gram matrix, in two passes: the second looks at what the rows
    left over in the first one add, which drowns in the rounding of the first Gram matrix.
    """
    size = float(rows.abs().amax())
    if not 0 < size < math.inf:
        return rows.new_zeros(rows.shape[1], 0)
    rows.div_(size)  # so that squares neither overflow nor vanish
    gram = rows @ rows.T
    largest = _largest(gram)
    chosen, rest = _independent(gram, RESOLVED * largest)
    if len(chosen) == rows.shape[1]:
        return torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    del gram
    basis, left_over = torch.linalg.qr(rows[chosen].T).Q, rows[rest].T
    for _ in range(2):  # once leaves rounding of the size of A, twice rounding of the size of what is left
        left_over = left_over - basis @ (basis.T @ left_over)
    fine, _ = _independent(left_over.T @ left_over, tolerance * largest)
    return torch.cat([basis, torch.linalg.qr(left_over[:, fine]).Q], 1) if len(fine) else basis


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
