import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog, nnls
from strategies import costly, normal, seeded, seeds

from meanfield.convex import patterns


def sampled_patterns(rows, count, seed=0):
    directions = normal((count, rows.shape[1]), seed)
    return {tuple(row) for row in (directions @ rows.T > 0).tolist()}


def listed_patterns(rows):
    found = patterns.activation_patterns(rows)
    assert found.dtype == torch.bool
    listed = [tuple(row) for row in found.tolist()]
    assert len(set(listed)) == len(listed)
    return listed


def depth_of_cell(signed):
    """Largest t with signed z >= t |signed rows| for some z in the unit box."""
    bounds = [(-1, 1)] * signed.shape[1] + [(None, 1)]
    lengths = np.linalg.norm(signed, axis=1, keepdims=True)
    found = linprog([0] * signed.shape[1] + [-1], np.hstack([-signed, lengths]), np.zeros(len(signed)), bounds=bounds)
    return -found.fun


def least(row, signed):
    """min of row z over the cone {signed z >= 0} within the unit box."""
    return linprog(
        row,
        -signed if len(signed) else None,
        np.zeros(len(signed)) if len(signed) else None,
        bounds=[(-1, 1)] * len(row),
    ).fun


def nonzero(rows):
    return rows.abs().amax(1).numpy() > 0


def assert_every_pattern_has_a_point(rows, least_depth=1e-9):
    alive = nonzero(rows)
    for pattern in listed_patterns(rows):
        signs = np.where(pattern, 1.0, -1.0)[alive, None]
        assert not np.array(pattern)[~alive].any()
        assert not alive.any() or depth_of_cell(signs * rows.numpy()[alive]) > least_depth


