"""Least squares from second moments, against numpy on all samples at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from strategies import normal

from meanfield.grafting.least_squares import Products, Triangle, error, moments

CPU = torch.device("cpu")
both_kinds = pytest.mark.parametrize("kind", [Triangle, Products])


def seen(kind, a, b):
    found = kind(len(a), len(b), CPU)
    found.add(a, b)
    return found


@both_kinds
@pytest.mark.parametrize("sizes", [(1,) * 9, (200,), (3, 150, 7, 40)])
def test_pieces_of_any_size_give_one_answer(kind, sizes):
    a, b = normal((6, sum(sizes)), 1) + 3, normal((2, sum(sizes)), 2)
    moments = kind(6, 2, CPU)
    for x, y in zip(a.split(sizes, 1), b.split(sizes, 1)):
        moments.add(x, y)
        count = moments.samples  # a question in between must not disturb what follows
        assert moments.residual(torch.zeros(6, 2), None) == pytest.approx(float(b[:, :count].square().sum()))
    assert moments.samples == sum(sizes)
    assert moments.total == pytest.approx(float((b - b.mean(1, keepdim=True)).square().sum()))
    for offset in (True, False):
        fit = moments.solve(0.0, 1e-12 if kind is Triangle else 1e-8, offset=offset)
        design = np.concatenate([np.ones((len(a.T), 1)), a.T], 1) if offset else a.T.numpy()
        weights = np.linalg.lstsq(design, b.T.numpy(), rcond=None)[0]
        np.testing.assert_allclose(fit.weights, weights[1:] if offset else weights, atol=1e-9)
        missed = float(((design @ weights - b.T.numpy()) ** 2).sum())
        assert moments.residual(fit.weights, fit.offset) == pytest.approx(missed, rel=1e-9, abs=1e-9)


def test_small_variations_on_a_large_mean_are_fitted_in_float32():
    a = (1 + 1e-4 * normal((200, 1000), 0)).float()
    b = a.double().T.mm(normal((200, 2), 1)).T
    moments = Products(200, 2, CPU)
    moments.add(a, b)
    fit = moments.solve(0.0, torch.finfo(torch.float32).eps, offset=True)
    assert fit.rank == 200
    assert moments.residual(fit.weights, fit.offset) < 1e-6 * moments.total


@both_kinds
@pytest.mark.parametrize("offset", [True, False])
def test_a_ridge_is_added_to_the_mean_square(kind, offset):
    """(A A' / n + ridge) W = A B' / n minimises |W' a + o - b|^2 / n + ridge |W|^2, centred where o is free."""
    a, b, ridge = normal((5, 300), 1) + 1, normal((2, 300), 2) + 3, 0.7
    fit = seen(kind, a, b).solve(ridge, 1e-8, offset=offset)
    x, y = (a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)) if offset else (a, b)
    expected = torch.linalg.solve(x @ x.T / 300 + ridge * torch.eye(5, dtype=torch.float64), x @ y.T / 300)
    torch.testing.assert_close(fit.weights, expected, rtol=1e-10, atol=1e-12)
    if offset:
        torch.testing.assert_close(fit.offset, b.mean(1) - expected.T @ a.mean(1), rtol=1e-10, atol=1e-12)
    else:
        assert fit.offset is None
    assert fit.rank == 5


@both_kinds
@pytest.mark.parametrize("offset", [True, False])
def test_undetermined_weights_are_of_least_norm(kind, offset):
    """Rank 3 of 6: a dead feature, one that is twice another, and two that add up to a third."""
    a, b = normal((6, 200), 1), normal((2, 200), 2)
    a[4], a[1], a[5] = 0, 2 * a[0], a[2] + a[3]
    fit = seen(kind, a, b).solve(0.0, 1e-12 if kind is Triangle else 1e-7, offset=offset)
    x, y = (a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)) if offset else (a, b)
    torch.testing.assert_close(fit.weights, torch.linalg.pinv(x.T, rtol=1e-10) @ y.T, rtol=1e-9, atol=1e-9)
    assert fit.rank == 3
    assert not fit.weights[4].any()


@both_kinds
def test_a_constant_feature_counts_only_without_an_offset(kind):
    a, b = normal((3, 100), 1), normal((1, 100), 2)
    a[1] = 4.0
    found = seen(kind, a, b)
    assert [found.solve(0.0, 1e-7, offset=offset).rank for offset in (True, False)] == [2, 3]
    assert float(found.solve(0.0, 1e-7, offset=True).weights[1].abs().max()) < 1e-12


@both_kinds
def test_views_of_more_dimensions_are_flattened(kind):
    a, b = normal((2, 3, 4, 5, 6), 1), normal((2, 4, 5, 6), 2)
    viewed = kind(6, 2, CPU)
    viewed.add(a, b)
    flat = seen(kind, a.reshape(6, 120), b.reshape(2, 120))
    assert torch.equal(viewed.solve(0.0, 1e-8, offset=True).weights, flat.solve(0.0, 1e-8, offset=True).weights)
    assert viewed.samples == 120


@both_kinds
def test_the_total_of_constant_targets_is_zero_and_the_relative_error_undefined(kind):
    a, b = normal((2, 50), 1), torch.full((1, 50), 0.1, dtype=torch.float64)
    found = seen(kind, a, b)
    assert found.total == 0
    assert math.isnan(error(found, torch.zeros(2, 1), torch.zeros(1)))
    varied = seen(kind, a, normal((1, 50), 3))
    weights, offset = normal((2, 1), 4), normal((1,), 5)
    missed = weights.T @ a + offset[:, None] - normal((1, 50), 3)
    spread = normal((1, 50), 3) - normal((1, 50), 3).mean()
    expected = float(missed.square().sum() / spread.square().sum())
    assert error(varied, weights, offset) == pytest.approx(expected, rel=1e-10)


def test_the_kind_fits_the_dtype():
    assert isinstance(moments(2, 1, torch.zeros(1, dtype=torch.float64)), Triangle)
    assert isinstance(moments(2, 1, torch.zeros(1)), Products)
