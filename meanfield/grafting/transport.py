"""Optimal transport between two sets of features: a partner for each, or a plan between their masses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SIMPLEX_PIVOTS = 10**8  # no limit in practice


def assignment(costs: Tensor) -> Tensor:
    """For every row of square costs its column, at the least sum, (C,) int64."""
    from scipy.optimize import linear_sum_assignment

    return torch.as_tensor(linear_sum_assignment(costs.cpu().numpy())[1], device=costs.device)


def plan(costs: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """A plan of least cost between masses of the rows (C,) and of the columns (C',), uniform where not given: (C, C').

    A vertex of the polytope, with at most C + C' - 1 entries that are not zero; between as many equal masses a
    permutation.
    """
    below = _uniform(costs, costs.shape[0]) if rows is None else rows
    above = _uniform(costs, costs.shape[1]) if columns is None else columns
    if costs.shape[0] == costs.shape[1] and is_uniform(below) and is_uniform(above):
        return torch.zeros_like(costs).scatter(1, assignment(costs)[:, None], 1 / len(costs))
    import ot  # takes seconds to import

    scaled = (costs / costs.max().clamp_min(torch.finfo(costs.dtype).tiny)).cpu().numpy()
    # both sums are one up to rounding, of which float32 masses have more than the solver takes
    first, second = ((each.double() / each.double().sum()).cpu().numpy() for each in (below, above))
    found: Any = ot.emd(first, second, scaled, numItermax=SIMPLEX_PIVOTS)
    return torch.as_tensor(found).to(costs)


def is_uniform(masses: Tensor) -> bool:
    """Up to rounding in their own dtype."""
    return float((masses * len(masses) - 1).abs().max()) <= 64 * torch.finfo(masses.dtype).eps


def _uniform(like: Tensor, count: int) -> Tensor:
    return like.new_full((count,), 1 / count)
