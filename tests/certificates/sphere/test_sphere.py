import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import costly, normal, seeded, seeds

from meanfield.certificates.sphere import arrangement, branching, maximise

ROUNDING = 1e-10


def lengths(A, W, directions):
    return ((directions @ A.T).relu() @ W).norm(dim=1)


def unit(vectors):
    return torch.nn.functional.normalize(vectors, dim=-1)


def best_seen(A, W, count=20_000, seed=0):
    """Dense sampling, then random steps that shrink around the best ones."""
    directions = unit(normal((count, A.shape[1]), seed))
    random = seeded(seed + 1)
    for step in range(60):
        kept = directions[lengths(A, W, directions).topk(20).indices]
        noise = torch.randn(30, *kept.shape, generator=random, dtype=torch.float64)
        directions = torch.cat([kept, unit(kept + 0.7**step * noise).flatten(0, 1)])
    return float(lengths(A, W, directions).max())


def check(A, W, *, gap=None, **options):
    """The bounds enclose what sampling finds, and the lower one is attained."""
    found = maximise(A, W, **options)
    best = best_seen(A, W)
    assert found.upper >= best
    assert found.upper >= found.lower >= 0
    assert found.argmax.shape == (A.shape[1],)
    assert float(found.argmax.norm()) == pytest.approx(1)
    assert float(lengths(A, W, found.argmax[None])) == pytest.approx(found.lower, rel=1e-9, abs=1e-14)
    if gap is not None:
        assert found.upper <= found.lower * (1 + gap) + 1e-12
        assert found.lower >= best * (1 - max(gap, 1e-6))
    return found


@pytest.fixture
def by_branching(monkeypatch):
    """Branch and bound where the arrangement would be listed."""

    def run(A, W, **options):
        with monkeypatch.context() as patch:
            patch.setattr(arrangement, "MAX_PLANES", {})
            return maximise(A, W, **options)

    return run


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("weight", [2.0, -0.5])
def test_one_patch(dimension, weight):
    a = normal((1, dimension), dimension)
    found = maximise(a, torch.tensor([[weight]], dtype=torch.float64))
    assert found.lower == pytest.approx(abs(weight) * float(a.norm()), rel=1e-12)
    assert found.upper == pytest.approx(found.lower, rel=ROUNDING)
    torch.testing.assert_close(found.argmax, unit(a)[0])


@pytest.mark.parametrize("dimension", [2, 3, 6])
def test_opposite_patches_see_one_side_each(dimension):
    a = normal((1, dimension), 3)
    found = maximise(torch.cat([a, -a]), torch.tensor([[1.0], [-3.0]], dtype=torch.float64))
    assert found.lower == pytest.approx(3 * float(a.norm()), rel=1e-12)
    assert found.upper == pytest.approx(found.lower, rel=ROUNDING)


@pytest.mark.parametrize("dimension", [2, 3, 5, 8])
def test_opposite_patches_of_equal_and_opposite_weight_are_linear(dimension):
    """relu(a z) - relu(-a z) = a z."""
    A, w = normal((6, dimension), 4), normal((6, 1), 5)
    found = maximise(torch.cat([A, -A]), torch.cat([w, -w]))
    assert found.lower == pytest.approx(float((A.T @ w).norm()), rel=1e-12)
    assert found.upper == pytest.approx(found.lower, rel=ROUNDING)


@pytest.mark.parametrize("dimension", [1, 2, 3, 4])
def test_sum_of_absolute_values(dimension):
    """sum |z_i| over the unit sphere is sqrt(d); the negative sum has the same size."""
    eye = torch.eye(dimension, dtype=torch.float64)
    found = check(torch.cat([eye, -eye]), -torch.ones(2 * dimension, 1, dtype=torch.float64), gap=1e-8)
    assert found.lower == pytest.approx(math.sqrt(dimension), rel=1e-9)


