"""Runs of images and the tree in which their values are combined: one order, whoever holds which run."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import normal

from meanfield.folds import LEAST_PIXELS, MOST_RUNS, Fold, branches, edges, runs
from meanfield.ranks import Ranks


def pairs(count, index=0, parts=1):
    """The tree, written down."""
    begin, end = index * count // parts, (index + 1) * count // parts
    if end - begin == 1:
        return str(begin)
    return f"({pairs(count, 2 * index, 2 * parts)} {pairs(count, 2 * index + 1, 2 * parts)})"


def folded(count, ranks):
    """The values of `count` runs, those of each rank combined first."""
    combine = "({} {})".format
    every = Fold(count, combine)
    for rank in range(ranks):
        own, span = Fold(count, combine), Ranks(rank, ranks).span(count)
        for run in range(*span):
            own.add((run, run + 1), str(run))
        assert own.spans == branches(count, span)
        for branch, value in zip(own.spans, own.values):
            every.add(branch, value)
    return every.result


@given(st.integers(1, 40), st.integers(1, 45))
def test_the_order_is_the_same_on_any_number_of_ranks(count, ranks):
    assert folded(count, ranks) == pairs(count)


def test_a_power_of_two_of_ranks_has_one_branch_each():
    for count in (16, 21, 27, 40):
        for ranks in (1, 2, 4, 8):
            assert all(len(branches(count, Ranks(rank, ranks).span(count))) == 1 for rank in range(ranks))


def test_another_order_gives_other_bits():
    """What all this is for."""
    values = normal((8, 100), 0) * 10.0 ** normal((8, 100), 1)
    tree = Fold(8, torch.add)
    for run, value in enumerate(values):
        tree.add((run, run + 1), value)
    torch.testing.assert_close(tree.result, values.sum(0), rtol=1e-12, atol=1e-12)
    in_turn = values[0].clone()
    for value in values[1:]:
        in_turn += value
    assert not torch.equal(tree.result, in_turn)


def test_runs_depend_on_the_data_alone():
    assert runs(16, 16) == (16,)
    assert runs(64, 64) == (64,)
    assert runs(129, 64) == (64, 65)
    assert runs(4000, 784) == (250,) * MOST_RUNS
    assert runs(4000, 784, 32) == (125,) * 32
    assert runs(3, 10 * LEAST_PIXELS) == (1, 1, 1)


@pytest.mark.parametrize(("rows", "parts"), [(7, 4), (100, 16), (5, 8), (1, 2)])
def test_edges_of_half_as_many_parts_are_among_them(rows, parts):
    assert edges(rows, parts)[::2] == edges(rows, parts // 2)
