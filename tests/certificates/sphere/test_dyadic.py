"""Cells as whole numbers: every box comes back to the last bit."""

import pytest
import torch
from strategies import normal, seeded

from meanfield.certificates.sphere import dyadic
from meanfield.certificates.sphere.cones import Cones
from meanfield.certificates.sphere.dyadic import DEEPEST, coded, decoded
from meanfield.certificates.sphere.response import reduced


def halved_at_random(cells, times, seed, side=None):
    """One half of each, again and again, along drawn axes; side: 0 or 1, always the same half along axis 0 or 1."""
    random, dimension = seeded(seed), cells.middles.shape[1]
    for _ in range(times):
        drawn = torch.randint(1, dimension, cells.facets.shape, generator=random)
        drawn = drawn if side is None else torch.ones_like(drawn)
        splits = (cells.facets + drawn) % dimension  # never the facet's own axis
        halves = cells.bounded(normal(cells.facets.shape, seed).exp(), splits).halved()
        which = torch.randint(2, cells.facets.shape, generator=random) if side is None else side
        cells = halves[torch.arange(len(cells)) + which * len(cells)]
    return cells


def same(cells):
    again = decoded(coded(cells), cells.uppers)
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(cells.tensors(), again.tensors()))


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("dimension", [2, 3, 9])
def test_every_box_comes_back_with_the_same_bits(dimension, outputs, monkeypatch):
    monkeypatch.setattr(dyadic, "ROWS", 7)
    roots = Cones.roots(reduced(normal((30, dimension), 1), normal((30, outputs), 2)))
    assert same(roots)
    assert coded(roots).dtype == torch.int8
    for times in (1, 5, 6, 7, 40):
        assert same(halved_at_random(roots, times, times))
    assert same(roots[:0])


def test_the_type_is_the_smallest_that_holds_the_deepest_cell():
    roots = Cones.roots(reduced(normal((30, 3), 1), normal((30, 1), 2)))
    for times, kind in ((6, torch.int8), (7, torch.int16), (14, torch.int16), (15, torch.int32), (31, torch.int64)):
        for side in (0, 1):
            deep = halved_at_random(roots, times, 0, side)
            assert coded(deep).dtype == kind
            assert same(deep)


def test_what_float64_does_not_hold_is_refused():
    roots = Cones.roots(reduced(normal((30, 3), 1), normal((30, 1), 2)))
    for side in (0, 1):
        deepest = halved_at_random(roots, DEEPEST, 0, side)
        assert same(deepest)
        with pytest.raises(ValueError, match="more than 52 times"):
            coded(halved_at_random(deepest, 1, 0, side))


def test_a_node_says_where_an_interval_lies():
    """By hand: of [-1, 1], the second quarter from the left is [-1/2, 0], node 4 + 1."""
    cells = Cones(
        torch.tensor([[-0.25, -1.0]], dtype=torch.float64),
        torch.tensor([[0.25, 0.0]], dtype=torch.float64),
        torch.tensor([1]),
        torch.tensor([-1.0], dtype=torch.float64),
        torch.tensor([3.0], dtype=torch.float64),
        torch.tensor([0]),
    )
    assert coded(cells).tolist() == [[5, -1, 1, -1, 0]]
    assert same(cells)
