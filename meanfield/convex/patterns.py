"""Activation patterns of ReLU features: all sign patterns of A z over kernels z, for kernels of up to three entries.

The hyperplanes {z : a_i z = 0} of the rows of A cut the space of kernels into open cones, the cells; on a cell the
pattern 1[A z > 0] is constant.  Parallel rows share a hyperplane and are merged first.  Every cell has a facet on some
hyperplane (unless there is none), so the cells are found from the pieces into which each hyperplane is cut by the
others: the pattern at the middle of a piece, with its own row on and off.  Nothing is sampled.
Edelsbrunner, Algorithms in Combinatorial Geometry, 1987, ch. 7; Pilanci & Ergen, ICML 2020, for the use in networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meanfield.validation import finite

# Hyperplanes closer than this angle are one, and a piece of a hyperplane narrower than this is none.
TOLERANCE = 1e-11
# Largest number n of distinct hyperplanes, by the entries of a kernel: the patterns take 2 n^2 bytes for two entries,
# n^3 for three.
MAX_HYPERPLANES = {1: 1, 2: 10_000, 3: 500}
BLOCK = 1 << 20  # entries of cells looked at as numbers at a time: 8 MiB in float64


@dataclass(frozen=True, eq=False)
class Arrangement:
    """The cells of an arrangement of k distinct hyperplanes through the origin of R^d, with their facets.

    normals (k, d) unit vectors.  row_normal (n,) the hyperplane of every row of A, row_side (n,) 1 or -1 where the row
    points along or against its normal, 0 for a row of zeros.  cells (c, k) bool: 1[normals z > 0] on each cell.
    A facet is a piece of one hyperplane that bounds one cell: facet_cell (f,), facet_neighbour (f,) the cell across it,
    facet_normal (f,) its hyperplane; facet_middle (f, d) unit vector inside it; facet_ends (f, e, d) its extreme rays,
    e = 1 for d = 2 and e = 2 for d = 3.  With a single hyperplane the facets are all of it, and middle and ends are
    zero.  dropped: the largest total angle, in radians, of the pieces of one hyperplane that are in no facet of this
    list or in one of its two only: narrower than TOLERANCE, or beside a cell that rounding alone had made.
    """

    normals: np.ndarray
    row_normal: np.ndarray
    row_side: np.ndarray
    cells: np.ndarray
    facet_cell: np.ndarray
    facet_neighbour: np.ndarray
    facet_normal: np.ndarray
    facet_middle: np.ndarray
    facet_ends: np.ndarray
    dropped: float

    @cached_property
    def facet_side(self) -> np.ndarray:
        """1 or -1: on which side of its hyperplane the facet's cell lies, (f,)."""
        return np.where(self.cells[self.facet_cell, self.facet_normal], 1.0, -1.0)

    @cached_property
    def facet_reach(self) -> np.ndarray:
        """Cosine of half the angle of every facet, (f,)."""
        return (self.facet_middle[:, None] * self.facet_ends).sum(2).min(1)

    def patterns(self) -> np.ndarray:
        """1[A z > 0] on every cell, bool (c, n)."""
        if not self.normals.size:
            return np.zeros((1, len(self.row_side)), dtype=bool)
        return (self.cells[:, self.row_normal] == (self.row_side > 0)) & (self.row_side != 0)

    def binding_rows(self) -> np.ndarray:
        """One row of A for every facet of every cell, bool (c, n); of parallel rows the first."""
        binding = np.zeros((len(self.cells), len(self.row_side)), dtype=bool)
        first = np.array(
            [np.flatnonzero((self.row_normal == i) & (self.row_side != 0))[0] for i in range(len(self.normals))],
            dtype=int,
        )
        binding[self.facet_cell, first[self.facet_normal]] = True
        return binding

    def maxima(self, linear: np.ndarray) -> np.ndarray:
        """max of <linear_c, z> and of <-linear_c, z> over the unit vectors z of the closure of every cell, (c, d) ->
        (2, c).

        The maximum lies at linear_c / |linear_c| if that is in the cell, else on a facet: at the projection of
        linear_c on it if that is inside, else at an end.
        """
        own, normals = linear[self.facet_cell], self.normals[self.facet_normal]
        heights = (own * normals).sum(1)
        flat = own - heights[:, None] * normals
        sizes, along = np.linalg.norm(flat, axis=1), (flat * self.facet_middle).sum(1)
        at_ends = (own[:, None] * self.facet_ends).sum(2)
        lengths, climb = np.linalg.norm(linear, axis=1), heights * self.facet_side
        best = np.empty((2, len(linear)))
        for row, sign in zip(best, (1.0, -1.0)):
            inside = np.ones(len(linear), dtype=bool)
            np.logical_and.at(inside, self.facet_cell, sign * climb >= 0)
            row[:] = np.where(inside, lengths, -np.inf)
            within, ends = sign * along >= self.facet_reach * sizes, (sign * at_ends).max(1)
            np.maximum.at(row, self.facet_cell, np.where(within, np.maximum(sizes, ends), ends))
        return best

    def candidates(self, cell: int, linear: np.ndarray) -> np.ndarray:
        """Directions (m, d) among which <linear, z> has its maximum over the unit vectors z of one closed cell, not all
        of them in it: along linear (d,), along its projections on the facets, and the extreme rays.
        """
        facets = self.facet_cell == cell
        normals = self.normals[self.facet_normal[facets]]
        flat = linear - (normals @ linear)[:, None] * normals
        return np.concatenate([linear[None], flat, self.facet_ends[facets].reshape(-1, len(linear))])

    def active_sums(self, vectors: np.ndarray) -> np.ndarray:
        """For every cell the sum of the vectors (k, m) of the hyperplanes above which it lies, (c, m)."""
        step = BLOCK // max(len(vectors), 1) + 1
        parts = [self.cells[start : start + step].astype(float) for start in range(0, len(self.cells), step)]
        return np.concatenate([part @ vectors for part in parts])


