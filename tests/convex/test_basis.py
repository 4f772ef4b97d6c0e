"""The design matrix in blocks, and the basis of its row space against singular values."""

import pytest
import torch
from hypothesis import given
from strategies import architectures, cases, normal, random_inputs

import meanfield as mf
from meanfield.convex import basis
from meanfield.convex.basis import Design

deep = architectures(depths=(2, 3))


def designs(case):
    return [case.freeze.design(layer) for layer in range(1, case.freeze.depth)]


@given(cases(archs=deep))
def test_basis_spans_the_row_space_and_its_preimage_maps_to_it(case):
    for design in designs(case):
        A, found = design.rows(), design.basis()
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
        least = singular[found.rank - 1].item() if found.rank else 1.0
        torch.testing.assert_close(A.T @ found.preimage, found.right, rtol=0, atol=1e-13 * max(1.0, largest / least))


@pytest.mark.parametrize("entries", [1, 100, 2**22])
@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (2, 9, 3, 4)])  # a tall and a wide matrix
@pytest.mark.parametrize("bias", [False, True])
def test_products_in_blocks_are_those_of_the_matrix(monkeypatch, shape, bias, entries):
    monkeypatch.setattr(basis, "BLOCK_ENTRIES", entries)
    design = Design(mf.Conv((2, 3), (1, 0), (1, 2), bias=bias), normal(shape, 0))
    A = design.rows()
    assert A.shape == design.shape
    wide = A.shape[0] <= A.shape[1]
    torch.testing.assert_close(design.gram(), A @ A.T if wide else A.T @ A)
    for chosen in ([2, 0, 5], []):
        torch.testing.assert_close(
            design.lines(torch.tensor(chosen).long()), A[chosen].T if wide else A[:, chosen], rtol=0, atol=0
        )
    torch.testing.assert_close(design.apply_adjoint(normal((A.shape[0], 3), 2)), A.T @ normal((A.shape[0], 3), 2))


@pytest.mark.parametrize("size", [1e-4, 1e-7, 1e-9])
@pytest.mark.parametrize("tall", [False, True])
def test_small_singular_values_are_resolved_although_the_gram_matrix_squares_them(size, tall):
    """A 1 x 1 convolution of one position is the matrix itself: prescribed singular values 1, size, 1e-13."""
    rows, columns = (7, 4) if tall else (4, 7)
    left, right = torch.linalg.qr(normal((rows, 3), 0))[0], torch.linalg.qr(normal((columns, 3), 1))[0]
    A = left * torch.tensor([1.0, size, 1e-13], dtype=torch.float64) @ right.T
    found = Design(mf.Conv(1), A[:, :, None, None]).basis()
    assert found.rank == 2
    torch.testing.assert_close(found.right.T @ found.right, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-13)
    # a line of A carries the second direction and at most 1e-13 of the third: it is turned by their ratio
    torch.testing.assert_close(
        found.right @ found.right.T, right[:, :2] @ right[:, :2].T, rtol=0, atol=1e-12 / size + 1e-13
    )
    torch.testing.assert_close(A.T @ found.preimage, found.right, rtol=0, atol=1e-15 / size + 1e-13)


def test_single_precision_keeps_its_dtype_and_has_a_coarser_tolerance():
    inputs = random_inputs(mf.Architecture((2, 3, 3), (mf.Conv(2),)), 3, 0, torch.float32)
    found = Design(mf.Conv(2), inputs).basis()
    assert found.right.dtype == found.preimage.dtype == torch.float32
    assert found.tolerance == 1e-5
    torch.testing.assert_close(found.right.T @ found.right, torch.eye(found.rank), rtol=0, atol=1e-5)
