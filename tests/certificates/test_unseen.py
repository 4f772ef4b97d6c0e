"""What more starts may find: the inequality by enumeration, and what a search says of its own starts."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from strategies import normal, seeded

import meanfield as mf
from meanfield.certificates import UnseenFeatures, search, search_features, unseen
from meanfield.certificates.compositions import Compositions, joined

TWO = mf.Architecture((1, 3, 3), (mf.Conv(2, activation="tanh"),) * 2)


def two_layers():
    penalty = mf.Penalty(source=1e-3, readout=1e-3, input=1e-3)
    problem = mf.Problem(TWO, normal((4, 1, 3, 3), 0), normal((4,), 1).sign(), penalty=penalty)
    return problem, mf.starts.start(TWO, (3, 2), problem.inputs, seeded(2))


# --- the estimate -----------------------------------------------------------------------------------------------------


def odds(values, shares, count, tolerance):
    """The chance that the best of `count` draws beats that of `count` others by more than a tolerance, and the mean of
    what the others say of it.
    """
    values, powers = np.array(values), np.cumsum(shares) ** count
    largest = np.diff(powers, prepend=0.0)
    beaten = values[:, None] > values[None] + tolerance
    true, said = largest @ beaten @ largest, 0.0
    for each in itertools.product(range(len(values)), repeat=count):
        shortfalls = torch.tensor(values[list(each)].max() - values[list(each)])
        said += np.prod(np.array(shares)[list(each)]) * unseen.chance(unseen.reached(shortfalls, tolerance))
    return true, said


@pytest.mark.parametrize("tolerance", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("rare", [1e-3, 0.1, 0.5])
def test_no_chance_is_larger_than_what_is_said_in_the_mean(rare, tolerance):
    """Exact, over all draws of four."""
    true, said = odds([0.0, 1.0, 2.0], [0.9 * (1 - rare), 0.1 * (1 - rare), rare], 4, tolerance)
    assert 0 < true <= said


def test_a_rare_maximum_leaves_no_room_for_saying_less():
    rare = 1e-4
    true, said = odds([0.0, 1.0], [1 - rare, rare], 4, 0.0)
    missed = (1 - rare) ** 4 * unseen.chance(4)  # what those say that have not met it
    assert said - missed == pytest.approx(true, rel=1e-2)


def test_a_lowering_is_the_shortfall_of_the_start_at_which_the_chance_is_small_enough():
    shortfalls = torch.tensor([0.6, 0.0, 0.5, 0.1, 0.3, 0.2, 0.9])
    assert unseen.lowering(shortfalls) == pytest.approx(0.6)  # the sixth
    assert unseen.chance(unseen.NEEDED) <= unseen.LEVEL < unseen.chance(unseen.NEEDED - 1)
    assert unseen.lowering(shortfalls[:5]) == math.inf
    assert [unseen.chance(count) for count in range(4)] == [1, 1, 0.5, 0.25]
    assert unseen.reached(shortfalls, 0.3) == 4


# --- the starts of a search -------------------------------------------------------------------------------------------


def searched(problem, output, network, rounds=3):
    made = search._Search(problem, output, network, seeded(4), 6, 3)
    return made, made.run(rounds, 2)


def test_a_start_is_known_in_all_that_was_made_of_it(monkeypatch):
    """Where nothing ascends, what descends from a start is the start."""
    monkeypatch.setattr(search._Search, "_ascend", lambda self, begun, *_: begun)
    problem, network = two_layers()
    made, found = searched(problem, 0.1 * normal((4, 1), 5), network)
    origins, kernels = torch.cat(made.origins), joined(made.pool)[0][0]
    assert len(origins) == len(kernels)
    assert (
        found.fresh == made.fresh == 6 * 3 - 2 - 3 - 3
    )  # at first the two features of the network, then the best three
    assert (origins[:2] == -1).all()
    firsts = [int((origins == each).nonzero()[0]) for each in range(made.fresh)]
    assert all(torch.equal(kernels[row], kernels[firsts[each]]) for row, each in enumerate(origins) if each >= 0)
    own = [row for row, each in enumerate(origins) if each < 0]
    assert len(own) > 2
    assert all(any(torch.equal(kernels[row], kernels[each]) for each in (0, 1)) for row in own)


@pytest.mark.parametrize("homogeneous", [True, False])
def test_a_shortfall_is_what_the_bound_would_be_with_one_start_alone(homogeneous):
    problem, _ = two_layers()
    if homogeneous:
        only = mf.Architecture((1, 3, 3), (mf.Conv(2, activation="relu"),))
        problem = mf.Problem(only, problem.inputs, problem.targets, penalty=mf.Penalty(input=2e-3, readout=2e-3))
    output = -problem.targets.view(-1, 1) / (2 * len(problem.inputs))
    made, found = searched(problem, output, None)
    pool, origins = Compositions(problem.architecture, *joined(made.pool)), torch.cat(made.origins)
    at = found.scale, list(found.mu)
    shortfalls, alone = made._shortfalls(*at, found.bound), []
    for each in range(made.fresh):
        made.pool = [pool[origins == each]]
        alone.append(made._best_multipliers(*at)[2] if homogeneous else made._bound(*at))
    assert made.fresh == len(shortfalls) >= 6
    assert shortfalls.tolist() == pytest.approx([each - found.bound for each in alone], abs=1e-12)
    assert shortfalls.min() == pytest.approx(0, abs=1e-12)
    assert shortfalls.max() > 1e-6
    assert found.reached == (shortfalls <= search.AGREEMENT * abs(found.bound)).sum()
    assert found.unseen_lowering == pytest.approx(shortfalls.sort().values[5].item())


def test_what_every_start_reaches_leaves_little_unseen():
    """Kernels of one pixel, one image: all starts end at one feature."""
    problem = mf.Problem(mf.Architecture((1, 1, 1), (mf.Conv(1, activation="relu"),)), torch.ones(1, 1, 1, 1), [1.0])
    found = search_features(problem, torch.tensor([[-0.3]]), starts=12, steps=60)
    assert found.fresh == 12
    assert 6 <= found.reached < 12  # the others are on the dead side
    assert found.unseen_chance == 2.0 ** (1 - found.reached)
    assert found.unseen_lowering < 1e-6
    assert f"{found.reached} of 12 fresh starts led to the best" in found.summary()
    assert "inf" not in replace(found, unseen_lowering=math.inf).summary()
    assert "at most 1%" in replace(found, unseen_chance=1e-9).summary()


# --- never above an attained J ----------------------------------------------------------------------------------------


def test_a_bound_above_an_attained_value_is_refuted_and_that_value_stands_in_its_place():
    problem, network = two_layers()
    output = 0.1 * normal((4, 1), 5)
    free, *others = (
        search_features(problem, output, network, starts=4, steps=3, attained=attained)
        for attained in (None, 10.0, -10.0)
    )
    assert [each.refuted for each in others] == [None, free.bound]
    assert [each.bound for each in others] == [free.bound, -10.0]
    assert f"gives the bound {free.bound:.8g}, refuted by J = -10" in others[1].summary()
    assert "for every network" not in others[1].summary()
    assert others[1].below(-20.0, problem, (3, 2)).refuted == free.bound
    with pytest.raises(ValueError, match="attained"):
        search_features(problem, output, network, attained=math.nan)


def test_rounding_refutes_nothing():
    problem, _ = two_layers()
    eps = torch.finfo(torch.float64).eps
    for excess, refuted in ((8 * eps, None), (12 * eps, 1 + 12 * eps)):  # four images and five particles: 9 eps
        met = UnseenFeatures(1 + excess, 4).below(1.0, problem, (3, 2))
        assert (met.bound, met.refuted) == (1.0, refuted)
