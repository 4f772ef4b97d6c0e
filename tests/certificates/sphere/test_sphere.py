import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from responses import best_seen, cancelling, crossing_planes, lengths, unit
from strategies import costly, normal, seeds

from meanfield.certificates import sphere
from meanfield.certificates.sphere import arrangement, maximise
from meanfield.certificates.sphere.arrangement import maximise_arrangement
from meanfield.certificates.sphere.response import Found, Response
from meanfield.convex import patterns

ROUNDING = 1e-10


def at_corners(A, W):
    """The largest response where two planes meet, beside it, and on the way up from there by gradients."""
    first, second = torch.triu_indices(len(A), len(A), 1)
    corners = torch.linalg.cross(A[first], A[second]) if A.shape[1] == 3 else torch.stack([-A[:, 1], A[:, 0]], 1)
    corners = unit(torch.cat([corners, -corners]))
    points = torch.cat([unit(corners + 10.0**-k * normal(corners.shape, k)) for k in (2, 5, 8, 12)] + [corners])
    best = lengths(A, W, points).max()
    for _ in range(10):
        values = points @ A.T
        points = unit(((values > 0) * W[:, 0]) @ A * (values.clamp_min(0) @ W).sign())
        best = torch.maximum(best, lengths(A, W, points).max())
    return float(best)


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


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize(
    "kind", ["general", "integer", "nearly integer", "nearly equal", "through one line", "bytes", "of many lengths"]
)
@given(seeds, st.sampled_from(["random", "one size", "opposite", "residual"]), st.sampled_from([1.0, 1e-60, 1e60]))
@costly(8)
def test_no_direction_exceeds_the_listed_maximum(kind, dimension, seed, weights, size):
    A, W = cancelling(crossing_planes(kind, dimension, seed), weights, seed)
    best = size * max(best_seen(A, W, 2_000), at_corners(A, W))
    listed, found = (maximise(size * A, W, tolerance=tolerance) for tolerance in (1e30, 1e-9))
    assert listed.method == "arrangement"
    for each in (listed, found):
        assert each.upper >= best
        assert each.upper >= each.lower
    rounding = 1e-12 * size * float(A.norm(dim=1) @ W[:, 0].abs())
    assert found.lower >= best * (1 - 1e-6) - rounding
    assert found.upper <= found.lower * (1 + 2e-9) + rounding


def listed(rows, weights, linear=None):
    """The arrangement's answer for unit rows as they are, not merged, without the slack for rounding."""
    rows, weights = torch.tensor(rows, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)[:, None]
    linear = torch.tensor([0.0] * rows.shape[1] if linear is None else linear, dtype=torch.float64)[:, None]
    return maximise_arrangement(Response(rows, weights, linear, torch.eye(rows.shape[1]).double(), 0.0))


def at(angle):
    return [math.cos(angle), math.sin(angle)]


def test_opposite_rows_of_one_plane():
    found = listed([at(0.3), at(0.3 + math.pi + 1e-12)], [1.0, 3.0])
    assert found.lower == pytest.approx(3)
    assert found.upper == pytest.approx(3, rel=1e-11)
    assert found.argmax.tolist() == pytest.approx(at(0.3 + math.pi))


def test_planes_that_count_as_one_enter_the_bound(monkeypatch):
    """|b z| / 100 + relu(c z) with its top between the kinks of b and of an idle a, which count as one."""
    right = math.pi / 2
    monkeypatch.setattr(patterns, "TOLERANCE", 0.1)
    found = listed([at(right), at(right + 0.08), at(right + 0.08 + math.pi), at(0.04)], [1e-9, 0.01, 0.01, 1.0])
    assert found.upper >= 1 + 0.01 * math.sin(0.04)
    assert found.upper == pytest.approx(1, abs=0.02 * 0.08 + 0.001)


def test_dropped_pieces_enter_the_bound(monkeypatch):
    """2 relu(z_3) - |z_1| - |z_2| has its maximum 2 where two planes meet, among four idle planes within 0.002."""
    slanted = [[math.cos(t), math.sin(t), 0.001 * s] for t, s in zip((0.5, 1.0, 2.1, 2.6), (1, -1, 1, -1))]
    rows = torch.cat([torch.eye(3), -torch.eye(3)[:2], torch.nn.functional.normalize(torch.tensor(slanted), dim=1)])
    monkeypatch.setattr(patterns, "TOLERANCE", 0.01)
    found = listed(rows.tolist(), [-1.0, -1.0, 2.0, -1.0, -1.0, 1e-9, 1e-9, 1e-9, 1e-9])
    assert found.lower < 1.9995
    assert 2 <= found.upper < 2.05


