"""What is known of the spectrum of a symmetric operator from products with it: extreme eigenvalues, and the trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    basis, wanted = _Krylov(operator, generator, min(products, operator.size)), (largest, smallest)
    while basis.steps < basis.most and not basis.exhausted and not basis.converged(wanted, tolerance):
        basis.extend(min(CHECK, basis.most - basis.steps))
    chosen = basis.chosen(wanted)
    pairs = [_pair(operator, basis.combined(coordinates)) for coordinates in basis.vectors[:, chosen].T]
    met = all(
        pair.residual <= bound for pair, bound in zip(pairs, _allowed([pair.value.value for pair in pairs], wanted, tolerance))
    )
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

    Rows are kept in the operator's dtype; inner products and the vector at work are in float64.
    """

    def __init__(self, operator: Operator, generator: torch.Generator, most: int) -> None:
        self.operator, self.most, self.steps = operator, most, 0
        self.rows = operator.like.new_empty(most + 1, operator.size)
        start = normal((operator.size,), generator, operator.like).double()
        self.rows[0] = start / start.norm()
        self.diagonal: list[Tensor] = []
        self.beside: list[Tensor] = []
        self.exhausted = False
        self.values, self.vectors, self.left = np.zeros(0), np.zeros((0, 0)), math.inf

    def extend(self, steps: int) -> None:
        for _ in range(steps):
            row = self.rows[len(self.diagonal)].double()
            image = self.operator(row).double()
            self.diagonal.append(row @ image)
            image = self._without(self._without(image))
            self.beside.append(image.norm())
            self.rows[len(self.diagonal)] = image / self.beside[-1].clamp_min(torch.finfo(torch.float64).tiny)
        self._solve()

    def _without(self, vector: Tensor) -> Tensor:
        """A vector without its part in the rows so far."""
        rows = self.rows[: len(self.diagonal)]
        blocks = list(limits.blocks(self.operator.size, 8 * len(rows)))
        part = torch.stack([rows[:, block].double() @ vector[block] for block in blocks]).sum(0)
        return torch.cat([vector[block] - part @ rows[:, block].double() for block in blocks])

    def _solve(self) -> None:
        """The tridiagonal matrix's eigenvalues, up to the step at which the Krylov space was exhausted."""
        diagonal = torch.stack(self.diagonal).cpu().numpy()
        beside = torch.stack(self.beside).cpu().numpy()
        size = np.abs(diagonal) + beside
        spent = np.nonzero(beside <= len(size) * torch.finfo(self.rows.dtype).eps * size.max())[0]
        self.steps = len(size)
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
        """By the residuals |left s|, s the last entry of each vector, half of what is allowed: rounding adds to them."""
        if len(self.values) < sum(wanted):
            return False
        chosen = self.chosen(wanted)
        residuals = np.abs(self.left * self.vectors[-1, chosen])
        return bool((residuals <= _allowed(list(self.values[chosen]), wanted, tolerance / 2)).all())

    def combined(self, coordinates: np.ndarray) -> Tensor:
        """The vector (D,) of coordinates in the basis."""
        weights = torch.as_tensor(coordinates, device=self.rows.device)
        rows = self.rows[: len(weights)]
        return torch.cat([weights @ rows[:, block].double() for block in limits.blocks(rows.shape[1], 8 * len(rows))])


@checked
def trace(operator: Operator, generator: torch.Generator, *, products: Count = PRODUCTS) -> Estimate:
    """The trace, by Hutch++ (Meyer, Musco, Musco, Woodruff 2021) with so many products.

    A third of them finds a subspace Q in which much of the operator acts, a third gives its trace in there exactly, and
    a third estimates the trace of the rest by random signs: the standard error is that of these independent draws,
    given Q, and the estimate is unbiased given Q.  Where D <= products the trace is taken entry by entry, and is exact
    up to rounding.
    products: at least 6, or D.
    """
    if operator.size <= products:
        entries = torch.eye(operator.size, dtype=torch.float64, device=operator.like.device)
        exact = float(torch.stack([entry @ operator(entry).double() for entry in entries]).sum())
        return Estimate(exact, exact, exact, 0.0)
    if products < 6:
        raise Misuse("products", products, "leaves no two draws for a standard error: give at least 6")
    third = products // 3
    images = torch.stack([operator(_signs(operator, generator)).double() for _ in range(third)], 1)
    found = torch.linalg.qr(images).Q
    inside = torch.stack([row @ operator(row).double() for row in found.T]).sum()
    draws = torch.stack([_rest(operator, found, generator) for _ in range(products - 2 * third)])
    rest = mean([float(each) for each in draws.cpu()])
    error = float(draws.std() / math.sqrt(len(draws)))
    shift = float(inside)
    return Estimate(shift + rest.value, shift + rest.low, shift + rest.high, error)


def _rest(operator: Operator, found: Tensor, generator: torch.Generator) -> Tensor:
    """g^T P A P g of random signs g, P the projection on what is orthogonal to the columns of `found`."""
    vector = _signs(operator, generator)
    vector = vector - found @ (found.T @ vector)
    return vector @ operator(vector).double()


def _signs(operator: Operator, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, 2, (operator.size,), generator=generator, device=generator.device)
    return (2.0 * drawn - 1.0).to(device=operator.like.device, dtype=torch.float64)
