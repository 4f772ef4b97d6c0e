"""Relaxed features: what the bound on a partition makes of a feature, and multipliers chosen with them."""

import pytest
import torch
from strategies import normal, random_inputs

import meanfield as mf
from meanfield.certificates import proving, relaxing
from meanfield.certificates.sphere.response import unit


@pytest.fixture(scope="module")
def partitioned():
    arch = mf.Architecture((1, 4, 4), (mf.Conv(2, activation="relu"),))
    problem = mf.Problem(
        arch, random_inputs(arch, 6, 0), normal((6, 1), 1), penalty=mf.Penalty(input=1e-2, readout=1e-2)
    )
    features, output = proving.Features.of(problem), normal((6, 1), 2)
    return problem, features, output, relaxing.Partition.refined(features.patches, features.weights, output, 60)


def test_relaxed_features_are_the_derivative_of_the_bound(partitioned):
    _, _, output, partition = partitioned
    upper, cuts = partition.bound(output)
    values = torch.tensordot(cuts, output, 2)
    assert float(values.max()) == pytest.approx(upper, rel=1e-9)
    steepest = cuts[int(values.argmax())]
    for seed in range(2):
        step = 1e-6 * normal((6, 1), seed)
        change = partition.bound(output + step)[0] - partition.bound(output - step)[0]
        assert change / 2 == pytest.approx(float((steepest * step).sum()), rel=1e-4)


def test_no_response_exceeds_the_bound_at_any_multipliers(partitioned):
    """The cells hold all directions, and the relaxation lies above q: a cut that is lower would cut off the optimum."""
    _, features, _, partition = partitioned
    kernels = unit(normal((4000, 4), 3))
    for seed in range(5):
        output = normal((6, 1), 10 + seed)
        assert float((features(kernels) @ output).abs().max()) <= partition.bound(output)[0] * (1 + 1e-9)


@pytest.mark.slow
def test_more_is_proven_on_the_partition_than_at_the_optimal_multipliers(partitioned):
    problem, features, _, _ = partitioned
    program = proving._Program(problem, features, unit(normal((400, 4), 4)))
    optimal = program.solve(0 * normal((6, 1), 0))
    *_, found = proving._relaxed(program, optimal, 12, 60, float("inf"))
    cuts = len(program.cuts)
    partition = relaxing.Partition.refined(features.patches, features.weights, optimal, 60)
    price = proving._price(problem)

    def proven(output):
        limit = min(price / partition.bound(output)[0], 2.0)
        return proving.concave.maximum(lambda s: proving._dual(problem, s * output), limit)[1]

    assert proven(found) > 1.02 * proven(optimal)
    assert len(program.cuts) == cuts  # the relaxed ones are not true ones
