"""What the main job holds at its peak, from sizes alone; it is refused before it starts where that may not be taken.

Counted is what grows with something, phase by phase, on top of the images, which are there before.  The constants are
those of the code: how many vectors Anderson's memory has, how often a decomposition copies its argument.
`tests/solvers/test_memory.py` holds the figure against measured peaks: never below, at most twice as much and OVERHEAD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch

from meanfield import folds, limits
from meanfield.architecture import Architecture
from meanfield.certificates import search
from meanfield.problem import GRAPH, Problem
from meanfield.solvers.acceleration import MEMORY
from meanfield.starts import ANCHOR_ROWS, START_IMAGES
from meanfield.validation import Misuse

OVERHEAD = 2**26  # libraries that load as they are needed, and what the allocator keeps
BLOCKS = 1.5  # a block is counted by its features; the gradients of a layer come on top
TRAINED = 14  # copies of the network in a flow: itself, the next, the best, moments, velocities, steps, projections
STATES = 24  # vectors of the splitting besides the memory of its acceleration, and points at a check
FACTORED = 6  # matrices of columns x columns while a row space is read off, or a point restored
ASCENDED = 12  # copies of the kernels of an ascent: moments, gradients, retractions, the best of each start
POOLED = 3  # copies of all that was found


class Need(NamedTuple):
    """Bytes, and when, as it ends a sentence."""

    size: float
    when: str


@dataclass(frozen=True)
class Job:
    """The sizes of a run of `solvers.alternating`.

    widths, candidates: particles per layer, and how many more of them enter a program without mass.  bounded: whether
    there is an amplitude bound.  batch: images of a step, None for all.  starts: of a search, 0 for none.  ranks: among
    which the images are shared; all else each of them holds whole.
    """

    architecture: Architecture
    images: int
    widths: tuple[int, ...]
    candidates: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    bounded: bool = False
    batch: int | None = None
    starts: int = 0
    ranks: int = 1

    @property
    def held(self) -> int:
        """Bytes of the images, which are there before."""
        return self._number * self._own * self._pixels

    @property
    def _own(self) -> int:
        """Images of a rank, at most."""
        return math.ceil(self.images / self.ranks)

    @property
    def peak(self) -> Need:
        """Of the phase that needs most."""
        return max(self.phases())

    def phases(self) -> Iterator[Need]:
        """Phase by phase, each with what it finds there."""
        network = self._number * self._parameters
        block = max(limits.block_bytes(), self._number * self.architecture.entries(self._frozen, GRAPH))
        base = OVERHEAD + BLOCKS * block + 2 * network
        yield Need(base + self._start, "while a start is drawn")
        yield Need(base + TRAINED * network + self._batch, "in the flow")
        yield Need(base + self._freezing, "while features are frozen")
        yield Need(base + self._program + self._splitting, "in the convex program")
        if self.starts:
            yield Need(base + self._program + self._searching, "in the search for features")

    @property
    def _number(self) -> int:
        return self.dtype.itemsize

    @property
    def _pixels(self) -> int:
        return prod(self.architecture.input_shape)

    @property
    def _frozen(self) -> tuple[int, ...]:
        """Widths of a program."""
        return tuple(map(sum, zip(self.widths, self.candidates)))

    @property
    def _parameters(self) -> int:
        kernels = sum(map(prod, self.architecture.kernel_shapes(self.widths)))
        return kernels + 2 * sum(self.widths) + prod(self.architecture.readout_shape(self.widths[-1]))

    @property
    def _start(self) -> int:
        """Anchors, and their choice among all positions."""
        few, found = min(self.images, START_IMAGES), 0
        for positions, columns in self.architecture.row_shapes(self.widths):
            anchors = min(ANCHOR_ROWS, few * positions)
            found = max(found, self._number * anchors * (4 * columns + 4 * anchors) + 8 * few * positions)
        return found + self._number * (few < self.images) * few * self._pixels

    @property
    def _batch(self) -> int:
        return 0 if self.batch is None else 8 * self.images + 2 * self._number * self.batch * self._pixels

    @property
    def _rows(self) -> list[tuple[int, int, int]]:
        """Of every layer >= 2 of a program: particles, rows of A, columns of A."""
        shapes = self.architecture.row_shapes(self._frozen)
        return [(width, self.images * each, columns) for width, (each, columns) in zip(self._frozen[1:], shapes)]

    @property
    def _patches(self) -> int:
        """Bytes of an image's rows of A and of their source, in the widest layer."""
        shapes = self.architecture.row_shapes(self._frozen)
        return max((16 * columns * each for each, columns in shapes), default=0)

    @property
    def _reading(self) -> int:
        """Numbers that the readout of a program multiplies, of one image."""
        return prod(self.architecture.readout_shape(self._frozen[-1])[1:])

    @property
    def _freezing(self) -> int:
        """Stacked rows of all layers, of one run of images, and the triangles of earlier runs; of one layer a
        decomposition; the patches of a block.
        """
        runs = folds.runs(self.images, prod(self.architecture.input_shape[1:]))
        waiting = len(runs).bit_length()  # branches of the tree that are not combined yet, and their sum
        stacks = factored = 0
        for _, rows, columns in self._rows:
            rows = math.ceil(rows * max(runs) / self.images)
            height, triangle = min(rows, max(2 * columns, limits.block_bytes() // (8 * columns))), min(rows, columns)
            stacks += 8 * columns * (height + (waiting * triangle if len(runs) > 1 else 0))
            factored = max(factored, 8 * columns * max(height + 2 * triangle, FACTORED * triangle))
        block = max(limits.block_bytes(), 8 * self.architecture.entries(self._frozen) + self._patches)
        return stacks + factored + block + self._number * self.images * self._reading

    @property
    def _program(self) -> int:
        """Bases, coordinates, readout features; in float32 what judges them holds them, and the images, as float64."""
        exact = 8 if self._number == 4 else 0
        found = self.images * self._reading * (self._number + exact) + exact * self._own * self._pixels
        for width, rows, columns in self._rows:
            rank = min(columns, rows)
            found += (8 + exact // 2) * columns * rank + (self._number + exact) * width * rank
        return found

    @property
    def _splitting(self) -> int:
        """Vectors of a state, two Gram matrices and their eigenbasis, and the decomposition of a restoration."""
        kernels = sum(width * columns for width, _, columns in self._rows) + 2 * sum(self._frozen)
        state = (1 + self.bounded) * kernels + self.architecture.outputs * (self._reading + self.images)
        gram = 4 * self._number * min(self.images, self._reading) ** 2
        restored = max((min(columns, rows) * columns for _, rows, columns in self._rows), default=0)
        return state * (3 * MEMORY * self._number + STATES * 8) + gram + self._number * FACTORED * restored

    @property
    def _searching(self) -> int:
        """Every feature that is tried has kernels of its own, in float64."""
        widths = [search.MOST_HIDDEN] * (self.architecture.depth - 1) + [1]
        each = 8 * sum(map(prod, self.architecture.kernel_shapes(widths)))
        return each * (ASCENDED * self.starts + POOLED * (self._frozen[-1] + search.ROUNDS * self.starts))


def require(
    problem: Problem,
    widths: Sequence[int],
    *,
    clones: Sequence[int] | None = None,
    grow: int = 0,
    starts: int = 0,
    batch: int | None = None,
) -> None:
    """Refuse, naming what would fit, a run of `solvers.alternating` that needs more than `limits.available`."""
    below = min(max(search.HIDDEN, *widths), search.MOST_HIDDEN)  # sources that a feature may bring with it
    found = [grow * below] * (len(widths) - 1) + [grow]
    candidates = tuple(map(sum, zip(found, clones or [0] * len(widths))))
    job = Job(
        problem.architecture,
        problem.count,  # of a sharded problem as well: every rank holds the readout features of all
        tuple(widths),
        candidates,
        problem.inputs.dtype,
        problem.penalty.amplitude_bound is not None,
        batch,
        starts if grow else 0,
        problem.ranks.count,
    )
    free = limits.available(problem.inputs.device)
    if job.peak.size <= free:
        return
    said = " x ".join(map(str, problem.architecture.input_shape))
    raise Misuse(
        "widths",
        job.widths,
        f"with {job.images} images of {said} needs about {spelled(job.peak.size)} {job.peak.when}, and {spelled(free)} "
        f"may be taken; {_fitting(job, free + job.held)}",
    )


def spelled(size: float) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**29 else f"{size / 2**20:.3g} MiB"


def _fitting(job: Job, room: float) -> str:
    """What would fit into so many bytes, the images included."""
    fits = lambda changed: changed.peak.size + changed.held <= room  # noqa: E731
    offers: list[str] = []
    images = _largest(job.images, lambda count: fits(replace(job, images=count)))
    if images:
        offers.append(f"{images} images")
    share = _largest(max(job.widths), lambda most: fits(replace(job, widths=_capped(job.widths, most))))
    if share:
        offers.append(f"widths {','.join(map(str, _capped(job.widths, share)))}")
    pooled = replace(job, architecture=replace(job.architecture, readout="average"))
    if job.architecture.readout == "flatten" and fits(pooled):
        offers.append("the average readout")
    return (
        f"what fits: {' or '.join(offers)}"
        if offers
        else "take smaller images or kernels, and fewer images and particles"
    )


def _capped(widths: tuple[int, ...], most: int) -> tuple[int, ...]:
    return tuple(min(width, most) for width in widths)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number below `most` that fits, to two digits; 0 where 1 does not."""
    low, high = 0, most
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    digits = max(0, int(math.log10(low)) - 1) if low else 0
    return low // 10**digits * 10**digits
