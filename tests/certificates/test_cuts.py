"""The small program of known features, by cuts."""

import pytest
import torch
from stored_optima import EXACT_ONE_LAYER, one_layer_problem
from strategies import normal

from meanfield.certificates import vectors
from meanfield.certificates.cuts import Features, Program, dual
from meanfield.solvers import arrangements


def test_the_small_program_has_the_optimum_of_its_features():
    """Against the gap of the exact optimum's own features: residuals r, no feature above the price, D(r) = J."""
    problem = one_layer_problem()
    solved = arrangements.solve(problem)
    features = Features.of(problem)
    own = vectors.kernels(solved.network)
    program = Program(problem, features, own / own.norm(dim=1, keepdim=True))
    output = program.solve(0 * solved.multipliers.output + 1e-3)
    assert float((program.phi @ output).abs().max()) <= 2 * 2e-3 * (1 + 1e-6)
    assert dual(problem, output) == pytest.approx(EXACT_ONE_LAYER, rel=1e-6)
    # the weights of patches say the same of q, wherever a position counts more than another
    uneven = Features(features.patches, normal((len(features.weights),), 1))
    q = (uneven.patches @ own.T).relu().T @ uneven.weighted(output)
    torch.testing.assert_close(q, uneven(own) @ output)
    # phi is the network's response: F = sum_j p_j u_j |z_j| phi_j
    network = solved.network
    sizes = network.masses[0] * network.readout.flatten() * own.norm(dim=1)
    torch.testing.assert_close((sizes @ program.phi)[:, None], network(problem.inputs))
