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

import numpy as np
import torch
from torch import Tensor

from meanfield.validation import finite

# Hyperplanes closer than this angle are one, and a piece of a hyperplane narrower than this is none.
TOLERANCE = 1e-11
# Largest number n of distinct hyperplanes, by the entries of a kernel: the patterns take 2 n^2 bytes for two entries,
# n^3 for three.
MAX_HYPERPLANES = {1: 1, 2: 10_000, 3: 500}


@dataclass(frozen=True, eq=False)
class Arrangement:
    """The cells of an arrangement of k distinct hyperplanes through the origin of R^d, with their facets.

    normals (k, d) unit vectors.  row_normal (n,) the hyperplane of every row of A, row_side (n,) 1 or -1 where the row
    points along or against its normal, 0 for a row of zeros.  cells (c, k) bool: 1[normals z > 0] on each cell.
    A facet is a piece of one hyperplane that bounds one cell: facet_cell (f,), facet_neighbour (f,) the cell across it,
    facet_normal (f,) its hyperplane; facet_middle (f, d) unit vector inside it; facet_ends (f, e, d) its extreme rays,
    e = 1 for d = 2 and e = 2 for d = 3.  With a single hyperplane the facets are all of it, and middle and ends are
    zero.
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

    @cached_property
    def facet_side(self) -> np.ndarray:
        """1 or -1: on which side of its hyperplane the facet's cell lies, (f,)."""
        return np.where(self.cells[self.facet_cell, self.facet_normal], 1.0, -1.0)

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
        """max of <linear_c, z> over the unit vectors z of the closure of every cell, (c, d) -> (c,).

        The maximum lies at linear_c / |linear_c| if that is in the cell, else on a facet: at the projection of
        linear_c on it if that is inside, else at an end.
        """
        own, normals = linear[self.facet_cell], self.normals[self.facet_normal]
        heights = (own * normals).sum(1)
        inside = np.ones(len(linear), dtype=bool)
        np.logical_and.at(inside, self.facet_cell, heights * self.facet_side >= 0)
        best = np.where(inside, np.linalg.norm(linear, axis=1), -np.inf)
        flat = own - heights[:, None] * normals
        sizes = np.linalg.norm(flat, axis=1)
        reach = (self.facet_middle[:, None] * self.facet_ends).sum(2).min(1)  # cosine of half the facet's angle
        within = (flat * self.facet_middle).sum(1) >= reach * sizes
        at_ends = (own[:, None] * self.facet_ends).sum(2).max(1)
        np.maximum.at(best, self.facet_cell, np.where(within, np.maximum(sizes, at_ends), at_ends))
        return best


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
        same = np.linalg.norm(units[rest] - along[:, None] * normal, axis=1) <= TOLERANCE
        owner[rest[same]], side[rest[same]] = len(normals), np.sign(along[same])
        normals.append(normal)
        rest = rest[~same]
    return np.array(normals).reshape(-1, rows.shape[1]), owner, side


def _cells(normals: np.ndarray) -> tuple[np.ndarray, ...]:
    """The fields of an `Arrangement` of two or more hyperplanes, from cells on."""
    off, on, owners, middles, ends = [], [], [], [], []
    for index in range(len(normals)):
        middle, end = _pieces(normals, index)
        sides = middle @ normals.T > 0
        for packed, own_side in ((off, False), (on, True)):
            sides[:, index] = own_side
            packed.append(np.packbits(sides, axis=1))
        owners.append(np.full(len(middle), index))
        middles.append(middle)
        ends.append(end)
    distinct, cell = np.unique(np.concatenate(off + on), axis=0, return_inverse=True)
    cells = np.unpackbits(distinct, axis=1, count=len(normals)).astype(bool)
    below, above = cell.reshape(2, -1)
    own, across = np.concatenate([below, above]), np.concatenate([above, below])
    owner, middle, end = (np.concatenate(parts * 2) for parts in (owners, middles, ends))
    # rounding can split a point where nearly parallel planes cross others: a false cell does not hold the sum of its
    # facets' middles
    inner = np.zeros((len(cells), normals.shape[1]))
    np.add.at(inner, own, middle)
    true = ((inner @ normals.T > 0) == cells).all(1)
    number = np.cumsum(true) - 1
    kept = true[own]
    across = np.where(true[across], across, own)[kept]
    return cells[true], number[own[kept]], number[across], owner[kept], middle[kept], end[kept]


def _pieces(normals: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Middles (m, d) and extreme rays (m, e, d) of the pieces into which the other hyperplanes cut that of `index`."""
    normal = normals[index]
    if len(normal) == 2:
        ray = np.array([[-normal[1], normal[0]]])
        rays = np.concatenate([ray, -ray])
        return rays, rays[:, None]
    plane = np.linalg.svd(normal[None])[2][1:]  # an orthonormal basis of the plane, (2, 3)
    cuts = np.delete(normals, index, axis=0) @ plane.T
    angles = np.sort(np.arctan2(cuts[:, 0], -cuts[:, 1]) % np.pi)
    gaps = np.diff(angles, append=angles[0] + np.pi)
    angles, gaps = angles[gaps > TOLERANCE], gaps[gaps > TOLERANCE]
    half = np.stack([angles + 0.5 * gaps, angles, angles + gaps], 1)
    points = np.stack([np.cos(half), np.sin(half)], 2) @ plane
    points = np.concatenate([points, -points])
    return points[:, 0], points[:, 1:]