def activation_patterns(patches: Tensor) -> Tensor:
    """All patterns 1[A z > 0] attained on open sets of kernels z, for A = patches (n, d), d <= 3: bool (patterns, n).

    Exact: 2 n patterns for d = 2 and n^2 - n + 2 for d = 3 in general position, fewer otherwise.  Hyperplanes within an
    angle of TOLERANCE count as one.  A row of zeros is never active.
    """
    return torch.as_tensor(arrangement(patches).patterns(), device=patches.device)


def binding_rows(patches: Tensor) -> Tensor:
    """The rows of A that are facets of the cone {z : (2 D - 1) A z >= 0} of every pattern D, bool (patterns, n).

    In the order of `activation_patterns`; of parallel rows the first stands for all.  The other rows follow from these.
    """
    return torch.as_tensor(arrangement(patches).binding_rows(), device=patches.device)


def arrangement(patches: Tensor) -> Arrangement:
    """The arrangement of the hyperplanes orthogonal to the rows of patches (n, d), d <= 3.

    Raises ValueError for d > 3 and beyond MAX_HYPERPLANES distinct hyperplanes.
    """
    if patches.ndim != 2 or patches.shape[1] not in MAX_HYPERPLANES:
        raise ValueError(f"patches has shape {tuple(patches.shape)}; patterns are listed for (n, d) with d = 1, 2 or 3")
    rows = finite(patches, "patches").detach().cpu().double().numpy()
    normals, row_normal, row_side = _distinct_normals(rows, MAX_HYPERPLANES[rows.shape[1]])
    if len(normals) < 2:
        return _trivial(normals, row_normal, row_side)
    return Arrangement(normals, row_normal, row_side, *_cells(normals))


def _trivial(normals: np.ndarray, row_normal: np.ndarray, row_side: np.ndarray) -> Arrangement:
    """No hyperplane: one cell without facets; one hyperplane: its two sides."""
    k, d = normals.shape
    index = np.arange(2 * k)
    cells = (index[:, None] > 0) if k else np.zeros((1, 0), dtype=bool)
    return Arrangement(
        normals,
        row_normal,
        row_side,
        cells,
        index,
        index[::-1],
        0 * index,
        np.zeros((2 * k, d)),
        np.zeros((2 * k, 1, d)),
        0.0,
    )