def corner(count, width, seed):
    """m relu(z_3) - sum of m values |a_i z| / 2: the maximum is a corner, among m that are about `width` apart."""
    turns = math.pi * torch.linspace(0, 1, count + 1, dtype=torch.float64)[1:] + seed
    planes = torch.stack([turns.cos(), turns.sin(), width * normal((count,), seed)], 1)
    A = torch.cat([torch.eye(3, dtype=torch.float64)[2:], planes, -planes])
    return A, torch.cat([torch.tensor([float(count)]), torch.full((2 * count,), -0.5)]).double()[:, None]


@pytest.mark.parametrize("tolerance", [0.003, 0.03, 0.1])
def test_what_the_arrangement_leaves_out_enters_the_bound(tolerance, monkeypatch):
    """With so large a tolerance pieces are dropped where the maximum lies."""
    instances = [corner(3 + seed % 6, width, seed) for seed in range(12) for width in (0.01, 0.03)]
    best = [max(maximise(A, W).lower, at_corners(A, W)) for A, W in instances]
    monkeypatch.setattr(patterns, "TOLERANCE", tolerance)
    for (A, W), least in zip(instances, best):
        assert maximise(A, W, tolerance=1e30).upper >= least


def test_branch_and_bound_goes_on_where_the_arrangement_leaves_too_much_open(monkeypatch):
    A, W = corner(5, 0.01, 0)
    exact = maximise(A, W)
    assert exact.method == "arrangement"
    monkeypatch.setattr(patterns, "TOLERANCE", 0.003)
    coarse = maximise(A, W, tolerance=1e30)
    assert coarse.upper > exact.upper * (1 + 1e-6)
    assert maximise(A, W, tolerance=coarse.upper / coarse.lower - 1).method == "arrangement"
    finer = maximise(A, W)
    assert finer.method == "branch and bound"
    assert exact.upper * (1 - 1e-12) <= finer.upper <= exact.upper * (1 + 2e-9)
    vague = Found(0.5, math.inf, exact.argmax, "branch and bound", 1)
    monkeypatch.setattr(sphere, "maximise_branching", lambda *_: vague)
    assert maximise(A, W).upper == coarse.upper


@pytest.mark.parametrize("angle", [1e-2, 1e-8])
def test_nearly_equal_planes_leave_chords_of_cells_unlisted(angle):
    """(n / 2) pi ROW_ROUNDING / sin(least angle)."""
    rows = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [*at(angle), 0]], dtype=torch.float64)
    found = patterns.arrangement(rows)
    expected = 2 * math.pi * arrangement.ROW_ROUNDING / math.sin(angle)
    assert arrangement._unlisted(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("angle", "method"), [(1e-7, "arrangement"), (1e-10, "branch and bound")])
def test_how_equal_planes_may_be(angle, method):
    A = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [*at(angle), 0]], dtype=torch.float64)
    found = maximise(A, torch.ones(4, 1, dtype=torch.float64))
    assert found.method == method
    assert found.upper >= float(A.sum(0).norm())
    assert found.upper == pytest.approx(float(A.sum(0).norm()), rel=2e-9)


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
    monkeypatch.setattr("meanfield.certificates.sphere.branching.room", lambda _: 100)
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


@pytest.mark.parametrize(("noise", "method"), [(1e-9, "arrangement"), (3e-11, "branch and bound")])
def test_nearly_equal_planes_are_left_to_branch_and_bound(noise, method):
    A = normal((6, 3), 57)
    A = torch.cat([A, A + noise * normal((6, 3), 58)])
    assert check(A, normal((12, 1), 59), gap=1e-6, tolerance=1e-7).method == method


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


@pytest.mark.parametrize("size", [1e-160, 1e-300, 1e-320])
@pytest.mark.parametrize("outputs", [1, 2])
def test_what_vanishes_when_it_is_squared_enters_the_bound(size, outputs, by_branching):
    A, W = normal((4, 3), 60), normal((4, outputs), 61)
    least = size * maximise(A, W).lower
    for found in (maximise(size * A, W), maximise(A, size * W), by_branching(size * A, W)):
        assert least <= found.upper < 1e-148


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
        ({"A": [[1.0]]}, TypeError, r"A must be a torch.Tensor .*, not list"),
        ({"A": torch.ones(4)}, ValueError, r"A has shape \(4,\); expected \(n, d\)"),
        ({"A": torch.ones(4, 0)}, ValueError, "at least one column"),
        ({"W": torch.ones(5, 1)}, ValueError, r"W has shape \(5, 1\); expected \(4, 1\)"),
        ({"W": torch.full((4, 1), math.nan)}, ValueError, "W.* is nan"),
        ({"W": torch.ones(4, 1) * 1j}, ValueError, "W has the dtype torch.complex64; give real entries"),
        ({"A": 1e200 * normal((4, 3), 1)}, ValueError, "A has rows whose squares exceed the largest number"),
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
