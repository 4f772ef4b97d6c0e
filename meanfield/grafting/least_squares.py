"""Least squares from samples that come in pieces: second moments stand for all of them, whatever their number.

Samples are columns: a design a (d, n) and targets b (K, n).
Both may come as views of more dimensions, features first.  Both classes answer the same questions about

    min over W (d, K), o (K,) of  |W' a + o - b|^2 / n + ridge |W|^2.

`Triangle` keeps a QR factor and does not square condition numbers; `Products` keeps inner products in float64, which is
as good for samples that are known to float32 only, and three times as fast or more.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

SAMPLES = 4  # between two factorisations, in multiples of the columns: a fifth of the work goes into the old triangle
CONSTANT = 32 * torch.finfo(torch.float64).eps
STRIPES = 4  # of a symmetric product: 10 of 16 blocks are computed
ENTRIES = 2**25  # numbers of one block of samples (256 MiB)


class Fit(NamedTuple):
    """weights (d, K); offset (K,) or None; rank of the design: its singular values above rounding."""

    weights: Tensor
    offset: Tensor | None
    rank: int


class Sums(NamedTuple):
    """Inner products: A A' (d, d) of the design and A B' (d, K) with the targets; means (d,) and (K,) of both."""

    design: Tensor
    mixed: Tensor
    means: tuple[Tensor, Tensor]


class Moments(Protocol):
    unknowns: int
    samples: int

    @property
    def block(self) -> int:
        """Samples that are best added at a time."""
        ...

    def add(self, design: Tensor, targets: Tensor) -> None:
        """Samples of any floating dtype, (d, n) and (K, n) or of shapes that flatten to these."""
        ...

    @property
    def total(self) -> float:
        """|b - mean b|^2; 0 where that is rounding of constant targets."""
        ...

    def residual(self, weights: Tensor, offset: Tensor | None) -> float:
        """|W' a + o - b|^2."""
        ...

    def solve(self, ridge: float, precision: float, *, offset: bool) -> Fit:
        """The minimiser of least |W|, o free or (offset=False) zero.

        precision: relative rounding error of the samples' dtype.  Singular values of the design (less its mean if o is
        free) up to precision |A|_F (in `Triangle` sqrt(d) times that) are what rounding can make: they count as zero.
        Features that are zero throughout get weights of exactly zero.  rank is that of the design with the ridge.
        """
        ...


def moments(unknowns: int, targets: int, like: Tensor) -> Moments:
    """The kind that fits the dtype of the samples."""
    kind = Triangle if like.dtype == torch.float64 else Products
    return kind(unknowns, targets, like.device)


def error(moments: Moments, weights: Tensor, offset: Tensor | None) -> float:
    """The residual in units of the total; nan where the targets are constant."""
    return moments.residual(weights, offset) / moments.total if moments.total > 0 else math.nan


