"""What the velocity allows, where its bound is attained."""

import pytest
import torch

import meanfield as mf
from meanfield import certificates
from theory_checks import zero_gap
from theory_checks.instances import random_network
from theory_checks.weak_duality import Section5

WIDTHS = (3, 1, 1)  # one target each: the fastest kernel of a source is its only one


def drawn(seed):
    """Kernels of one entry: velocities are along kernels, or against them."""
    generator = torch.Generator().manual_seed(seed)
    architecture = mf.Architecture((1, 1, 2), (mf.Conv(1, activation="softplus"),) * 3, "average", 1)
    inputs = torch.rand(3, 1, 1, 2, generator=generator, dtype=torch.float64)
    penalty = mf.Penalty(source=0.03, readout=0.05, input=0.02)
    problem = mf.Problem(architecture, inputs, 9 * inputs.sum((1, 2, 3))[:, None], "squared", penalty)
    return problem, random_network(problem, WIDTHS, generator)


def test_the_bound_is_attained_where_all_velocities_are_along_what_they_move():
    """Every sign and factor counts there: in, out, the rates of the masses, the sum of p out."""
    seen = 0
    for seed in range(200):
        problem, network = drawn(seed)
        velocity = zero_gap._velocity(problem, network)
        pairs = [*zip(velocity.kernels[1:], network.kernels[1:]), (velocity.readout, network.readout)]
        if not all(bool((v * w > 0).all()) for v, w in pairs):
            continue
        seen += 1
        program = mf.ConvexProgram.freeze(problem, network)
        own = certificates.stationary_multipliers(program, program.point(network))
        gap = float(problem.value(network)) - Section5.of(program, own).value
        assert zero_gap._allowed_by(problem, network, velocity) == pytest.approx(gap, rel=1e-4)
    assert seen >= 3