@pytest.mark.parametrize("dimension", [2, 3, 4])
def test_concave_maximum_on_a_kink(dimension):
    """z_1 - 2 sum_{i > 1} |z_i| has its maximum 1 at a corner of the arrangement; its negative is made smaller."""
    eye = torch.eye(dimension, dtype=torch.float64)
    A = torch.cat([eye, -eye[:1], eye[1:], -eye[1:]])
    w = torch.cat([torch.tensor([50.0, -50.0]), *[torch.full((dimension - 1,), v) for v in (0.0, -2.0, -2.0)]]).double()
    order = torch.cat(
        [torch.tensor([0, dimension]), torch.arange(1, dimension), torch.arange(dimension + 1, 3 * dimension - 1)]
    )
    found = check(A[order], w[:, None], gap=1e-8)
    expected = math.sqrt(50**2 + 4 * (dimension - 1))  # of the negative: -50 z_1 + 2 sum |z_i|
    assert found.lower == pytest.approx(expected, rel=1e-9)


# --- against sampling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [1, 2, 3])
@given(st.integers(1, 12), seeds)
@costly(8)
def test_arrangement_is_exact(dimension, count, seed):
    found = check(normal((count, dimension), seed), normal((count, 1), seed + 1), gap=ROUNDING)
    assert found.method == "arrangement"


@pytest.mark.parametrize("dimension", [2, 3])
@given(st.integers(3, 8), seeds)
@costly(6)
def test_routes_agree(dimension, count, seed):
    A, W = normal((count, dimension), seed), normal((count, 1), seed + 1)
    exact = maximise(A, W)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrangement, "MAX_PLANES", {})
        bounded = maximise(A, W, max_seconds=3)
    assert bounded.method == "branch and bound"
    assert bounded.upper >= exact.lower
    assert exact.upper >= bounded.lower
    assert bounded.lower == pytest.approx(exact.lower, rel=1e-8)


@pytest.mark.parametrize(("dimension", "count"), [(4, 12), (5, 8), (6, 6)])
def test_branch_and_bound_converges(dimension, count):
    check(normal((count, dimension), 11), normal((count, 1), 12), gap=1e-3, tolerance=1e-3, max_seconds=20)


@pytest.mark.parametrize("outputs", [2, 3])
@pytest.mark.parametrize("dimension", [2, 3, 4])
def test_several_outputs(dimension, outputs):
    check(normal((10, dimension), 21), normal((10, outputs), 22), gap=1e-4, tolerance=1e-4, max_seconds=20)


@pytest.mark.parametrize("dimension", [4, 9])
def test_rows_that_nearly_cancel(dimension):
    """Pairs of close rows of opposite weight, some turned round: the bound stays valid and is far below the sum of
    sizes.
    """
    A = normal((150, dimension), 31)
    B = A + 0.05 * normal((150, dimension), 32)
    B[::3] *= -1
    A[::3] *= -1
    w = normal((150, 1), 33).abs() / 150
    W = torch.cat([w, -w])
    found = check(torch.cat([A, B]), W, max_seconds=1)
    assert found.upper < 0.1 * float((A.norm(dim=1) * w[:, 0]).sum())


@given(seeds, st.integers(2, 7), st.sampled_from([1, 2]))
@costly(8)
def test_interrupted_search_is_valid(seed, dimension, outputs):
    A, W = normal((60, dimension), seed), normal((60, outputs), seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrangement, "MAX_PLANES", {})
        check(A, W, max_seconds=1e-6)


def test_more_time_does_not_loosen():
    A, W = normal((40, 7), 41), normal((40, 1), 42)
    short, long = maximise(A, W, max_seconds=1e-6), maximise(A, W, max_seconds=0.7)
    assert long.upper < short.upper
    assert long.cells > short.cells


def test_open_cells_are_limited(monkeypatch):
    monkeypatch.setattr(branching, "MAX_OPEN", 100)
    found = check(normal((40, 7), 41), normal((40, 1), 42))
    assert found.cells < 1000


# --- degenerate rows --------------------------------------------------------------------------------------------------


def degenerate(dimension, seed):
    A = normal((4, dimension), seed)
    return torch.cat(
        [A, A[:2], 2 * A[1:3], -0.5 * A[:2], torch.zeros(2, dimension, dtype=torch.float64), A[:1] + 1e-14]
    )


@pytest.mark.parametrize("dimension", [1, 2, 3, 4])
def test_parallel_and_zero_rows(dimension):
    A = degenerate(dimension, 51)
    check(A, normal((len(A), 1), 52), gap=1e-6, tolerance=1e-6)


@pytest.mark.parametrize("dimension", [3, 4, 9])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_rank_deficient(dimension, rank):
    A = normal((10, rank), 53) @ normal((rank, dimension), 54)
    assert check(A, normal((10, 1), 55), gap=ROUNDING).method == "arrangement"


