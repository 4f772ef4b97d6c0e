"""What is known of the spectrum of a symmetric operator from products with it: extreme eigenvalues, and the trace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from meanfield import limits
from meanfield.rates import Interval, mean
from meanfield.signatures import Count, Natural, Positive, checked
from meanfield.starts import normal
from meanfield.validation import Misuse

PRODUCTS = 30  # for a trace
STEPS = 200  # of Lanczos at most
CHECK = 5  # steps between looks at the residuals, for which the host waits


@runtime_checkable
class Operator(Protocol):
    """A symmetric linear map of vectors (D,), such as `hessian.Hessian`.

    size: D.  like: a tensor of the dtype and device of its vectors.
    """

    @property
    def size(self) -> int: ...
    @property
    def like(self) -> Tensor: ...
    def __call__(self, vector: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Eigenpair:
    """value: the Rayleigh quotient of a unit vector v (D,), float64; residual: |A v - value v|.

    The interval, value - residual to value + residual, holds an eigenvalue.
    """

    value: Interval
    vector: Tensor
    residual: float


@dataclass(frozen=True, eq=False)
class Extremes:
    """The largest eigenvalues in falling order, the smallest in rising order; products: that were spent.

    status: "converged", or "max_products": a residual is larger than asked.
    """

    largest: tuple[Eigenpair, ...]
    smallest: tuple[Eigenpair, ...]
    products: int
    status: str


@dataclass(frozen=True)
class Estimate(Interval):
    """An unbiased estimate with Student's 95% interval and its standard error."""

    error: float


@checked
def extremes(
    operator: Operator,
    generator: torch.Generator,
    largest: Natural = 1,
    smallest: Natural = 1,
    *,
    tolerance: Positive = 1e-4,
    products: Count = STEPS,
) -> Extremes:
    """Extreme eigenvalues (signed: the smallest may be negative), by Lanczos with full reorthogonalisation.

    largest, smallest: how many at each end, D at most together.
    tolerance: residuals are at most this share of the eigenvalue at the upper end, and of the largest size of any at
        the lower one.
    products: Lanczos steps at most; one product more for every pair gives the residual that is reported.

    A residual says that an eigenvalue is near, not that none lies beyond; from a Gaussian start the chance to miss by
    e (top - smallest) after k steps is at most 1.648 sqrt(D) exp(-(2k - 1) sqrt(e)) (Kuczynski, Wozniakowski 1992).  An
    eigenvalue that is repeated is found once.
    """
    if not 1 <= largest + smallest <= operator.size:
        raise Misuse("largest", largest, f"and smallest={smallest} must be 1 to {operator.size} eigenvalues together")
    basis, wanted = _Krylov(operator, generator, products), (largest, smallest)
    while basis.steps < basis.most and not basis.exhausted and not basis.converged(wanted, tolerance):
        basis.extend(CHECK)
    pairs = [_pair(operator, basis.combined(coordinates)) for coordinates in basis.vectors[:, basis.chosen(wanted)].T]
    allowed = _allowed([pair.value.value for pair in pairs], wanted, tolerance)
    met = all(pair.residual <= most for pair, most in zip(pairs, allowed))
    spent = basis.steps + len(pairs)
    return Extremes(tuple(pairs[:largest]), tuple(pairs[largest:]), spent, "converged" if met else "max_products")


def _allowed(values: Sequence[float], wanted: tuple[int, int], tolerance: float) -> list[float]:
    """The largest residual of each wanted value, largest first."""
    size = max(abs(value) for value in values)
    return [tolerance * abs(value) for value in values[: wanted[0]]] + [tolerance * size] * wanted[1]


def _pair(operator: Operator, vector: Tensor) -> Eigenpair:
    vector = vector / vector.norm()
    image = operator(vector).double()
    value = vector @ image
    middle, reach = (float(each) for each in torch.stack([value, (image - value * vector).norm()]).cpu())
    return Eigenpair(Interval(middle, middle - reach, middle + reach), vector, reach)


