"""Rows moved into the bounds along their linear constraints."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import NORMS, normal, seeds

import meanfield as mf
from meanfield.convex.restoration import ROUNDINGS, BoundedRows, into_bounds, least_weighted, towards

ROUNDING = ROUNDINGS * torch.finfo(torch.float64).eps
SHAPE, RANK, ROWS = (5, 1, 2), 4, 6


def instance(seed, norm, bias, dead=False):
    """Bounds of five sources of uneven weight, a basis of rank 4, and rows inside by a fifth, whose excess is -0.2."""
    scale = (0.1 + normal((5,), seed).abs()).clamp_max(1).repeat_interleave(2)
    if dead:
        scale[:2] = 0
    scale = torch.cat([scale, scale.new_ones(1)]) if bias else scale
    bounds = BoundedRows(mf.Penalty(kernel_norm=norm), SHAPE, scale, bias)
    right = torch.linalg.qr(normal((len(scale), RANK), seed + 1)).Q
    inner = normal((ROWS, len(scale)), seed + 2) * (scale > 0)
    inner = 0.8 * inner / (1 + bounds.excess(inner))[:, None]
    return bounds, right, least_weighted(right, scale), inner


def outside(bounds, right, solve, inner, seed, size):
    """Rows of the same coordinates as `inner`, `size` beyond it in random directions of the null space."""
    step = normal(inner.shape, seed + 3) * (bounds.scale > 0)
    for _ in range(3):
        step = step - solve(step @ right)
    return inner + size * step


@given(seeds, st.sampled_from(NORMS), st.booleans(), st.booleans())
def test_the_nearest_row_is_the_projection_in_the_weighted_metric(seed, norm, bias, dead):
    """No point inside lies on the far side: <x - y, z - y> <= 0 in the metric, for y nearest to x and any z inside."""
    bounds, _, _, inner = instance(seed, norm, bias, dead)
    x = 3 * normal(inner.shape, seed + 4) * (bounds.scale > 0)
    y = bounds.nearest(x)
    assert bounds.excess(y).max() <= ROUNDING
    weight = torch.where(bounds.scale > 0, bounds.scale, 1.0).square()
    for z in (inner, inner.flip(0), -inner, torch.zeros_like(inner)):
        assert ((x - y) * (z - y) / weight).sum(1).max() <= 1e-12 * (1 + bounds.square(x).max())
    torch.testing.assert_close(bounds.nearest(inner), inner, rtol=0, atol=0)


@given(seeds, st.sampled_from(NORMS), st.booleans(), st.booleans(), st.sampled_from([1e-8, 1e-4, 1e-2]))
def test_rows_end_inside_with_their_coordinates_and_no_farther_from_what_is_inside(seed, norm, bias, dead, size):
    bounds, right, solve, inner = instance(seed, norm, bias, dead)
    # a row just inside, on the way out from `inner`, so that small sizes cross the bound as well
    edge = inner + (outside(bounds, right, solve, inner, seed, 10.0) - inner)
    low, high = torch.zeros(ROWS, 1).double(), torch.ones(ROWS, 1).double()
    for _ in range(60):
        middle = (low + high) / 2
        over = (bounds.excess(inner + middle * (edge - inner)) > 0)[:, None]
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    rows = inner + (low + size * (1 - low)) * (edge - inner)
    assert bounds.excess(rows).min() > 0
    found = into_bounds(rows, right, solve, bounds)
    assert bounds.excess(found).max() <= ROUNDING
    torch.testing.assert_close(found @ right, rows @ right, rtol=1e-10, atol=1e-10)
    assert not found[:, bounds.scale == 0].any()
    before, after = bounds.square(rows - inner), bounds.square(found - inner)
    assert (after <= before * (1 + 1e-9)).all()


def test_one_active_bound_is_met_by_newtons_method(monkeypatch):
    """The l2 norm of few atoms is smooth: an excess of 1e-3 falls below 1e-4, 1e-6, ... in as many steps."""
    bounds, right, solve, inner = instance(0, "l2", False)
    rows = inner + 0.3 * (outside(bounds, right, solve, inner, 0, 1.0) - inner)
    found = []
    for steps in range(1, 7):
        monkeypatch.setattr("meanfield.convex.restoration.STEPS", steps)
        found.append(bounds.excess(into_bounds(rows, right, solve, bounds)).max().item())
    assert found[-1] <= ROUNDING
    assert sum(excess > ROUNDING for excess in found) <= 5


def test_rows_that_their_constraints_fix_stay():
    """As many constraints as columns: nothing can move, and nothing is spoilt by dividing by a null projection."""
    bounds = BoundedRows(mf.Penalty(), SHAPE, torch.ones(10, dtype=torch.float64), False)
    right = torch.linalg.qr(normal((10, 10), 1)).Q
    rows = normal((3, 10), 2)
    assert bounds.excess(rows).min() > 0
    torch.testing.assert_close(
        into_bounds(rows, right, least_weighted(right, bounds.scale), bounds), rows, rtol=0, atol=0
    )


@pytest.mark.parametrize("norm", NORMS)
def test_the_least_share_of_an_anchor(norm):
    """Proportional rows: the excess is linear along the way, so that the least share ends on the bound itself."""
    bounds = BoundedRows(mf.Penalty(kernel_norm=norm), SHAPE, torch.ones(10, dtype=torch.float64), False)
    unit = normal((4, 10), 5)
    unit = unit / (1 + bounds.excess(unit))[:, None]
    factors = torch.tensor([1.5, 1.001, 0.7, 1.2], dtype=torch.float64)[:, None]
    slack = torch.tensor([0.5, 0.9, 0.5, 1.0], dtype=torch.float64)[:, None]
    found = towards(factors * unit, slack * unit, bounds)
    torch.testing.assert_close(1 + bounds.excess(found), torch.tensor([1.0, 1.0, 0.7, 1.0]).double())
    torch.testing.assert_close(found[3], unit[3])