def cells_by_euler(rows):
    """Cells of an arrangement of integer planes in R^3, counted in integers: V - E + F = 2 on the sphere."""

    def primitive(vector):
        divisor = math.gcd(*vector)
        vector = tuple(v // divisor for v in vector)
        return max(vector, tuple(-v for v in vector))

    planes = list({primitive(row) for row in rows.int().tolist() if any(row)})
    crossings = [tuple(np.cross(a, b).tolist()) for a, b in itertools.combinations(planes, 2)]
    points = {primitive(crossing) for crossing in crossings}
    if not points:
        return 2 if planes else 1
    incidences = sum(int(np.dot(plane, point) == 0) for plane in planes for point in points)
    return 2 - 2 * len(points) + 2 * incidences


@pytest.mark.parametrize(
    ("n", "d", "count"),
    [(1, 1, 2), (5, 1, 2), (1, 2, 2), (7, 2, 14), (40, 2, 80), (1, 3, 2), (2, 3, 4), (9, 3, 74), (25, 3, 602)],
)
def test_number_of_patterns_in_general_position(n, d, count):
    assert len(listed_patterns(normal((n, d), n))) == count


@pytest.mark.parametrize(("n", "d"), [(6, 1), (12, 2), (6, 3)])
def test_sampling_finds_exactly_the_listed_patterns(n, d):
    rows = normal((n, d), 3)
    assert set(listed_patterns(rows)) == sampled_patterns(rows, 200_000)


integer_rows = st.integers(1, 3).flatmap(
    lambda d: st.lists(st.lists(st.integers(-2, 2), min_size=d, max_size=d), min_size=1, max_size=7)
)


@given(integer_rows)
def test_degenerate_rows(entries):
    """Small integers: zero, repeated, opposite rows, many planes through one line."""
    rows = torch.tensor(entries, dtype=torch.float64)
    assert sampled_patterns(rows, 20_000) <= set(listed_patterns(rows))
    assert_every_pattern_has_a_point(rows)
    if rows.shape[1] == 3:
        assert len(listed_patterns(rows)) == cells_by_euler(rows)


@given(seeds, st.integers(8, 30))
def test_counts_of_degenerate_planes_follow_euler(seed, n):
    rows = torch.randint(-3, 4, (n, 3), generator=seeded(seed)).double()
    assert len(listed_patterns(rows)) == cells_by_euler(rows)
    # no rounding: the same planes at other lengths
    scaled = rows * normal((n, 1), seed).abs() / 3
    assert set(listed_patterns(scaled)) == set(listed_patterns(rows))


@costly(10)
@given(seeds, st.integers(2, 3), st.integers(1, 9))
def test_binding_rows_describe_the_cone_and_are_all_needed(seed, d, n):
    rows = normal((n, d), seed)
    rows[n // 2] = -2 * rows[0]  # two rows of one plane
    binding, listed = patterns.binding_rows(rows), patterns.activation_patterns(rows)
    assert binding.shape == listed.shape
    for facets, pattern in zip(binding.numpy(), listed.numpy()):
        signed = np.where(pattern, 1.0, -1.0)[:, None] * rows.numpy()
        for index in range(n):
            rest = facets.copy()
            rest[index] = False
            if facets[index]:
                assert least(signed[index], signed[rest]) < -1e-9
            else:
                assert least(signed[index], signed[facets]) > -1e-9
    assert d == 3 or int(binding.sum(1).max()) <= 2


@given(seeds, st.integers(1, 3), st.integers(0, 8))
def test_maxima_over_cells_are_projections(seed, d, n):
    rows = normal((n, d), seed)
    arrangement = patterns.arrangement(rows)
    linear = normal((len(arrangement.cells), d), seed + 1).numpy()
    maxima, opposite = arrangement.maxima(linear)
    assert np.array_equal(opposite, arrangement.maxima(-linear)[0])
    for vector, cell, found in zip(linear, arrangement.cells, maxima):
        signed = np.where(cell, 1.0, -1.0)[:, None] * arrangement.normals
        projected = nnls(-signed.T, vector)[1] if len(signed) else np.linalg.norm(vector)
        if projected > 1e-9:  # else the cell lies in the half-space where the maximum is not positive
            assert found == pytest.approx(projected, rel=1e-9)
        else:
            assert found < 1e-9
    points = normal((2_000, d), seed + 2)
    owner = {tuple(cell): index for index, cell in enumerate(arrangement.cells.tolist())}
    units = (points / points.norm(dim=1, keepdim=True)).numpy()
    where = np.array([owner[tuple(row)] for row in (units @ arrangement.normals.T > 0).tolist()])
    assert ((units * linear[where]).sum(1) <= maxima[where] + 1e-12).all()


@given(seeds, st.integers(2, 3), st.integers(0, 8))
def test_the_maximum_over_a_cell_is_at_a_candidate(seed, d, n):
    arrangement = patterns.arrangement(normal((n, d), seed))
    linear = normal((len(arrangement.cells), d), seed + 1).numpy()
    for number, (vector, cell, maximum) in enumerate(zip(linear, arrangement.cells, arrangement.maxima(linear)[0])):
        points = arrangement.candidates(number, vector)
        points = points[np.linalg.norm(points, axis=1) > 0]
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        inside = (np.where(cell, 1.0, -1.0) * (points @ arrangement.normals.T) >= -1e-12).all(1)
        assert (points[inside] @ vector).max(initial=-np.inf if n > 1 else 0.0) == pytest.approx(maximum, rel=1e-9)


@given(seeds, st.integers(1, 3), st.integers(0, 12), st.integers(1, 50))
def test_active_sums_add_what_is_above(seed, d, n, block):
    arrangement = patterns.arrangement(normal((n, d), seed))
    vectors = normal((len(arrangement.normals), 2), seed + 1).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "BLOCK", block)
        found = arrangement.active_sums(vectors)
    assert found.shape == (len(arrangement.cells), 2)
    for cell, total in zip(arrangement.cells, found):
        assert total == pytest.approx(vectors[cell].sum(0), abs=1e-12)


def test_blocks_do_not_change_the_cells(monkeypatch):
    rows = torch.randint(-2, 3, (25, 3), generator=torch.Generator().manual_seed(0)).double()
    whole = patterns.arrangement(rows)
    monkeypatch.setattr(patterns, "BLOCK", 100)
    parts = patterns.arrangement(rows)
    assert np.array_equal(whole.cells, parts.cells)
    assert np.array_equal(whole.facet_cell, parts.facet_cell)
    assert np.array_equal(whole.facet_middle, parts.facet_middle)


@pytest.mark.parametrize("bytes_", [1, 7, 8, 9, 20])
def test_distinct_rows_of_bytes(bytes_):
    packed = np.random.default_rng(0).choice(np.array([0, 1, 255], dtype=np.uint8), (300, bytes_))
    packed[100:200] = packed[:100]
    packed[200:] = np.where(np.arange(bytes_) == bytes_ - 1, packed[200:], 7)
    distinct, number = patterns._distinct_rows(packed)
    expected, owner = np.unique(packed, axis=0, return_inverse=True)
    assert np.array_equal(distinct, expected)
    assert np.array_equal(number, owner.reshape(-1))


@pytest.mark.parametrize(("width", "cells", "dropped"), [(1e-9, 8, 0.0), (1e-12, 6, 2**0.5 * 1e-12)])
def test_what_narrow_pieces_leave_out_is_said(width, cells, dropped):
    """Three planes meet pairwise at points `width` apart: of the triangles between them the sides are the pieces."""
    found = patterns.arrangement(torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [1.0, 1.0, width]], dtype=torch.float64))
    assert len(found.cells) == cells
    assert found.dropped == pytest.approx(dropped, rel=1e-3)


