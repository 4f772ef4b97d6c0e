"""Branch and bound over cones of directions, for any dimension and any number of outputs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meanfield import limits
from meanfield.certificates.sphere.cones import Cones, cone_maxima
from meanfield.certificates.sphere.dyadic import coded, decoded
from meanfield.certificates.sphere.pairs import Above, Pairs
from meanfield.certificates.sphere.response import Found, Response, ascend, chunk, improve, start_directions, unit

# Of the open cells, one of so many is halved, those of the largest bounds, before all are ordered anew.
ORDERED = 8
# Share of the memory that was available for cells, 16 d + 32 bytes each, which for a moment take three times as much.
# Beyond, those that cannot matter are dropped, and the search stops with what it has proven where that leaves no room.
MEMORY = 0.25
TRIED = 64  # cells of a batch, of the largest bounds, at whose tops a larger response is looked for


@dataclass(frozen=True)
class Load:
    """How much is done at once: cells of a batch, between two looks at the clock; those of one output that are bounded
    together; entries of all rows over all cells of a batch.
    """

    batch: int
    chunk: int
    entries: int

    @classmethod
    def on(cls, device: torch.device) -> Load:
        """On a device calls take the time: more at once, up to where cusolver refuses to find eigenvalues."""
        return cls(4096, 256, 1 << 24) if device.type == "cpu" else cls(16384, 16384, 1 << 30)


class Branching:
    """A search that goes on where it stopped: cells that together hold all directions, each with its bound.

    lower, argmax (r,): the largest response met; upper: none is larger.  curve: (seconds, upper), as it fell.
    """

    def __init__(self, response: Response, starts: Tensor, leaves: Cones | None = None) -> None:
        """leaves: cells that hold all directions, to begin with; they are bounded anew."""
        began = time.perf_counter()
        with _pool() as pool:
            self._begin(response)
            if not len(self.argmax):
                self._note(began)
                return
            self.lower, self.argmax = ascend(response, start_directions(response, starts))
            roots = Cones.roots(response) if leaves is None else leaves.unbounded()
            self._table, self._count = roots.table(), len(roots)
            for part in torch.arange(len(roots), device=self._table.device).split(self._batch):
                self._table[part] = self._bounded(Cones.of_table(self._table[part]), pool).table()
        self._note(began)

    def _begin(self, response: Response) -> None:
        self.response, self._bounds = response, Bounds(response)
        load = Load.on(response.linear.device)
        self._batch = max(64, min(load.batch, load.entries // max(1, len(response.rows))))
        self._room = room(response)
        self.lower, self.argmax = 0.0, response.linear.new_zeros(len(response.linear))
        self._table, self._count = Cones.roots(response).table()[:0], 0
        self.looked, self.seconds, self._dropped = 0, 0.0, 0.0
        self.curve: list[tuple[float, float]] = []

    @property
    def leaves(self) -> Cones | None:
        """All cells; None where some were dropped for want of room."""
        return Cones.of_table(self._table[: self._count]) if self._dropped == 0 else None

    @property
    def upper(self) -> float:
        return max(self.lower, self._dropped, float(self._uppers().max()) if self._count else 0.0)

    def found(self) -> Found:
        return Found(self.lower, self.upper, self.argmax, "branch and bound", self.looked)

    def refine(self, deadline: float, tolerance: float) -> None:
        """Halve the cells of the largest bounds until `time.perf_counter()` meets the deadline, or upper <= (1 +
        tolerance) lower up to rounding, or there is no room.  An exception on the way leaves a search that goes on.
        """
        with _pool() as pool:
            while time.perf_counter() < deadline and len(chosen := self._largest(tolerance)):
                began = time.perf_counter()
                try:
                    for part in chosen.split(self._batch):
                        self._halve(part, pool)
                        if time.perf_counter() >= deadline:
                            break
                finally:
                    self._note(began)

    def sample(self, count: int) -> Cones:
        """So many cells, where there are more: a quarter of them those of the largest bounds, the others drawn."""
        order = self._uppers().argsort(descending=True)
        first, rest = order[: count // 4], order[count // 4 :]
        drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))[: count - len(first)]
        return Cones.of_table(self._table[torch.cat([first, rest[drawn.to(rest.device)]])])

    def state(self) -> dict[str, Any]:
        """What `restored` goes on from, for a `storage.states.StateFile`: for r = 9, 32 bytes a cell or 50."""
        return {
            "basis": self.response.basis,
            "cells": coded(Cones.of_table(self._table[: self._count])),
            "uppers": self._uppers(),
            "argmax": self.argmax,
            "figures": [self.lower, self._dropped, self.looked, self.seconds],
            "curve": [list(pair) for pair in self.curve],
        }

    @classmethod
    def restored(cls, response: Response, state: Mapping[str, Any]) -> Branching:
        """The search of `state`; the response is the same one, reduced in the basis kept there."""
        search = cls.__new__(cls)
        with _pool():
            search._begin(response)
        search._table, search.argmax = decoded(state["cells"], state["uppers"]).table(), state["argmax"]
        search._count = len(search._table)
        search.lower, search._dropped, search.looked, search.seconds = state["figures"]
        search.curve = [(seconds, upper) for seconds, upper in state["curve"]]
        return search

    def _uppers(self) -> Tensor:
        return self._table[: self._count, -1]

    def _least(self, tolerance: float) -> float:
        """A bound up to which cells are left as they are."""
        return self.lower * (1 + tolerance) + self.response.rounding

    def _largest(self, tolerance: float) -> Tensor:
        """The open cells to halve next, in the order of their bounds; none where there is no room."""
        uppers, least = self._uppers(), self._least(tolerance)
        size = int((uppers > least).sum())
        if self._count + max(64, size // ORDERED) > self._room:
            kept = uppers > least
            self._dropped = max(self._dropped, float(uppers.masked_fill(kept, 0.0).max()))
            self._table[:size] = self._table[: self._count][kept]
            self._count, uppers = size, uppers[kept]
        size = min(size, max(64, size // ORDERED), max(0, self._room - self._count))
        return uppers.topk(size).indices

    def _halve(self, chosen: Tensor, pool: Executor) -> None:
        """Replace cells by their halves: a table that is always one of cells that hold all directions."""
        halves = self._bounded(Cones.of_table(self._table[chosen]).halved(), pool).table()
        first, second = halves.chunk(2)
        end = self._count + len(second)
        if end > len(self._table):
            self._table = torch.cat([self._table, torch.empty_like(self._table[: max(self._count, len(second))])])
        self._table[self._count : end] = second
        self._count = end
        self._table[chosen] = first

    def _bounded(self, cells: Cones, pool: Executor) -> Cones:
        """With their bounds; the largest response at their tops counts."""
        bounded, tops = self._bounds(cells, float(cells.uppers.min()) - self.lower, pool)
        self.looked += len(cells)
        reached, where = improve(self.response, tops[bounded.uppers.topk(min(len(cells), TRIED)).indices])
        if reached > self.lower:
            self.lower, self.argmax = reached, where
        return bounded

    def _note(self, began: float) -> None:
        self.seconds += time.perf_counter() - began
        upper = self.upper
        if not self.curve or upper < self.curve[-1][1]:
            self.curve.append((self.seconds, upper))


def room(response: Response) -> int:
    """Cells that memory has room for."""
    table = Cones.roots(response).table()
    return int(MEMORY * limits.available(table.device)) // (table.element_size() * table.shape[1])


def maximise_branching(response: Response, starts: Tensor, deadline: float, tolerance: float) -> Found:
    """Best-first search in batches."""
    search = Branching(response, starts)
    search.refine(deadline, tolerance)
    return search.found()


def bounded_cones(response: Response, halvings: int, gap: float = 0.0) -> Cones:
    """Cones that cover all directions, every one halved so often, with their bounds."""
    cells = Cones.roots(response)
    with _pool() as pool:
        bounds = Bounds(response)
        for _ in range(halvings):
            cells = bounds(cells, gap, pool)[0].halved()
        return bounds(cells, gap, pool)[0]


def bounded(pairs: Pairs, cells: Cones) -> Cones:
    """Cells with their bounds in double precision."""
    with _pool() as pool:
        uppers, scores, _ = _bound_one(pairs, cells, torch.float64, pool)
    return cells.bounded(uppers, scores.argmax(1))


@contextmanager
def alone() -> Iterator[int]:
    """Torch with one thread, and how many it had: threads within an operation wait for each other after every one,
    which for small ones takes longer than they save, and on a machine that is shared a hundred times the work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _pool() -> Iterator[Executor]:
    """As many threads as torch has, each of which runs alone."""
    with alone() as threads, ThreadPoolExecutor(threads) as pool:
        yield pool