class _Krylov:
    """An orthonormal basis of the Krylov space of a Gaussian start, and the operator's tridiagonal matrix in it.

    space: the basis (k, D), in the operator's dtype; inner products and the vector at work are in float64.  values,
    vectors: eigenvalues, rising, and eigenvectors (k, k), in columns, of the tridiagonal matrix.
    """

    def __init__(self, operator: Operator, generator: torch.Generator, most: int) -> None:
        self.operator, self.most, self.steps, self.exhausted = operator, min(most, operator.size), 0, False
        start = normal((operator.size,), generator, operator.like).double()
        self.rows = (start / start.norm()).to(operator.like.dtype)[None]
        self.diagonal: list[Tensor] = []
        self.beside: list[Tensor] = []
        self.values, self.vectors, self.left = np.zeros(0), np.zeros((0, 0)), math.inf

    @property
    def space(self) -> Tensor:
        return self.rows[: len(self.values)]

    def extend(self, steps: int) -> None:
        first, self.steps = self.steps, min(self.steps + steps, self.most)
        self.rows = torch.cat([self.rows, self.rows.new_empty(self.steps - first, self.operator.size)])
        for step in range(first, self.steps):
            row = self.rows[step].double()
            image = self.operator(row).double()
            self.diagonal.append(row @ image)
            image = without(self.rows[: step + 1], without(self.rows[: step + 1], image))
            self.beside.append(image.norm())
            self.rows[step + 1] = image / self.beside[-1].clamp_min(torch.finfo(torch.float64).tiny)
        self._solve()

    def _solve(self) -> None:
        """The tridiagonal matrix's eigenvalues, up to the step at which the Krylov space was exhausted."""
        diagonal = torch.stack(self.diagonal).cpu().numpy()
        beside = torch.stack(self.beside).cpu().numpy()
        size = np.abs(diagonal) + beside
        spent = np.nonzero(beside <= len(size) * torch.finfo(self.rows.dtype).eps * size.max())[0]
        kept = int(spent[0]) + 1 if len(spent) else self.steps
        self.exhausted = bool(len(spent)) or self.steps == self.operator.size
        matrix = np.diag(diagonal[:kept]) + np.diag(beside[: kept - 1], 1) + np.diag(beside[: kept - 1], -1)
        self.values, self.vectors = np.linalg.eigh(matrix)
        self.left = float(beside[kept - 1])

    def chosen(self, wanted: tuple[int, int]) -> list[int]:
        """Places of the largest values, falling, and of the smallest, rising; the same twice in a space too small."""
        last = len(self.values) - 1
        return [max(last - rank, 0) for rank in range(wanted[0])] + [min(rank, last) for rank in range(wanted[1])]

    def converged(self, wanted: tuple[int, int], tolerance: float) -> bool:
        """By residuals |left s|, s the last entry of each vector, at half of what is allowed: rounding adds to them."""
        if len(self.values) < sum(wanted):
            return False
        chosen = self.chosen(wanted)
        residuals = np.abs(self.left * self.vectors[-1, chosen])
        return bool((residuals <= _allowed(list(self.values[chosen]), wanted, tolerance / 2)).all())

    def combined(self, coordinates: np.ndarray) -> Tensor:
        """The vector (D,) of coordinates in the basis."""
        weights = torch.as_tensor(coordinates, device=self.rows.device)
        return torch.cat([weights @ self.space[:, block].double() for block in _blocks(self.space)])


def without(rows: Tensor, vector: Tensor) -> Tensor:
    """A vector (D,) without its part in orthonormal rows (k, D)."""
    part = torch.stack([rows[:, block].double() @ vector[block] for block in _blocks(rows)]).sum(0)
    return torch.cat([vector[block] - part @ rows[:, block].double() for block in _blocks(rows)])


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Columns that fit into a block in float64."""
    return limits.blocks(rows.shape[1], 8 * len(rows))


@checked
def trace(operator: Operator, generator: torch.Generator, *, products: Count = PRODUCTS) -> Estimate:
    """The trace, by Hutch++ (Meyer, Musco, Musco, Woodruff 2021) with so many products.

    Half of them span a subspace Q in which much of the operator acts, and the other half estimates the trace of the
    rest by random signs: the standard error is that of these independent draws given Q, and so is the estimate
    unbiased.  Q is the Krylov space of Lanczos, whose products give the trace in Q as well (Chen, Hallman 2023); of a
    random sketch that would take as many again.  Where D <= products the trace is taken entry by entry, and is exact up
    to rounding.
    products: at least 4, or D.
    """
    if operator.size <= products:
        entries = torch.eye(operator.size, dtype=torch.float64, device=operator.like.device)
        exact = float(torch.stack([entry @ operator(entry).double() for entry in entries]).sum())
        return Estimate(exact, exact, exact, 0.0)
    if products < 4:
        raise Misuse("products", products, "leaves no two draws for a standard error: give at least 4")
    basis = _Krylov(operator, generator, products // 2)
    basis.extend(basis.most)
    draws = [_rest(operator, basis, generator) for _ in range(products - basis.most)]
    samples = torch.stack(draws).tolist()
    rest, inside = mean(samples), float(basis.values.sum())
    error = float(np.std(samples, ddof=1)) / math.sqrt(len(samples))
    return Estimate(inside + rest.value, inside + rest.low, inside + rest.high, error)


def _rest(operator: Operator, basis: _Krylov, generator: torch.Generator) -> Tensor:
    """g^T P A P g of random signs g, P the projection on what is orthogonal to the basis."""
    vector = without(basis.space, _signs(operator, generator))
    return vector @ operator(vector).double()


def _signs(operator: Operator, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, 2, (operator.size,), generator=generator, device=generator.device)
    return (2.0 * drawn - 1.0).to(device=operator.like.device, dtype=torch.float64)