def test_integer_rows_share_many_planes_and_corners(by_branching):
    A = torch.cartesian_prod(*[torch.arange(-1, 3)] * 3).double()
    W = normal((len(A), 1), 56)
    exact = check(A, W, gap=ROUNDING)
    assert exact.method == "arrangement"
    bounded = by_branching(A, W)
    assert bounded.lower <= exact.upper
    assert exact.lower <= bounded.upper
    assert bounded.upper == pytest.approx(exact.upper, rel=1e-7)


def test_nearly_equal_planes_are_left_to_branch_and_bound():
    A = normal((6, 3), 57)
    A = torch.cat([A, A + 1e-9 * normal((6, 3), 58)])
    assert check(A, normal((12, 1), 59), gap=1e-6, tolerance=1e-7).method == "branch and bound"


@pytest.mark.parametrize(
    ("A", "W"),
    [
        (normal((5, 4), 60), torch.zeros(5, 1)),
        (torch.zeros(5, 4), torch.ones(5, 2)),
        (torch.zeros(0, 3), torch.zeros(0, 1)),
    ],
)
def test_nothing_to_see(A, W):
    found = maximise(A, W)
    assert (found.lower, found.upper) == (0, 0)
    assert float(found.argmax.norm()) == 1


def test_weights_that_cancel_exactly(by_branching):
    A, w = normal((5, 4), 61), normal((5, 1), 62)
    assert maximise(torch.cat([A, A]), torch.cat([w, -w])).upper < 1e-11
    assert by_branching(torch.cat([A, A])[:, :3], torch.cat([w, -w])).upper < 1e-11


# --- invariance -------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(2, 3), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
@costly(10)
def test_scaling_and_rotation(seed, dimension, size, weight):
    A, W = normal((7, dimension), seed), normal((7, 1), seed + 1)
    turn = torch.linalg.qr(normal((dimension, dimension), seed + 2)).Q
    found, moved = maximise(A, W), maximise(size * A @ turn, weight * W)
    assert moved.lower == pytest.approx(size * weight * found.lower, rel=1e-9)
    assert moved.upper == pytest.approx(size * weight * found.upper, rel=1e-9)


@given(seeds)
@costly(3)
def test_weight_may_move_between_row_and_weight(seed):
    """w relu(a z) = (w / c) relu(c a z)."""
    A, W = normal((6, 4), seed), normal((6, 1), seed + 1)
    factors = normal((6, 1), seed + 2).exp()
    first, second = (maximise(*pair, tolerance=1e-3) for pair in ((A, W), (factors * A, W / factors)))
    assert first.upper >= second.lower
    assert second.upper >= first.lower


# --- start and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
def test_start_is_tried(several):
    A, W = normal((300, 9), 71), normal((300, 1), 72)
    start = normal((3, 9) if several else (9,), 73)
    found = maximise(A, W, max_seconds=1e-6, start=start)
    assert found.lower >= float(lengths(A, W, unit(start).reshape(-1, 9)).max())


def test_single_precision_is_raised():
    A, W = normal((6, 3), 74).float(), normal((6, 1), 75).float()
    assert maximise(A, W).argmax.dtype == torch.float64
    assert maximise(A, W).lower == maximise(A.double(), W.double()).lower


GOOD = {"A": normal((4, 3), 81), "W": normal((4, 1), 82)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"A": [[1.0]]}, TypeError, "A must be a torch.Tensor"),
        ({"A": torch.ones(4)}, ValueError, r"A has shape \(4,\); expected \(n, d\)"),
        ({"A": torch.ones(4, 0)}, ValueError, "at least one column"),
        ({"W": torch.ones(5, 1)}, ValueError, r"W has shape \(5, 1\); expected \(4, 1\)"),
        ({"W": torch.full((4, 1), math.nan)}, ValueError, "W.* is nan"),
        ({"start": torch.ones(2)}, ValueError, r"start has shape"),
        ({"start": "none"}, TypeError, "start must be"),
        ({"max_seconds": 0}, ValueError, "max_seconds"),
        ({"tolerance": -1}, ValueError, "tolerance"),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arguments = GOOD | change
    with pytest.raises(error, match=words):
        maximise(arguments.pop("A"), arguments.pop("W"), **arguments)