class Bounds:
    """Upper bounds of |q| over the unit vectors of cones; for one output of q or -q, as the cell says."""

    def __init__(self, response: Response) -> None:
        self._response = response
        self._pairs = Pairs.of(response) if response.linear.shape[1] == 1 else None

    def __call__(self, cells: Cones, gap: float, pool: Executor) -> tuple[Cones, Tensor]:
        """Cells with bounds and split axes, and the directions (b, r) at which their relaxations are largest.

        gap: a small share of it may be lost to rounding.
        """
        if self._pairs is None:
            device = cells.facets.device
            larger = Load.on(device).entries // Load.on(torch.device("cpu")).entries
            size = chunk(2 * self._response.weights.numel()) * larger
            places = torch.arange(len(cells), device=device)
            found = pool.map(lambda part: _bound_vector(self._response, cells[part]), places.split(size))
            uppers, scores, tops = (torch.cat(column) for column in zip(*found))
        else:
            uppers, scores, tops = _bound_one(self._pairs, cells, self._pairs.precision(gap), pool)
        # a child lies in its parent: the parent's bound holds for it
        return cells.bounded(torch.minimum(uppers, cells.uppers), scores.argmax(1)), tops


def _bound_one(pairs: Pairs, cells: Cones, precision: torch.dtype, pool: Executor) -> tuple[Tensor, Tensor, Tensor]:
    """Cells of one sign share a chunk; several chunks share the smaller work that follows."""
    order = cells.signs.argsort(stable=True)
    below = int((cells.signs < 0).sum())
    size = Load.on(order.device).chunk

    def bound(sign: float, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chunks = [vars(pairs.above(cells[few], sign, precision)).values() for few in part.split(size)]
        return _maxima(Above(*(torch.cat(column) for column in zip(*chunks))), cells[part])

    signed = [(sign, places) for sign, places in ((-1.0, order[:below]), (1.0, order[below:])) if len(places)]
    found = pool.map(lambda each: bound(*each), [(sign, few) for sign, all_ in signed for few in all_.split(4 * size)])
    back = order.argsort()
    uppers, scores, tops = (torch.cat(column)[back] for column in zip(*found))
    return uppers, scores, tops


def _bound_vector(response: Response, cells: Cones) -> tuple[Tensor, Tensor, Tensor]:
    """|q|^2 as a sum over orthonormal outputs, the first of them along q at the middle.

    The others are small in a small cell, so that their bounds matter to second order only.
    """
    frames = _frames(unit(response(cells.middles)))
    count, outputs = frames.shape[:2]
    index = torch.arange(count, device=frames.device).repeat_interleave(2 * outputs)
    both = torch.stack([frames, -frames], 2).reshape(-1, outputs)
    repeated = cells[index]
    uppers, scores, tops = _maxima(_single_bound(response, repeated, both), repeated)
    lengths = uppers.reshape(count, outputs, 2).amax(2).norm(dim=1)
    return lengths, scores.reshape(count, 2 * outputs, -1)[:, :2].sum(1), tops.reshape(count, 2 * outputs, -1)[:, 0]


def _frames(first: Tensor) -> Tensor:
    """Orthonormal frames (b, C, C) whose first row is +- the unit vector given, (b, C): Householder reflections."""
    eye = torch.eye(first.shape[1], dtype=first.dtype, device=first.device)
    mirror = unit(first + torch.where(first[:, :1] < 0, -1.0, 1.0) * eye[0])
    frames = eye - 2 * mirror[:, :, None] * mirror[:, None, :]
    # the reflection sends e_1 to -+ first: turn the frame so that its first row is `first` itself
    return frames * torch.where(first[:, :1, None] < 0, 1.0, -1.0)


def _maxima(above: Above, cells: Cones) -> tuple[Tensor, Tensor, Tensor]:
    """Upper bounds (b,) over the unit vectors of each cone, split scores (b, r), tops (b, r).

    The score of an axis is its share in the widths of the mixed rows.
    """
    axis = cells.facets[:, None]
    # on the facet that coordinate is +-1
    linear = above.linear.scatter_add(1, axis, cells.middles.gather(1, axis) * above.offset[:, None])
    uppers, tops = cone_maxima(linear, cells)
    widest = cells.halves * torch.finfo(linear.dtype).tiny  # without mixed rows any axis will do
    return uppers + above.slack, above.widths * cells.halves.square() + widest, tops


def _chord(heights: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset of the chord above relu on [heights - reach, heights + reach]; relu itself where the sign is
    fixed.
    """
    slopes = (heights / reach.clamp_min(torch.finfo(reach.dtype).tiny)).add_(1).mul_(0.5).clamp_(0, 1)
    return slopes, (reach - heights).clamp_min_(0).mul_(slopes)


def _single_bound(single: Response, cells: Cones, outputs: Tensor) -> Above:
    """Above <outputs, q>: every row by itself."""
    rows, weights = single.rows, outputs @ single.weights.T
    heights, reach = cells.middles @ rows.T, cells.halves @ rows.abs().T
    chords, offsets = _chord(heights, reach)
    slopes = torch.where(weights > 0, chords, (heights > 0).to(rows.dtype)).mul_(weights)
    offset = (offsets * weights.clamp_min(0)).sum(1)
    widths = ((reach > heights.abs()) * weights.abs()) @ rows.square()
    return Above(slopes @ rows + outputs @ single.linear.T, offset, torch.zeros_like(offset), widths)