def _distinct_normals(rows: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit normals (k, d) of the distinct hyperplanes, and for every row its normal and side."""
    largest = np.abs(rows).max(1, initial=0.0)
    side, owner = np.zeros(len(rows)), np.zeros(len(rows), dtype=int)
    units = rows / np.where(largest > 0, largest, 1.0)[:, None]  # dividing first keeps the norm of tiny rows exact
    units = units / np.where(largest > 0, np.linalg.norm(units, axis=1), 1.0)[:, None]
    rest, normals = np.flatnonzero(largest > 0), []
    while len(rest):
        if len(normals) == limit:
            raise ValueError(
                f"patches has more than {limit} distinct directions of {rows.shape[1]} entries; the patterns of so "
                "many do not fit in memory: use fewer images or a larger stride"
            )
        normal = units[rest[0]]
        along = units[rest] @ normal
        same = np.abs(along) >= 1 - TOLERANCE**2 - 1e-12  # or the angle is larger, whatever the rounding
        close = units[rest[same]] - along[same, None] * normal
        same[same] = np.linalg.norm(close, axis=1) <= TOLERANCE
        owner[rest[same]], side[rest[same]] = len(normals), np.sign(along[same])
        normals.append(normal)
        rest = rest[~same]
    return np.array(normals).reshape(-1, rows.shape[1]), owner, side


def _cells(normals: np.ndarray) -> tuple[Any, ...]:
    """The fields of an `Arrangement` of two or more hyperplanes, from cells on."""
    *pieces, narrow = zip(*(_pieces(normals, index) for index in range(len(normals))))
    owner = np.repeat(np.arange(len(normals)), [len(middles) for middles in pieces[0]])
    middle, end, angle = map(np.concatenate, pieces)
    distinct, cell = _distinct_rows(_beside(normals, owner, middle))
    cells = np.unpackbits(distinct, axis=1, count=len(normals)).view(bool)
    below, above = cell.reshape(2, -1)
    own, across = np.concatenate([below, above]), np.concatenate([above, below])
    owner, middle, end, angle = (np.concatenate([part, part]) for part in (owner, middle, end, angle))
    true = _hold_their_facets(normals, cells, own, middle)
    number = np.cumsum(true) - 1
    kept = true[own]
    across = np.where(true[across], across, own)[kept]
    dropped = np.array(narrow) + np.bincount(owner[~kept], angle[~kept], len(normals))
    return cells[true], number[own[kept]], number[across], owner[kept], middle[kept], end[kept], float(dropped.max())


def _beside(normals: np.ndarray, owner: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """The patterns below, then above the hyperplanes at the middles (m, d) of their pieces, (2 m, bytes)."""
    below, above = [], []
    step = BLOCK // len(normals) + 1
    for start in range(0, len(owner), step):
        own = owner[start : start + step]
        sides = middle[start : start + step] @ normals.T > 0
        for packed, own_side in ((below, False), (above, True)):
            sides[np.arange(len(own)), own] = own_side
            packed.append(np.packbits(sides, axis=1))
    return np.concatenate(below + above)


def _distinct_rows(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of bytes (m, b), sorted, and for every row the number of its own, (m,)."""
    words = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(">u8").astype(np.uint64)
    order = np.lexsort(words.T[::-1])
    words = words[order]
    first = np.concatenate([[True], (words[1:] != words[:-1]).any(1)])
    number = np.empty(len(packed), dtype=int)
    number[order] = np.cumsum(first) - 1
    return packed[order[first]], number


def _hold_their_facets(normals: np.ndarray, cells: np.ndarray, own: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """Which cells hold the sum of the middles of their facets, (c,).

    A false cell does not: rounding can split a point where nearly parallel planes cross others.
    """
    inner = np.zeros((len(cells), normals.shape[1]))
    np.add.at(inner, own, middle)
    step = BLOCK // len(normals) + 1
    parts = [slice(start, start + step) for start in range(0, len(cells), step)]
    return np.concatenate([((inner[part] @ normals.T > 0) == cells[part]).all(1) for part in parts])


def _pieces(normals: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """The pieces into which the other hyperplanes cut that of `index`: middles (m, d), extreme rays (m, e, d), angles
    (m,); and the total angle of those that are too narrow.
    """
    normal = normals[index]
    if len(normal) == 2:
        ray = np.array([[-normal[1], normal[0]]])
        rays = np.concatenate([ray, -ray])
        return rays, rays[:, None], np.zeros(2), 0.0
    plane = np.linalg.svd(normal[None])[2][1:]  # an orthonormal basis of the plane, (2, 3)
    cuts = np.delete(normals, index, axis=0) @ plane.T
    angles = np.sort(np.arctan2(cuts[:, 0], -cuts[:, 1]) % np.pi)
    gaps = np.diff(angles, append=angles[0] + np.pi)
    wide = gaps > TOLERANCE
    angles, kept = angles[wide], gaps[wide]
    half = np.stack([angles + 0.5 * kept, angles, angles + kept], 1)
    points = np.stack([np.cos(half), np.sin(half)], 2) @ plane
    points = np.concatenate([points, -points])
    return points[:, 0], points[:, 1:], np.tile(kept, 2), float(gaps[~wide].sum())
