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
    below, above = (
        _uniform(costs, size) if m is None else m.to(costs) for m, size in zip((rows, columns), costs.shape)
    )
    if costs.shape[0] == costs.shape[1] and is_uniform(below) and is_uniform(above):
        found = torch.zeros_like(costs)
        return found.scatter(1, assignment(costs)[:, None], 1 / len(costs))
    import ot  # takes seconds to import

    scaled = (costs / costs.max().clamp_min(torch.finfo(costs.dtype).tiny)).cpu().numpy()
    # both sums are one up to rounding, of which float32 masses have more than the solver takes
    first, second = ((each.double() / each.double().sum()).cpu().numpy() for each in (below, above))
    found_: Any = ot.emd(first, second, scaled, numItermax=SIMPLEX_PIVOTS)
    return torch.as_tensor(found_).to(costs)


def is_uniform(masses: Tensor) -> bool:
    """Up to rounding."""
    return float((masses * len(masses) - 1).abs().max()) <= 64 * torch.finfo(masses.dtype).eps


def _uniform(like: Tensor, count: int) -> Tensor:
    return like.new_full((count,), 1 / count)
