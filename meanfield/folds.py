"""Combining what runs of images give in one order, whoever holds which run: the same bits on any number of ranks.

Rounding makes (a + b) + c differ from a + (b + c), and a flow makes much of a last bit: sums over images that were
added up in another order change J by 1e-7 to 1e-2 after a few rounds.  So images come in runs that depend on the data
alone, and the values of runs are combined in pairs along a binary tree, the halves of the halves of all runs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Generic, TypeVar

MOST_RUNS = 16  # up to so many ranks get the same bits
LEAST_PIXELS = 4096  # of a run: smaller ones cost more than they bring

Value = TypeVar("Value")
Span = tuple[int, int]  # runs from .. to, the end excluded


class Fold(Generic[Value]):
    """The values of neighbouring runs among `count`, combined as far as they make up whole branches of the tree."""

    def __init__(self, count: int, combine: Callable[[Value, Value], Value]) -> None:
        self.count, self._combine = count, combine
        self.spans: list[Span] = []
        self.values: list[Value] = []

    def add(self, span: Span, value: Value) -> None:
        """The branch that comes next."""
        while self.spans and self._branch(span) == (self.spans[-1][0], span[1]):
            span, value = (self.spans.pop()[0], span[1]), self._combine(self.values.pop(), value)
        self.spans.append(span)
        self.values.append(value)

    def _branch(self, span: Span) -> Span:
        """The branch that the given one is half of; of the whole tree itself.

        Branch i of 2^k goes from run i count / 2^k to (i + 1) count / 2^k, rounded down.
        """
        around, found = (0, self.count), (0, self.count)
        index, parts = 0, 1
        while found != span:
            parts, around = 2 * parts, found
            middle = (2 * index + 1) * self.count // parts
            index = 2 * index + (span[0] >= middle)
            found = (index * self.count // parts, (index + 1) * self.count // parts)
        return around

    @property
    def result(self) -> Value:
        """The value of all runs, once all are there."""
        assert self.spans == [(0, self.count)]
        return self.values[0]


def branches(count: int, span: Span) -> list[Span]:
    """The largest branches that make up some neighbouring runs, in their order."""
    fold: Fold[None] = Fold(count, lambda first, second: None)
    for run in range(*span):
        fold.add((run, run + 1), None)
    return fold.spans


def edges(rows: int, parts: int) -> list[int]:
    """Where `parts` equal parts of so many rows begin and end; those of half as many parts are among them."""
    return [part * rows // parts for part in range(parts + 1)]


def runs(images: int, pixels: int, most: int = MOST_RUNS) -> tuple[int, ...]:
    """How many of the images, each of so many pixels, are in every run: at most `most` runs, of LEAST_PIXELS each at
    least.
    """
    found = edges(images, max(1, min(most, images * pixels // LEAST_PIXELS, images)))
    return tuple(end - begin for begin, end in pairwise(found))
