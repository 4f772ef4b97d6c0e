"""Relaxed features: what the bound on a partition makes of a feature, and multipliers chosen with them."""

import pytest
import torch
from strategies import normal, random_inputs, seeded

import meanfield as mf
from meanfield.certificates import concave, relaxing, sphere
from meanfield.certificates.cuts import Features, Program, dual
from meanfield.certificates.duality import price_of
from meanfield.certificates.sphere.response import unit


def partition_at(features, output, refined):
    """60 cells of a search at multipliers r, refined so often."""
    search = sphere.Search(features.patches, features.weighted(output))
    for _ in range(refined):
        search.refine(1e-9)
    return relaxing.Partition.of(features, search, 60)


@pytest.fixture(scope="module")
def problem():
    arch = mf.Architecture((1, 4, 4), (mf.Conv(2, activation="relu"),))
    penalty = mf.Penalty(input=1e-2, readout=1e-2)
    return mf.Problem(arch, random_inputs(arch, 6, 0), normal((6, 1), 1), penalty=penalty)


@pytest.fixture(scope="module")
def features(problem):
    return Features.of(problem)


@pytest.mark.parametrize("refined", [0, 1])
def test_relaxed_features_are_the_derivative_of_the_bound(features, refined):
    output = normal((6, 1), 2)
    partition = partition_at(features, output, refined)
    upper, cuts = partition.bound(output)
    values = torch.tensordot(cuts, output, 2)
    assert float(values.max()) == pytest.approx(upper, rel=1e-9)
    steepest = cuts[int(values.argmax())]
    for seed in range(2):
        step = 1e-6 * normal((6, 1), seed)
        change = partition.bound(output + step)[0] - partition.bound(output - step)[0]
        assert change / 2 == pytest.approx(float((steepest * step).sum()), rel=1e-4)


def test_no_response_exceeds_the_bound_at_any_multipliers(features):
    """The relaxation lies above q on each cell: a lower cut would cut off the optimum."""
    search = sphere.Search(features.patches, features.weighted(normal((6, 1), 2)))
    search.refine(1e-9)
    partition = relaxing.Partition.of(features, search, 60)
    cells, images = partition.cells, partition.images
    places = 2 * torch.rand(len(cells), 200, 4, generator=seeded(3), dtype=torch.float64) - 1
    inside = unit(cells.middles[:, None] + cells.halves[:, None] * places)
    for seed in range(5):
        output = normal((6, 1), 10 + seed)
        reached = cells.signs[:, None] * (images(inside.flatten(0, 1)) @ output).view(len(cells), -1)
        assert float(reached.max()) <= partition.bound(output)[0] * (1 + 1e-9)


@pytest.mark.slow
def test_more_is_proven_on_the_partition_than_at_the_optimal_multipliers(problem, features):
    program = Program(problem, features, unit(normal((400, 4), 4)))
    optimal = program.solve(0 * normal((6, 1), 0))
    partition = partition_at(features, optimal, 1)
    *_, found = relaxing.relaxed_passes(program, optimal, partition, 24)
    cuts = len(program.cuts)
    price = price_of(problem)

    def proven(output):
        limit = min(price / partition.bound(output)[0], 2.0)
        return concave.maximum(lambda s: dual(problem, s * output), limit)[1]

    assert proven(found) > 1.02 * proven(optimal)
    assert len(program.cuts) == cuts  # the relaxed ones are not true ones