def test_pieces_beside_false_cells_count_as_dropped(monkeypatch):
    rows = normal((5, 3), 0)
    assert patterns.arrangement(rows).dropped == 0
    kept = patterns._hold_their_facets

    def without_first(*arguments):
        return kept(*arguments) & (np.arange(len(arguments[1])) > 0)

    monkeypatch.setattr(patterns, "_hold_their_facets", without_first)
    found = patterns.arrangement(rows)
    monkeypatch.undo()
    whole = patterns.arrangement(rows)
    of_first = whole.facet_cell == 0
    angles = 2 * np.arccos(whole.facet_reach[of_first])
    assert len(found.cells) == len(whole.cells) - 1
    assert found.dropped == pytest.approx(angles.max())


def test_neighbours_differ_in_the_facets_row():
    arrangement = patterns.arrangement(normal((12, 3), 0))
    here, across = arrangement.cells[arrangement.facet_cell], arrangement.cells[arrangement.facet_neighbour]
    assert ((here != across).sum(1) == 1).all()
    assert (here != across)[np.arange(len(here)), arrangement.facet_normal].all()


def test_no_false_cell_at_nearly_parallel_planes_through_one_line():
    """Images with a frame of zeros: rounding alone would tell many planes' common line apart."""
    images = torch.nn.functional.pad(normal((7, 1, 4, 4), 472445 + 40), (1, 1, 1, 1))
    rows = torch.nn.functional.unfold(images, (1, 3)).transpose(1, 2).flatten(0, 1)
    found = patterns.arrangement(rows)
    inner = np.zeros((len(found.cells), 3))
    np.add.at(inner, found.facet_cell, found.facet_middle)
    assert np.array_equal(inner @ found.normals.T > 0, found.cells)
    assert np.bincount(found.facet_cell).min() >= 2


def test_parallel_rows_up_to_rounding_count_once():
    rows = normal((6, 3), 0)
    noisy = torch.cat([rows, 0.1 * rows / 0.3, -rows * math.pi])
    assert len(listed_patterns(noisy)) == len(listed_patterns(rows)) == 32


def test_rank_deficient_rows():
    flat = normal((5, 2), 0) @ normal((2, 3), 1)
    assert len(listed_patterns(flat)) == 10
    assert_every_pattern_has_a_point(flat)


def test_zero_rows_are_never_active():
    assert patterns.activation_patterns(torch.zeros(3, 2)).tolist() == [[False] * 3]
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert sorted(patterns.activation_patterns(rows).tolist()) == [[False, False], [False, True]]
    assert patterns.binding_rows(rows).tolist() == [[False, True]] * 2


def test_tiny_and_huge_rows():
    rows = normal((5, 3), 0)
    scales = torch.tensor([1e-300, 1e300, 1.0, 1e-5, 1e9], dtype=torch.float64)
    assert set(listed_patterns(rows * scales[:, None])) == set(listed_patterns(rows))


def test_two_entries_scale_to_many_rows():
    assert len(patterns.activation_patterns(normal((600, 2), 0))) == 1200


@pytest.mark.parametrize("shape", [(4, 4), (4, 0), (4,)])
def test_other_numbers_of_entries_are_refused(shape):
    with pytest.raises(ValueError, match=r"patches has shape .*patterns are listed for \(n, d\) with d = 1, 2 or 3"):
        patterns.activation_patterns(torch.zeros(shape))


def test_too_many_rows_are_refused(monkeypatch):
    monkeypatch.setitem(patterns.MAX_HYPERPLANES, 3, 4)
    rows = normal((5, 3), 0)
    assert len(listed_patterns(torch.cat([rows[:4], 2 * rows[:4]]))) == 14
    with pytest.raises(ValueError, match="patches has more than 4 distinct directions of 3 entries"):
        patterns.activation_patterns(rows)


def test_values_that_are_not_finite_are_named():
    with pytest.raises(ValueError, match=r"patches\[1, 0\] is nan"):
        patterns.activation_patterns(torch.tensor([[1.0, 0.0], [math.nan, 1.0]]))
