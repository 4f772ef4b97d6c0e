"""The response in its smallest form: no kernel's response moves by more than the rounding that is claimed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal, seeds

from meanfield.certificates.sphere import response
from meanfield.certificates.sphere.response import reduced


def whole(A, W, directions):
    return (directions @ A.T).relu() @ W


def crowded(count, dimension, rank, outputs, seed):
    """Rows of low rank, with copies, multiples of either sign, zero rows and zero weights."""
    A = normal((count, rank), seed) @ normal((rank, dimension), seed + 1)
    A = torch.cat([A, A[:1], 3 * A[:2], -0.5 * A[:2], torch.zeros(1, dimension)])
    W = normal((len(A), outputs), seed + 2)
    W[1] = 0
    return A, W


@given(st.integers(3, 8), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), seeds)
def test_every_kernel_has_the_response_of_its_coordinates(count, dimension, rank, outputs, seed):
    A, W = crowded(count, dimension, min(rank, dimension), outputs, seed)
    found = reduced(A, W)
    directions = normal((50, dimension), seed + 3)
    assert found.basis.shape[1] <= min(rank, dimension)
    eye = torch.eye(found.basis.shape[1], dtype=torch.float64)
    torch.testing.assert_close(found.basis.T @ found.basis, eye, rtol=0, atol=1e-12)
    missed = (found(directions @ found.basis) - whole(A, W, directions)).norm(dim=1) / directions.norm(dim=1)
    sizes = A.norm(dim=1) * W.norm(dim=1)
    terms = int((sizes > 0).sum()) + 8 * found.basis.shape[1] ** 2 + 64
    allowed = 8 * terms * torch.finfo(torch.float64).eps * outputs**0.5 * float(sizes.sum())
    assert float(missed.max()) <= 0.999 * allowed < found.rounding < 2 * allowed


@given(st.integers(3, 8), st.integers(2, 5), seeds)
def test_no_two_rows_are_parallel_and_all_are_unit(count, dimension, seed):
    found = reduced(*crowded(count, dimension, dimension, 1, seed))
    torch.testing.assert_close(found.rows.norm(dim=1), torch.ones(len(found.rows), dtype=torch.float64))
    cosines = (found.rows @ found.rows.T).abs().fill_diagonal_(0)
    assert float(cosines.max()) < 1 - 1e-12
    assert len(found.rows) <= count


def test_what_was_merged_enters_the_rounding():
    """Two rows of nearly one direction become one, which moves the response by more than the arithmetic does."""
    apart = 0.9 * response.SAME_DIRECTION
    A = torch.tensor([[1.0, -apart / 2], [0.0, 1.0], [1.0, apart / 2]], dtype=torch.float64)
    W = torch.tensor([[1e6], [1.0], [-1e6]], dtype=torch.float64)
    found = reduced(A, W)
    assert len(found.rows) == 2
    z = torch.tensor([[1e-3, -1.0], [-1e-3, 1.0]], dtype=torch.float64)  # on either side; one of them is off
    missed = float((found(z @ found.basis) - whole(A, W, z)).abs().max())
    assert missed == pytest.approx(1e6 * apart, rel=1e-3)
    arithmetic = 8 * (3 + 8 * 2**2 + 64) * torch.finfo(torch.float64).eps * float((A.norm(dim=1) * W.norm(dim=1)).sum())
    assert found.rounding - arithmetic == pytest.approx(2 * missed, rel=1e-3)


def test_what_lies_outside_given_coordinates_enters_the_rounding():
    A, W = torch.tensor([[1.0, 0.0, 1e-3], [0.0, 1.0, 0.0]]).double(), torch.tensor([[3.0], [1.0]]).double()
    assert reduced(A, W, torch.eye(3)[:, :2].double()).rounding == pytest.approx(2 * 3 * 1e-3, rel=1e-6)


@given(st.integers(3, 8), st.integers(2, 4), st.integers(1, 3), seeds)
def test_gradients_match_differences(count, dimension, outputs, seed):
    found = reduced(*crowded(count, dimension, dimension, outputs, seed))
    directions, weights = normal((6, found.basis.shape[1]), seed + 4), normal((6, outputs), seed + 5)
    step, moves = 1e-7, normal((6, found.basis.shape[1]), seed + 6)
    sides = [(found(directions + sign * step * moves) * weights).sum(1) for sign in (1, -1)]
    slopes = (found.gradient(directions, weights) * moves).sum(1)
    torch.testing.assert_close((sides[0] - sides[1]) / (2 * step), slopes, rtol=1e-5, atol=1e-5)


def test_chunks_change_nothing(monkeypatch):
    found = reduced(*crowded(6, 3, 3, 2, 0))
    directions, weights = normal((40, 3), 1), normal((40, 2), 2)
    before = found(directions), found.gradient(directions, weights)
    monkeypatch.setattr(response, "CHUNK", 3 * len(found.rows))
    after = found(directions), found.gradient(directions, weights)
    assert response.chunk(len(found.rows)) == 3
    for a, b in zip(before, after):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_unit_vectors():
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -1e-100]], dtype=torch.float64)
    torch.testing.assert_close(response.unit(vectors), torch.tensor([[0.6, 0.8], [1, 0], [0, -1]], dtype=torch.float64))


@pytest.mark.parametrize("outputs", [1, 2])
def test_the_ascent_finds_what_sampling_finds_and_says_where(outputs):
    found = reduced(normal((8, 3), 1), normal((8, outputs), 2))
    best, where = response.ascend(found, response.start_directions(found, normal((2, 3), 3)))
    sampled = found(response.unit(normal((20000, 3), 4))).norm(dim=1).max()
    assert best >= float(sampled)
    assert float(where.norm()) == pytest.approx(1)
    assert float(found(where[None]).norm()) == pytest.approx(best, rel=1e-12)
    candidates = response.unit(normal((5, 3), 5))
    value, at = response.improve(found, candidates)
    assert value == float(found(candidates).norm(dim=1).max())
    assert float(found(at[None]).norm()) == pytest.approx(value, rel=1e-12)