def _columns(design: Tensor, targets: Tensor, unknowns: int, count: int) -> Tensor:
    """(1, a, b) as columns in float64, (1 + d + K, n), in one copy."""
    found = torch.empty(1 + unknowns + count, targets.numel() // count, dtype=torch.float64, device=targets.device)
    found[0] = 1
    found[1 : 1 + unknowns].view(design.shape).copy_(design)
    found[1 + unknowns :].view(targets.shape).copy_(targets)
    return found


class Triangle:
    """R of a QR factorisation of the rows (1, a, b) seen so far, in float64 (Golub & Van Loan 2013, section 5.3)."""

    def __init__(self, unknowns: int, targets: int, device: torch.device) -> None:
        self.unknowns, self.targets, self.samples = unknowns, targets, 0
        columns = 1 + unknowns + targets
        self.block = max(columns, min(SAMPLES * columns, ENTRIES // columns))
        self._stack = torch.zeros(1 + unknowns + self.block, columns, dtype=torch.float64, device=device)
        self._waiting = 0
        self._rest = self._stack.new_zeros(())

    def add(self, design: Tensor, targets: Tensor) -> None:
        for piece in _columns(design, targets, self.unknowns, self.targets).split(self.block, 1):
            if self._waiting + piece.shape[1] > self.block:
                self._factor()
            self._stack[1 + self.unknowns + self._waiting :][: piece.shape[1]] = piece.T
            self._waiting += piece.shape[1]
            self.samples += piece.shape[1]

    def _factor(self) -> None:
        if not self._waiting:
            return
        kept = 1 + self.unknowns
        triangle = torch.linalg.qr(self._stack[: kept + self._waiting], mode="r").R
        self._rest += triangle[kept:].square().sum()
        self._stack.zero_()
        self._stack[: min(kept, len(triangle))] = triangle[:kept]
        self._waiting = 0

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """(column of ones, design, targets), 1 + d rows each; all but the first row belong to the centred samples."""
        self._factor()
        ones, design, targets = self._stack[: 1 + self.unknowns].split([1, self.unknowns, self.targets], 1)
        return ones, design, targets

    @property
    def total(self) -> float:
        targets = self._parts()[2]
        spread = float(targets[1:].square().sum() + self._rest)
        return spread if spread > CONSTANT**2 * float(targets[0].square().sum()) else 0.0

    def residual(self, weights: Tensor, offset: Tensor | None) -> float:
        ones, design, targets = self._parts()
        fitted = design @ weights.to(design)
        if offset is not None:
            fitted = fitted + ones * offset.to(design)
        return float((fitted - targets).square().sum() + self._rest)

    def solve(self, ridge: float, precision: float, *, offset: bool) -> Fit:
        ones, design, targets = self._parts()
        matrix, right = (design[1:], targets[1:]) if offset else (design, targets)
        if ridge:
            matrix = torch.cat([matrix, math.sqrt(ridge * self.samples) * torch.eye(self.unknowns).to(matrix)])
            right = torch.cat([right, right.new_zeros(self.unknowns, self.targets)])
        cutoff = precision * math.sqrt(self.unknowns) * float(design.norm())  # the factorisation rounds as well
        weights, rank = _by_values(matrix, right, cutoff)
        return Fit(weights, (targets[0] - design[0] @ weights) / ones[0] if offset else None, rank)


class Products:
    """Inner products of the rows (1, a, b) seen so far, summed in float64."""

    def __init__(self, unknowns: int, targets: int, device: torch.device) -> None:
        self.unknowns, self.targets, self.samples = unknowns, targets, 0
        columns = 1 + unknowns + targets
        self.block = max(columns, ENTRIES // columns)
        self._upper = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self._whole: Tensor | None = None

    def add(self, design: Tensor, targets: Tensor) -> None:
        columns = _columns(design, targets, self.unknowns, self.targets)
        self.samples += columns.shape[1]
        step = -(-len(columns) // STRIPES)
        # the matrix is symmetric: what lies below the stripes' diagonal is left out
        for first in range(0, len(columns), step):
            stripe = slice(first, first + step)
            self._upper[stripe, first:].addmm_(columns[stripe], columns[first:].T)

        self._whole = None

    @property
    def _sums(self) -> Tensor:
        if self._whole is None:
            self._whole = self._upper.triu() + self._upper.triu(1).T
        return self._whole

    @property
    def total(self) -> float:
        sizes, sums = (each[1 + self.unknowns :] for each in (self._upper.diagonal(), self._upper[0]))
        spread = float((sizes - sums.square() / self.samples).sum())
        return spread if spread > CONSTANT * float(sizes.sum()) else 0.0  # a difference: its rounding is not squared

    def residual(self, weights: Tensor, offset: Tensor | None) -> float:
        sums = self._sums
        weights = weights.to(sums)
        first = torch.zeros_like(weights[:1]) if offset is None else offset.to(sums)[None]
        map_ = torch.cat([first, weights, -torch.eye(weights.shape[1]).to(weights)])
        return max(float((map_ * (sums @ map_)).sum()), 0.0)

    def sums(self, *, offset: bool) -> Sums:
        """In float64; of the samples less their means if offset."""
        inner, found = self.unknowns, self._sums[1 : 1 + self.unknowns, 1:]
        if offset:
            found = found - torch.outer(self._upper[0, 1 : 1 + inner], self._upper[0, 1:]) / self.samples
        means = self._upper[0, 1:] / self.samples
        return Sums(found[:, :inner], found[:, inner:], (means[:inner], means[inner:]))

    def solve(self, ridge: float, precision: float, *, offset: bool) -> Fit:
        cutoff = precision**2 * float(self._sums.diagonal()[1 : 1 + self.unknowns].sum())
        design, mixed, means = self.sums(offset=offset)
        shrunk = design + ridge * self.samples * torch.eye(self.unknowns).to(design)
        weights, rank = _by_squares(shrunk, mixed, cutoff)
        return Fit(weights, means[1] - means[0] @ weights if offset else None, rank)


def _by_values(matrix: Tensor, targets: Tensor, cutoff: float) -> tuple[Tensor, int]:
    """(n, d), (n, K) -> (d, K) and the number of singular values above the cutoff.

    A triangular solve where that is all of them for certain, otherwise a truncated singular value decomposition.
    """
    live = matrix.abs().amax(0) > 0
    found, count = matrix.new_zeros(matrix.shape[1], targets.shape[1]), int(live.sum())
    if count == 0:
        return found, 0
    triangle = torch.linalg.qr(torch.cat([matrix[:, live], targets], 1), mode="r").R[:count]
    design, right = triangle[:, :count], triangle[:, count:]
    if len(design) == count and _above(design, cutoff):
        found[live] = torch.linalg.solve_triangular(design, right, upper=True)
        return found, count
    left, values, directions = torch.linalg.svd(design, full_matrices=False)
    rank = int((values > cutoff).sum())
    found[live] = directions[:rank].T @ ((left[:, :rank].T @ right) / values[:rank, None])
    return found, rank


def _above(triangle: Tensor, cutoff: float) -> bool:
    """Whether 1 / |R^-1|_F, a lower bound of the least singular value, is above the cutoff."""
    if bool((triangle.diagonal() == 0).any()):
        return False
    inverse = torch.linalg.solve_triangular(triangle, torch.eye(len(triangle)).to(triangle), upper=True)
    size = float(inverse.norm())
    return math.isfinite(size) and size * cutoff < 1


def _by_squares(square: Tensor, mixed: Tensor, cutoff: float) -> tuple[Tensor, int]:
    """The same from A A' (d, d), A B' (d, K) and the square of the cutoff: Cholesky if possible,
    otherwise eigenvalues.
    """
    live = square.diagonal() > 0
    found, count = torch.zeros_like(mixed), int(live.sum())
    square, mixed = square[live][:, live], mixed[live]
    if count == 0:
        return found, 0
    factor, failed = torch.linalg.cholesky_ex(square, upper=True)
    if not int(failed) and _above(factor, math.sqrt(cutoff)):
        found[live] = torch.cholesky_solve(mixed, factor, upper=True)
        return found, count
    values, directions = torch.linalg.eigh(square)
    kept = values > cutoff
    found[live] = directions[:, kept] @ ((directions[:, kept].T @ mixed) / values[kept, None])
    return found, int(kept.sum())
