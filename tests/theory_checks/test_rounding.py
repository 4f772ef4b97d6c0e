"""Differences in units of rounding."""

import math

import torch

from theory_checks.rounding import in_units


def test_nothing_differs_where_nothing_is_allowed_and_nothing_is_there():
    """A network whose last layer sees padding alone: 0 / 0 ended two full claims as NaN."""
    zero, one = torch.zeros(3), torch.ones(3)
    assert in_units(zero, zero) == 0
    assert in_units(torch.tensor([0.0, -0.5, 0.25]), one) == 0.5
    assert in_units(one, zero) == math.inf
    assert math.isnan(in_units(torch.tensor([0.0, math.nan]), torch.ones(2)))
