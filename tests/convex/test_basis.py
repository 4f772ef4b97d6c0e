"""The row space of the shifted features, from any blocks of rows, against singular values."""

import pytest
import torch
from hypothesis import given
from strategies import architectures, cases, normal, random_inputs, random_network

import meanfield as mf
from meanfield import limits
from meanfield.convex.basis import RANK_TOLERANCE, StackedRows, row_space, rows_of, stacked
from meanfield.folds import Fold


def space(rows, parts=1, tolerance=1e-10, runs=1):
    fold = Fold(runs, stacked)
    for run, some in enumerate(rows.chunk(runs)):
        stack = StackedRows(*some.shape)
        for part in some.chunk(parts):
            stack.add(part)
        fold.add((run, run + 1), stack.rows())
    return row_space(fold, tolerance, rows)


@given(cases(archs=architectures(depths=(2, 3))))
def test_the_row_space_of_every_layer_is_spanned(case):
    features = case.network.features(case.problem.inputs)
    for found, conv, below in zip(case.freeze.spaces, case.problem.architecture.layers[1:], features):
        A = rows_of(conv, below)
        singular = torch.linalg.svdvals(A)
        largest = singular[0].item()
        # singular values within a factor of two of the tolerance may fall on either side
        certain = [
            int((singular > factor * found.tolerance * largest).sum()) if largest > 0 else 0 for factor in (2.0, 0.5)
        ]
        assert certain[0] <= found.rank <= certain[1]
        eye = torch.eye(found.rank, dtype=torch.float64)
        torch.testing.assert_close(found.right.T @ found.right, eye, rtol=0, atol=1e-12)
        torch.testing.assert_close(A @ found.right @ found.right.T, A, rtol=0, atol=1e-9 * largest + 1e-300)


@pytest.mark.parametrize("bias", [False, True])
def test_rows_are_shifted_features_source_by_source_and_then_the_bias(bias):
    conv = mf.Conv((2, 3), (1, 0), (1, 2), bias=bias)
    features, kernels, constant = normal((3, 2, 4, 5), 0), normal((6, 2, 2, 3), 1), normal((6,), 2) if bias else None
    unknowns = torch.cat([kernels.flatten(1), constant[:, None]], 1) if bias else kernels.flatten(1)
    expected = conv.convolve(features, kernels, constant).movedim(1, 3).flatten(0, 2)
    torch.testing.assert_close(rows_of(conv, features) @ unknowns.T, expected)


@pytest.mark.parametrize("size", [1e-4, 1e-7, 1e-9])
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (300, 4)], ids=["wide", "tall", "compressed many times"])
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_small_singular_values_are_resolved(monkeypatch, size, shape, scale):
    """Prescribed singular values 1, size, 1e-13: no step of the way may square them and stop there."""
    monkeypatch.setattr(limits, "BLOCK_BYTES", 1)
    rows, columns = shape
    left, right = torch.linalg.qr(normal((rows, 3), 0))[0], torch.linalg.qr(normal((columns, 3), 1))[0]
    A = left * torch.tensor([1.0, size, 1e-13], dtype=torch.float64) @ right.T
    found = space(scale * A, parts=rows // 3)
    assert found.rank == 2
    torch.testing.assert_close(found.right.T @ found.right, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-13)
    # a line of A carries the second direction and at most 1e-13 of the third: it is turned by their ratio
    torch.testing.assert_close(
        found.right @ found.right.T, right[:, :2] @ right[:, :2].T, rtol=0, atol=1e-12 / size + 1e-13
    )


@pytest.mark.parametrize("parts", [1, 2, 50])
@pytest.mark.parametrize("rows", [10, 20, 21, 41, 400])
def test_the_blocks_of_rows_do_not_matter(monkeypatch, rows, parts):
    """20 columns, 15 of them independent; a buffer of 40 rows that is filled, and compressed, in any way."""
    monkeypatch.setattr(limits, "BLOCK_BYTES", 1)
    A = normal((rows, 15), 0) @ normal((15, 20), 1)
    found = space(A, parts)
    exact = torch.linalg.svd(A).Vh[: min(rows, 15)].T
    assert found.rank == exact.shape[1]
    torch.testing.assert_close(found.right @ found.right.T, exact @ exact.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rows", [torch.zeros(9, 3), torch.full((9, 3), torch.inf)], ids=["zeros", "overflow"])
def test_rows_that_say_nothing_span_nothing(rows):
    assert space(rows.double()).right.shape == (3, 0)


def test_a_single_precision_program_has_a_coarser_tolerance_and_the_row_space_of_its_exact_features():
    arch = mf.Architecture((2, 4, 4), (mf.Conv(2, activation="tanh"), mf.Conv(2, activation="tanh")))
    network, inputs = random_network(arch, (3, 2), 0), random_inputs(arch, 3, 0)
    exact = mf.ConvexProgram.freeze(mf.Problem(arch, inputs, [0.0, 1.0, 2.0]), network)
    single = mf.ConvexProgram.freeze(exact.problem.to(dtype=torch.float32), network.to(dtype=torch.float32))
    assert single.spaces[0].tolerance == RANK_TOLERANCE[torch.float32] == 1e-5
    assert single.spaces[0].right.dtype == torch.float64
    assert single.bases[0].dtype == single.coordinates[0].dtype == torch.float32
    projections = [each.spaces[0].right @ each.spaces[0].right.T for each in (exact, single)]
    torch.testing.assert_close(*projections, rtol=0, atol=1e-5)
